import io
import pickle
import subprocess
import sys

import lmdb
import numpy as np
import pytest
from PIL import Image

from data_shards.sources.base import Place
from data_shards.sources.lmdb_source import Lmdb


def jpeg(number, size=(8, 6)):
    buffer = io.BytesIO()
    Image.new("L", size, number * 20).save(buffer, "JPEG")
    return buffer.getvalue()


def write(folder, entries, **options):
    environment = lmdb.open(str(folder), map_size=2**24, **options)
    with environment.begin(write=True) as transaction:
        for key, value in entries.items():
            transaction.put(key, value)
    environment.close()
    return Lmdb(str(folder))


def contents(source):
    found = list(source.pictures())
    reader = source.open()
    data = [reader.read(Place(f.name, f.part, f.offset, f.size)) for f in found if not f.refused]
    reader.close()
    return found, data


def test_keys_that_are_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    entries = {f"id{n // 2}/{n}.jpg".encode(): jpeg(n) for n in range(4)}
    meta = {b"__len__": pickle.dumps(4), b"__keys__": b"cos\nsystem\n(S'touch canary'\ntR."}
    found, data = contents(write(tmp_path / "db", entries | meta))
    assert [(f.identity, f.name, f.stem, f.size, f.extension) for f in found] == [
        (f"id{n // 2}", f"data.mdb/id{n // 2}/{n}.jpg", str(n), len(jpeg(n)), "jpg") for n in range(4)
    ]
    assert data == [jpeg(n) for n in range(4)]
    assert not (tmp_path / "canary").exists(), "what other tools pickle beside the pictures is not loaded"


def test_a_single_file_and_keys_that_are_no_utf8(tmp_path):
    source = write(tmp_path / "faces.lmdb", {b"caf\xe9/\xff.jpg": jpeg(1), b"caf\xe9/2": jpeg(2)}, subdir=False)
    found, data = contents(source)
    assert [f.name for f in found] == ["faces.lmdb/caf\udce9/2", "faces.lmdb/caf\udce9/\udcff.jpg"]
    assert data == [jpeg(2), jpeg(1)]


def varint(value):
    out = b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


def datum(data, label, encoded=True):
    """As protobuf writes caffe.proto's Datum: channels 1, height 2, width 3, data 4, label 5, encoded 7."""
    fields = b"\x08\x03\x10\x06\x18\x08" + b"\x22" + varint(len(data)) + data
    return fields + (b"" if label is None else b"\x28" + varint(label)) + (b"\x38\x01" if encoded else b"")


def test_caffes_datum_records(tmp_path):
    entries = {
        b"00000000_ann/1.jpg": datum(jpeg(1), 0),
        b"00000001_bob/2.jpg": datum(jpeg(2), 300),
        b"00000002_raw.jpg": datum(bytes(144), 1, encoded=False),
        b"00000003_none.jpg": datum(jpeg(3), None),
    }
    found, data = contents(write(tmp_path / "db", entries))
    assert [(f.identity, f.stem, f.refused) for f in found] == [
        ("0000000", "1", ""),
        ("0000300", "2", ""),
        ("0000001", "00000002_raw", "is a Datum of raw pixels: allowed are encoded pictures"),
        ("", "", "has no label in its Datum"),
    ]
    assert data == [jpeg(1), jpeg(2)]


def test_entries_without_an_identity_are_refused_in_one_line(tmp_path):
    source = write(tmp_path / "db", {b"%08d" % n: jpeg(n) for n in range(3)})
    with pytest.raises(ValueError, match=r"has 3 entries whose keys name no identity: allowed are identity/image.jpg"):
        list(source.pictures())


def test_damaged_entries_are_refused_alone(tmp_path):
    found, _ = contents(
        write(tmp_path / "db", {b"a/1.jpg": jpeg(1), b"a/2.jpg": b"no picture", b"../../a.jpg": jpeg(2)})
    )
    assert [(f.name, f.refused) for f in found] == [
        ("data.mdb/../../a.jpg", "has '..' in its path"),
        ("data.mdb/a/1.jpg", ""),
        ("data.mdb/a/2.jpg", "is no JPEG, PNG, PGM, BMP or WebP by its first bytes"),
    ]


LIST = """
import sys
from data_shards.sources.base import Place
from data_shards.sources.lmdb_source import Lmdb
for keep in sys.argv[2:]:
    data = open(sys.argv[1] + "/whole", "rb").read()
    open(sys.argv[1] + "/data.mdb", "wb").write(data[:int(keep)])
    try:
        source = Lmdb(sys.argv[1])
        found = list(source.pictures())
        reader = source.open()
        for f in found:
            reader.read(Place(f.name, f.part, f.offset, f.size))
        reader.close()
        print("whole", len(found))
    except ValueError as error:
        assert "\\n" not in str(error)
        print("refused")
"""


def test_a_file_cut_anywhere_is_refused_and_never_crashes(tmp_path):
    write(tmp_path / "db", {f"id{n}/{n}.jpg".encode(): jpeg(n % 12, (40 + n, 50)) for n in range(60)})
    data = (tmp_path / "db" / "data.mdb").read_bytes()
    (tmp_path / "db" / "whole").write_bytes(data)
    places = [str(int(at)) for at in np.linspace(0, len(data) - 1, 20)]
    done = subprocess.run(
        [sys.executable, "-c", LIST, str(tmp_path / "db"), *places, str(len(data))],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:-1] == ["refused"] * 20 + ["whole 60"]


def test_a_url_or_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is a URL: LMDB must lie on this machine"):
        list(Lmdb("s3://bucket/db").pictures())
    with pytest.raises(ValueError, match="is no LMDB that can be read"):
        list(Lmdb(str(tmp_path / "none")).pictures())
