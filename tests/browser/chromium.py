"""Debian's Chromium, headless, and a page of the report in it that remembers what went wrong."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here: apt-get install chromium")
ARGUMENTS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--enable-unsafe-swiftshader",
    "--use-gl=angle", "--use-angle=swiftshader",
)  # fmt: skip
"""The last three: WebGL without a GPU, for the chart in three dimensions."""


@contextmanager
def chromium() -> Iterator:
    """A running browser."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(ARGUMENTS))
        try:
            yield browser
        finally:
            browser.close()


class Looked:
    """A page that was opened: its errors, and every address that it asked for beside its own."""

    def __init__(self, browser, path: Path, **context) -> None:
        self.errors: list[str] = []
        self.requests: list[str] = []
        self._context = browser.new_context(**{"viewport": {"width": 1360, "height": 900}} | context)
        self.page = self._context.new_page()
        self.page.on("console", lambda told: told.type == "error" and self.errors.append(told.text))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.resolve().as_uri())
        self.page.wait_for_selector("html[data-ready]", timeout=60_000)
        own = path.resolve().as_uri()
        self.requests = [url for url in self.requests if url != own and not url.startswith("data:")]

    def close(self) -> None:
        self._context.close()
