"""The built site: strict, whole, and without anything from elsewhere."""

import os
import subprocess
import sys
import threading
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest

from tests.browser.chromium import chromium, needs_chromium
from tests.docs.test_written import leaf
from tests.docs.written import ROOT

ATTRIBUTES = ("src", "href", "poster", "data", "srcset")


class Page(HTMLParser):
    """Anchors of a page, and what it links (a) and loads (all else)."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path, self.ids, self.links, self.loads = path, set(), [], []
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.ids |= {found.get("id"), found.get("name")}
        for name in ATTRIBUTES:
            if found.get(name):
                (self.links if tag == "a" else self.loads).append(found[name])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("site")
    told = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", "docs/mkdocs.yml", "--site-dir", out],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert told.returncode == 0, told.stderr
    return out


@pytest.fixture(scope="module")
def pages(site):
    return {path.relative_to(site).as_posix(): Page(path) for path in site.rglob("*.html")}


def test_nothing_is_loaded_from_elsewhere(site, pages):
    elsewhere = {(name, url) for name, page in pages.items() for url in page.loads if "//" in url}
    assert elsewhere == set()
    styles = {path.name for path in site.rglob("*.css") if "url(//" in (text := path.read_text()) or "url(http" in text}
    assert styles == set()


def test_every_link_of_the_site_leads_somewhere(site, pages):
    broken = []
    for name, page in pages.items():
        if name == "404.html":
            continue
        for url in (*page.links, *page.loads):
            place, anchor = urldefrag(unquote(url))
            if "//" in place or place.startswith(("mailto:", "data:")):
                continue
            target = ((site / name).parent / place).resolve() if place else site / name
            target = target / "index.html" if target.is_dir() else target
            at = target.relative_to(site.resolve()).as_posix() if target.is_relative_to(site.resolve()) else str(target)
            if not target.is_file() or (anchor and at in pages and anchor not in pages[at].ids):
                broken.append((name, url))
    assert broken == []


def test_the_reference_has_every_command_and_setting(site):
    commands = (site / "reference/commands.html").read_text()
    for words in (["shard"], ["shards", "stats"], ["evaluate"], ["plan"]):
        name, parser, _ = leaf(words)
        assert f">{name}<" in commands
        for action in parser._actions:
            assert action.dest == "help" or (action.option_strings or [action.metavar])[0] in commands
    settings = (site / "reference/settings.html").read_text()
    for told in ("P: identities in the <em>global</em> batch", "Gap, in kB, up to which", "Highest learning rate"):
        assert told in settings
    assert "data_shards.plan.Plan.batch" in (site / "reference/python.html").read_text()


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@needs_chromium
@pytest.mark.timeout(300)
def test_pages_ask_for_nothing_else_and_the_search_finds(site):
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    own, asked, errors = f"http://127.0.0.1:{server.server_port}/", [], []
    try:
        with chromium() as browser:
            page = browser.new_page()
            page.on("request", lambda request: asked.append(request.url))
            page.on("pageerror", lambda error: errors.append(str(error)))
            for name in ("index.html", "tutorial.html", "explanation/plan.html", "reference/python.html"):
                page.goto(own + name)
                page.wait_for_load_state("networkidle")
                broken = "[...document.images].filter(one => !one.naturalWidth).map(one => one.src)"
                assert page.evaluate(broken) == []
            page.click("input.md-search__input")
            page.keyboard.type("consent", delay=50)
            page.wait_for_selector(".md-search-result__item a", state="attached", timeout=60_000)
            assert "face-data" in page.locator(".md-search-result__item a").first.get_attribute("href")
    finally:
        server.shutdown()
        server.server_close()
    assert [url for url in asked if not url.startswith((own, "data:", "blob:"))] == []
    assert errors == []
