import hashlib
import re
from types import SimpleNamespace

import pytest

from data_shards import commit
from data_shards.commit import committed


def test_a_file_gets_its_name_only_when_it_is_whole(tmp_path):
    with committed(tmp_path / "x") as file:
        file.write(b"ab")
        file.write(b"c")
        (temporary,) = tmp_path.iterdir()
        assert re.fullmatch(r"x\.[0-9a-f]{8}\.tmp", temporary.name)
    assert (tmp_path / "x").read_bytes() == b"abc"
    assert (file.length, file.sha256) == (3, hashlib.sha256(b"abc").hexdigest())

    def fail():
        with committed(tmp_path / "y") as half:
            half.write(b"a")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_the_disk_is_asked_to_begin_with_every_byte_once_and_early(tmp_path, monkeypatch):
    asked, lengths = [], []

    def sync_file_range(handle, offset, length, flags):
        asked.append((offset.value, length.value, flags))
        lengths.append((tmp_path / name).stat().st_size)

    monkeypatch.setattr(commit, "WRITEBACK", 10)
    monkeypatch.setattr(commit, "_libc", lambda: SimpleNamespace(sync_file_range=sync_file_range))
    with committed(tmp_path / "x") as file:
        (name,) = (path.name for path in tmp_path.iterdir())
        for size in (4, 5, 3, 20, 9):
            file.write(bytes(size))
    assert asked == [(0, 12, 2), (12, 20, 2)]
    assert lengths == [12, 32], "what it is asked for has left the program's buffer"


def test_a_system_that_has_no_such_call_needs_none(tmp_path, monkeypatch):
    monkeypatch.setattr(commit, "WRITEBACK", 1)
    monkeypatch.setattr(commit, "_libc", SimpleNamespace)
    with committed(tmp_path / "x") as file:
        file.write(b"abc")
    assert (tmp_path / "x").read_bytes() == b"abc"
