import io
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
from rich.console import Console
from rich.progress import Progress

from data_shards.progress import progress
from data_shards.progress_bar import COLUMNS


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch):
    found = Terminal()
    monkeypatch.setattr("data_shards.progress.sys", SimpleNamespace(stderr=found))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return found


def test_a_bar_counts_on_a_terminal(terminal):
    with progress("pack", 3) as advance:
        advance()
        advance(2)
    assert "pack" in terminal.getvalue()
    assert "3/3" in terminal.getvalue()
    assert "images/s" in terminal.getvalue()


def test_a_bar_of_pictures_says_images_and_megabytes_a_second_and_what_remains():
    console = Console(file=io.StringIO(), width=120)
    clock = iter(range(100))
    with Progress(*COLUMNS, console=console, get_time=lambda: next(clock) * 1.0, auto_refresh=False) as bar:
        task = bar.add_task("convert", total=4000, unit="images", bytes=0)
        for _ in range(4):
            bar.update(task, advance=500, bytes=bar.tasks[0].fields["bytes"] + 5_000_000)
        console.print(bar.get_renderable())
    said = console.file.getvalue()
    rate = re.search(r"2000/4000 ([\d,]+) images/s, ([\d,]+) MB/s (\d+:\d\d:\d\d)", said)
    assert rate, said
    images, megabytes = (int(number.replace(",", "")) for number in rate.groups()[:2])
    assert megabytes == pytest.approx(images * 10_000 / 1e6, abs=1)
    assert rate[3] != "0:00:00"


def test_a_bar_inside_another_is_drawn_too(terminal):
    with progress("train", 2, "steps") as outer:
        with progress("embed", 5) as inner:
            inner(5)
        outer(2)
    assert "2/2" in terminal.getvalue()


def test_quiet_where_there_is_no_terminal_or_it_is_not_wanted(terminal, monkeypatch):
    with progress("pack", 3, enabled=False) as advance:
        advance(3)
    assert terminal.getvalue() == ""
    file = io.StringIO()
    monkeypatch.setattr("data_shards.progress.sys", SimpleNamespace(stderr=file))
    with progress("pack", 3) as advance:
        advance(3)
    assert file.getvalue() == ""


def test_nothing_of_rich_is_loaded_where_no_bar_is_drawn():
    script = """
import sys
from data_shards.progress import progress
with progress("pack", 3) as advance:
    advance(3)
print("rich" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
