import io
import subprocess
import sys
import tarfile

import numpy as np
import pytest

from data_shards.tar_index import index_tar, write_tar_index


def tar_of(path, names, format, size=700):
    with tarfile.open(path, "w", format=format) as tar:
        tar.addfile(tarfile.TarInfo("folder/"))
        for number, name in enumerate(names):
            data = bytes([number % 250]) * (size + number)
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        link = tarfile.TarInfo("a/link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "elsewhere"
        tar.addfile(link)
    return path


NAMES = [f"{folder}/{number:03d}.{end}" for folder in ("a", "b" * 40) for number in range(20) for end in ("jpg", "cls")]
LONG = [f"{'long' * 40}/{number}.jpg" for number in range(3)]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_offsets_are_those_of_the_bytes_in_every_format(tmp_path, format):
    names = NAMES + (LONG if format != tarfile.USTAR_FORMAT else ["p" * 90 + "/" + "q" * 80 + ".jpg"])
    path = tar_of(tmp_path / "a.tar", names, format)
    data = path.read_bytes()
    samples = index_tar(path)
    found = [member for sample in samples for member in sample]
    assert [member.name for member in found] == names
    for number, member in enumerate(found):
        assert data[member.offset : member.offset + member.size] == bytes([number % 250]) * (700 + number)
    assert [len(sample) for sample in samples[:40]] == [2] * 40


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT])
def test_equal_to_dalis_own_tool(tmp_path, format):
    path = tar_of(tmp_path / "a.tar", NAMES, format)
    script = f"{sys.prefix}/bin/wds2idx"
    subprocess.run([sys.executable, script, str(path), str(tmp_path / "stock.idx")], check=True, capture_output=True)
    assert write_tar_index(path) == 40
    assert (tmp_path / "a.idx").read_text() == (tmp_path / "stock.idx").read_text()


def test_a_tar_cut_anywhere_is_refused_in_one_line(tmp_path):
    path = tar_of(tmp_path / "a.tar", NAMES[:6], tarfile.USTAR_FORMAT)
    whole = path.read_bytes()
    end = len(whole.rstrip(b"\0"))
    for keep in np.linspace(0, end, 40).astype(int):
        path.write_bytes(whole[:keep])
        with pytest.raises(ValueError, match=r"is cut short|is empty: it is no tar") as caught:
            index_tar(path)
        assert "\n" not in str(caught.value)


def test_what_is_no_tar_or_damaged_is_refused(tmp_path):
    path = tar_of(tmp_path / "a.tar", NAMES[:6], tarfile.USTAR_FORMAT)
    whole = bytearray(path.read_bytes())
    whole[2048 + 10] ^= 1
    for data in (b"x" * 5000, bytes(whole[:600]) + b"x" * 5000):
        path.write_bytes(data)
        with pytest.raises(ValueError, match="is no tar or damaged: there is no header at byte"):
            index_tar(path)


def test_names_with_blanks_are_refused(tmp_path):
    path = tar_of(tmp_path / "a.tar", ["a/with blank.jpg"], tarfile.USTAR_FORMAT)
    with pytest.raises(ValueError, match=r"has a member 'a/with blank.jpg': DALI's reader takes no blanks"):
        index_tar(path)


def test_it_begins_at_once(tmp_path):
    """Importing numpy would take as long as the index of thousands of samples."""
    script = "import sys, data_shards.tar_index; print({'numpy', 'rich', 'PIL'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
