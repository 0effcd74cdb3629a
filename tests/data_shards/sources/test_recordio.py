import io
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_shards.sources.base import Place
from data_shards.sources.recordio import RecordIO

FIXTURES = Path(__file__).with_name("fixtures")


def picture(number):
    buffer = io.BytesIO()
    Image.new("L", (8, 6), number * 20).save(buffer, "JPEG")
    return buffer.getvalue()


def read_all(source):
    found = [picture for picture in source.pictures() if not picture.refused]
    reader = source.open()
    data = {f.name: reader.read(Place(f.name, f.part, f.offset, f.size)) for f in reversed(found)}
    reader.close()
    return found, data


@pytest.fixture
def mxnet(tmp_path):
    for name in ("mxnet.rec", "mxnet.idx", "property"):
        shutil.copy(FIXTURES / name, tmp_path / name)
    return tmp_path


def test_what_mxnet_writes_is_read_with_header_records_and_several_labels(mxnet):
    found, data = read_all(RecordIO(str(mxnet)))
    assert [(f.identity, f.name, f.stem, f.extension) for f in found] == [
        (f"{label:07d}", f"mxnet.rec record {key}", f"{key:08d}", "jpg")
        for key, label in ((1, 0), (2, 0), (3, 0), (4, 1), (5, 1), (6, 1))
    ]
    assert [len(data[f.name]) for f in found] == [f.size for f in found]
    for row, f in enumerate(found):
        with Image.open(io.BytesIO(data[f.name])) as image:
            assert np.asarray(image).mean() == pytest.approx(row * 20, abs=1)
    assert data["mxnet.rec record 5"].count(struct.pack("<I", 0xCED7230A)) == 3, (
        "the record was cut at its magic number"
    )


def test_the_record_file_itself_is_a_source_and_needs_no_index(mxnet):
    with_index = read_all(RecordIO(str(mxnet)))
    (mxnet / "mxnet.idx").unlink()
    without = read_all(RecordIO(str(mxnet / "mxnet.rec")))
    assert without[1] == with_index[1]
    assert [f.identity for f in without[0]] == [f.identity for f in with_index[0]]


def test_an_index_in_another_order_is_the_same(mxnet):
    expected = read_all(RecordIO(str(mxnet)))
    lines = (mxnet / "mxnet.idx").read_text().splitlines()
    (mxnet / "mxnet.idx").write_text("\n".join(reversed(lines)))
    assert read_all(RecordIO(str(mxnet))) == expected


def record(labels, data, flag=None):
    """A record as dmlc-core writes it, of data without the magic number."""
    many = len(labels) > 1
    header = struct.pack("<IfQQ", len(labels) if many else 0, 0.0 if many else labels[0], 1, 0)
    if flag is not None:
        header = struct.pack("<I", flag) + header[4:]
    body = header + (np.array(labels, "<f4").tobytes() if many else b"") + data
    return struct.pack("<II", 0xCED7230A, len(body)) + body + bytes(-len(body) % 4)


def write(folder, records):
    offsets = np.cumsum([0, *(len(one) for one in records)])
    (folder / "a.rec").write_bytes(b"".join(records))
    (folder / "a.idx").write_text("".join(f"{n}\t{at}\n" for n, at in enumerate(offsets[:-1])))
    return RecordIO(str(folder))


def test_plain_im2rec_files_have_no_header_record(tmp_path):
    source = write(tmp_path, [record([n // 2], picture(n)) for n in range(4)])
    assert [f.identity for f in source.pictures()] == ["0000000", "0000000", "0000001", "0000001"]


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (record([0.5], picture(1)), "has the label 0.5: allowed are whole numbers, 0 and up"),
        (record([-1], picture(1)), "has the label -1"),
        (record([float("nan")], picture(1)), "has the label nan"),
        (record([0], b"no picture at all"), "is no JPEG, PNG, PGM, BMP or WebP by its first bytes"),
        (record([0], b""), "is empty"),
        (record([0], picture(1), flag=10**6), "is damaged: 1,000,000 labels in"),
        (b"\0" * 64, "is damaged: no record begins at byte"),
        (struct.pack("<II", 0xCED7230A, 2**29 - 1) + bytes(64), "is cut short: 536,870,911 bytes begin at byte"),
        (struct.pack("<II", 0xCED7230A, 8) + bytes(8), "is damaged: 8 bytes hold no header"),
        (struct.pack("<II", 0xCED7230A, (2 << 29) + 64) + bytes(64), ""),
    ],
)
def test_a_damaged_record_is_refused_and_costs_no_other(tmp_path, bad, reason):
    source = write(tmp_path, [record([3], picture(1)), bad, record([4], picture(2))])
    found = list(source.pictures())
    assert [f.identity for f in found if not f.refused] == ["0000003", "0000004"]
    (refused,) = [f for f in found if f.refused]
    assert refused.name == "a.rec record 1"
    assert reason in refused.refused


def test_a_file_cut_anywhere_lists_every_record_and_says_which_are_cut(tmp_path):
    source = write(tmp_path, [record([n], picture(n)) for n in range(8)])
    whole = (tmp_path / "a.rec").read_bytes()
    for keep in np.linspace(1, len(whole) - 5, 23).astype(int):
        (tmp_path / "a.rec").write_bytes(whole[:keep])
        found = list(source.pictures())
        assert len(found) == 8
        good = [not f.refused for f in found]
        assert good == sorted(good, reverse=True)
        assert not all(good)
        assert all("is cut short" in f.refused for f in found if f.refused)
        (tmp_path / "a.idx").rename(tmp_path / "b.idx")
        walked = list(source.pictures())
        (tmp_path / "b.idx").rename(tmp_path / "a.idx")
        assert [f.offset for f in walked if not f.refused] == [f.offset for f in found if not f.refused]
        assert sum(bool(f.refused) for f in walked) == 1


def test_labels_are_compared_with_the_property_file(tmp_path):
    source = write(tmp_path, [record([n], picture(n)) for n in range(4)])
    (tmp_path / "property").write_text("3,112,112")
    assert [f.refused for f in source.pictures()][
        3
    ] == "has the label 3: allowed are whole numbers, 0 to 2 by `property`"


@pytest.mark.parametrize("index", ["1\t2\t3\n", "a\tb\n", "9" * 30 + "\t1\n"])
def test_an_index_that_is_none_is_refused_in_one_line(tmp_path, index):
    source = write(tmp_path, [record([0], picture(0))])
    (tmp_path / "a.idx").write_text(index)
    with pytest.raises(ValueError, match=r"a.idx is no index of records: each line must be a number and an offset"):
        list(source.pictures())
