"""Every kind of source is found out, described, and converted to the same pictures."""

import json
import pickle
import shutil
import subprocess
import tarfile
import zipfile
from pathlib import Path

import lmdb
import pyarrow as pa
import pytest
from pyarrow import parquet

from data_shards.convert import ConvertConfig, convert
from data_shards.index import ShardSet
from data_shards.sources import insightface_bin
from data_shards.sources.detect import FORMATS, from_spec, open_source, spec_of

FIXTURES = Path(__file__).with_name("fixtures")


@pytest.fixture
def faces(tmp_path):
    """Folders of pictures, drawn by a number in each."""
    from PIL import Image

    root = tmp_path / "faces"
    for identity in ("ann", "bob", "cy"):
        (root / identity).mkdir(parents=True)
        for number in range(3):
            Image.new("L", (20, 16), 40 * number + ord(identity[0])).save(root / identity / f"{number}.jpg")
    return root


def as_zip(root, place):
    with zipfile.ZipFile(place / "faces.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(root.rglob("*.jpg")):
            archive.write(path, f"some/folder/{path.relative_to(root)}")
    return place / "faces.zip"


def as_tar(root, place):
    subprocess.run(["tar", "-cf", place / "faces.tar", "-C", root.parent, root.name], check=True)
    return place / "faces.tar"


def as_tar_gz(root, place):
    subprocess.run(["tar", "-czf", place / "faces.tgz", "-C", root.parent, root.name], check=True)
    return place / "faces.tgz"


def as_lmdb(root, place):
    environment = lmdb.open(str(place / "db"), map_size=2**22)
    with environment.begin(write=True) as transaction:
        for path in root.rglob("*.jpg"):
            transaction.put(str(path.relative_to(root)).encode(), path.read_bytes())
    environment.close()
    return place / "db"


def as_parquet(root, place):
    paths = sorted(root.rglob("*.jpg"))
    struct = [{"bytes": path.read_bytes(), "path": path.name} for path in paths]
    (place / "hub" / "data").mkdir(parents=True)
    table = pa.table({"image": struct, "label": [path.parent.name for path in paths]})
    parquet.write_table(table, place / "hub" / "data" / "train-00000.parquet", row_group_size=2)
    return place / "hub"


def as_csv(root, place):
    rows = [f"{path},{path.parent.name}" for path in sorted(root.rglob("*.jpg"))]
    (place / "list.csv").write_text("\n".join(["path,identity", *rows]))
    return place / "list.csv"


def as_parquet_list(root, place):
    paths = sorted(root.rglob("*.jpg"))
    parquet.write_table(
        pa.table({"path": list(map(str, paths)), "identity": [p.parent.name for p in paths]}), place / "l.parquet"
    )
    return place / "l.parquet"


def as_shards(root, place):
    convert(root, place / "set", ConvertConfig(workers=1, seed=4, shard_samples=4))
    return place / "set"


WAYS = {
    "folders": lambda root, place: root,
    "zip": as_zip,
    "tar": as_tar,
    "tar.gz": as_tar_gz,
    "lmdb": as_lmdb,
    "tables": as_parquet,
    "list": as_csv,
    "webdataset": as_shards,
}


def written(out):
    """{identity: its pictures' bytes, sorted}."""
    shard_set = ShardSet.open(out)
    found = {}
    for name in shard_set.splits:
        split = shard_set.split(name)
        for row in split.samples:
            data = split.shards[row["shard"]].read_bytes()[row["offset"] :][: row["size"]]
            found.setdefault(shard_set.identity_names[row["identity"]], []).append(data)
    return {name: sorted(pictures) for name, pictures in found.items()}


@pytest.mark.parametrize("kind", [*WAYS, "list of parquet"])
@pytest.mark.parametrize("workers", [1, 2])
def test_every_kind_gives_the_same_pictures_in_the_same_shards_each_time(faces, tmp_path, kind, workers):
    place = (as_parquet_list if kind == "list of parquet" else WAYS[kind])(faces, tmp_path)
    source = open_source(place)
    assert source.describe()["kind"] == kind.split()[0]
    assert from_spec(json.loads(json.dumps(spec_of(source)))) == source
    config = ConvertConfig(workers=workers, shard_samples=2, holdout_images=1)
    summary = convert(source, tmp_path / "out", config)
    assert (summary.read, summary.written, summary.failures) == (9, 9, ())
    assert written(tmp_path / "out") == {
        folder.name: sorted(path.read_bytes() for path in folder.iterdir()) for folder in faces.iterdir()
    }
    assert ShardSet.open(tmp_path / "out").manifest["source"]["kind"] == kind.split()[0]


def test_records_and_verification_sets_are_found_out_and_converted(tmp_path, faces):
    records = tmp_path / "records"
    records.mkdir()
    for name in ("mxnet.rec", "mxnet.idx", "property"):
        shutil.copy(FIXTURES / name, records)
    for place in (records, records / "mxnet.rec"):
        assert open_source(place).describe()["kind"] == "recordio"
    convert(records, tmp_path / "from-records", ConvertConfig(workers=1))
    assert {name: len(pictures) for name, pictures in written(tmp_path / "from-records").items()} == {
        "0000000": 3,
        "0000001": 3,
    }
    pictures = [path.read_bytes() for path in sorted(faces.rglob("*.jpg"))][:8]
    (tmp_path / "lfw.bin").write_bytes(pickle.dumps((pictures, [True, False, True, False])))
    assert open_source(tmp_path / "lfw.bin").describe()["kind"] == "bin"
    convert(tmp_path / "lfw.bin", tmp_path / "from-bin", ConvertConfig(workers=1, holdout_identities=1.0))
    insightface_bin._load.cache_clear()
    assert sum(map(len, written(tmp_path / "from-bin").values())) == 8
    pairs = (tmp_path / "from-bin" / "pairs.csv").read_text().splitlines()
    assert pairs[:3] == ["a,b,same", "000000/000000,000000/000001,1", "000002/000002,000003/000003,0"]
    assert len(pairs) == 5


def test_a_tar_that_is_called_otherwise_is_known_by_its_content(faces, tmp_path):
    place = as_tar_gz(faces, tmp_path)
    place.rename(tmp_path / "faces.tar")
    assert open_source(tmp_path / "faces.tar").describe()["kind"] == "tar.gz"


def test_several_archives_in_a_folder_are_one_source(faces, tmp_path):
    (tmp_path / "parts").mkdir()
    for name in ("ann", "bob", "cy"):
        subprocess.run(["tar", "-cf", tmp_path / "parts" / f"{name}.tar", "-C", faces, name], check=True)
    convert(tmp_path / "parts", tmp_path / "out", ConvertConfig(workers=1))
    assert set(written(tmp_path / "out")) == {"ann", "bob", "cy"}
    (tmp_path / "parts" / "z.zip").write_bytes(as_zip(faces, tmp_path).read_bytes())
    with pytest.raises(ValueError, match=r"holds archives of several kinds \(tar, zip\): give one of them"):
        open_source(tmp_path / "parts")


def test_an_archive_at_a_url(faces, tmp_path):
    import fsspec

    system = fsspec.filesystem("memory")
    for way in (as_zip, as_tar, as_tar_gz):
        place = way(faces, tmp_path)
        system.put_file(str(place), f"/archives/{place.name}")
        try:
            convert(f"memory://archives/{place.name}", tmp_path / place.suffix[1:], ConvertConfig(workers=1))
        finally:
            system.rm("/archives", recursive=True)
        assert len(written(tmp_path / place.suffix[1:])) == 3


def test_a_kind_that_is_named_is_not_found_out(faces, tmp_path):
    place = as_shards(faces, tmp_path)
    with tarfile.open(next((place / "train").glob("*.tar"))) as tar:
        assert any(name.endswith(".cls") for name in tar.getnames())
    assert open_source(place / "train", "tar").describe()["kind"] == "tar"
    with pytest.raises(ValueError, match=r"holds no files \*\.zip, which the format zip wants"):
        open_source(place, "zip")
    with pytest.raises(ValueError, match="format is 'rar'; it must be one of auto, folders"):
        open_source(place, "rar")
    with pytest.raises(ValueError, match="is read as folders, which has no setting 'label'"):
        open_source(faces, label="x")


def test_what_is_unknown_or_not_there_is_refused(tmp_path):
    (tmp_path / "a.doc").write_text("text")
    with pytest.raises(ValueError, match=r"a\.doc is of no kind that we know: name it with --format, one of folders"):
        open_source(tmp_path / "a.doc")
    with pytest.raises(ValueError, match="none is not there"):
        open_source(tmp_path / "none")
    assert set(WAYS) | {"auto", "recordio", "bin"} == set(FORMATS)
