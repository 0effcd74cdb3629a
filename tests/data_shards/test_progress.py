import io
from types import SimpleNamespace

import pytest

from data_shards.progress import progress


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
