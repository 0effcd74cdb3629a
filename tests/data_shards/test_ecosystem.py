"""The shards load unchanged with other people's readers."""

import gc
import io
import json
import os
import subprocess
import sys
import tarfile
import warnings
from pathlib import Path

import numpy as np
import pytest
from collections_on_disk import ORL, draw_collection, encoded, needs_orl
from PIL import Image

from data_shards.convert import ConvertConfig, convert
from data_shards.index import ShardSet

ALL_EXTENSIONS = "jpg;png;pgm;bmp;webp"

LOAD_WITH_DATASETS = """
import json, sys
import datasets

cache, mode, *tars = sys.argv[1:]
features = None
if mode == "mixed":
    image = datasets.Image(decode=False)
    features = datasets.Features(
        {"jpg": image, "png": image, "cls": datasets.Value("int64")}
        | {name: datasets.Value("string") for name in ("__key__", "__url__")}
    )
loaded = datasets.load_dataset("webdataset", data_files={"train": tars}, cache_dir=cache, split="train", features=features)
kinds = {name: type(value).__name__ for name, value in loaded.features.items()}
for name, kind in kinds.items():
    if kind == "Image":
        loaded = loaded.cast_column(name, datasets.Image(decode=False))
rows = [
    [row["__key__"], row["cls"], [row[name]["bytes"].hex() for name in kinds if kinds[name] == "Image" and row[name]]]
    for row in loaded
]
print(json.dumps([kinds, rows]))
"""


@pytest.fixture
def jpegs(tmp_path):
    source = draw_collection(tmp_path / "in", {"ann": 5, "bob": 4, "cy": 6})
    convert(source, tmp_path / "out", ConvertConfig(shard_bytes=9_000, workers=1))
    return source, tmp_path / "out"


@pytest.fixture
def mixed(tmp_path):
    source = draw_collection(tmp_path / "in", {"ann": 5, "bob": 4})
    for number in range(7):
        (source / "bob" / f"p{number}.png").write_bytes(encoded(number, ".png"))
    convert(source, tmp_path / "out", ConvertConfig(workers=1))
    return source, tmp_path / "out"


def expected(source: Path) -> dict[str, tuple[int, bytes]]:
    """(label, bytes) of each key, read off the folders; names in these tests need no other key."""
    names = sorted(path.name for path in source.iterdir() if path.is_dir())
    return {
        f"{name}/{path.stem}": (label, path.read_bytes())
        for label, name in enumerate(names)
        for path in (source / name).iterdir()
    }


def train_tars(directory: Path, extension: str | None = None) -> list[Path]:
    split = ShardSet.open(directory).manifest["splits"]["train"]
    return [directory / "train" / s["name"] for s in split["shards"] if extension in (None, s["extension"])]


def load_with_webdataset(directory: Path) -> dict[str, tuple[int, bytes]]:
    import webdataset

    tars = [str(path) for path in train_tars(directory)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # webdataset leaves its tars to the garbage collector
        rows = list(webdataset.WebDataset(tars, shardshuffle=False))
        gc.collect()
    found = {}
    for row in rows:
        (data,) = [value for name, value in row.items() if name in ALL_EXTENSIONS.split(";")]
        found[row["__key__"]] = (int(row["cls"]), data)
    assert len(found) == len(rows)
    return found


def load_with_datasets(tars: list[Path], cache: Path, mode: str = "inferred"):
    """Columns and {key: (label, bytes)} in a process of its own, since `datasets` reads its settings on import."""
    done = subprocess.run(
        [sys.executable, "-c", LOAD_WITH_DATASETS, str(cache), mode, *map(str, tars)],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(cache)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    kinds, rows = json.loads(done.stdout)
    found = {key: (label, bytes.fromhex(data)) for key, label, (data,) in rows}
    assert len(found) == len(rows)
    return kinds, found


def load_with_dali(directory: Path, extensions: str = ALL_EXTENSIONS, decode: bool = False):
    """(label, bytes or RGB pixels) of each sample in the tars' order, by DALI's own reader and our index files."""
    from nvidia.dali import fn, pipeline_def, types

    tars = train_tars(directory)
    count = len(ShardSet.open(directory).split("train"))

    @pipeline_def(batch_size=count, num_threads=2, device_id=None)
    def read():
        images, labels = fn.readers.webdataset(
            paths=[str(path) for path in tars],
            index_paths=[str(path.with_suffix(".idx")) for path in tars],
            ext=[extensions, "cls"],
        )
        return (fn.decoders.image(images, output_type=types.RGB) if decode else images), labels

    pipeline = read()
    pipeline.build()
    images, labels = pipeline.run()
    return [(int(bytes(np.array(label))), np.array(image)) for image, label in zip(images, labels, strict=True)]


def test_webdataset_yields_every_picture_and_label(jpegs):
    source, directory = jpegs
    assert load_with_webdataset(directory) == expected(source)


def test_webdataset_yields_mixed_formats(mixed):
    source, directory = mixed
    assert load_with_webdataset(directory) == expected(source)


def test_datasets_builder_infers_columns_and_yields_every_picture_and_label(jpegs, tmp_path):
    source, directory = jpegs
    kinds, found = load_with_datasets(train_tars(directory), tmp_path / "cache")
    assert kinds == {"jpg": "Image", "cls": "Value", "__key__": "Value", "__url__": "Value"}
    assert found == expected(source)


def test_datasets_builder_takes_mixed_formats_one_extension_at_a_time(mixed, tmp_path):
    source, directory = mixed
    found = {}
    for extension, other in (("jpg", "png"), ("png", "jpg")):
        kinds, rows = load_with_datasets(train_tars(directory, extension), tmp_path / "cache")
        assert extension in kinds
        assert other not in kinds
        found |= rows
    assert found == expected(source)


def test_datasets_builder_takes_mixed_formats_at_once_when_told_the_columns(mixed, tmp_path):
    source, directory = mixed
    _, found = load_with_datasets(train_tars(directory), tmp_path / "cache", mode="mixed")
    assert found == expected(source)


@pytest.mark.parametrize("collection", ["jpegs", "mixed"])
def test_dali_reads_every_picture_and_label_with_our_index(collection, request):
    source, directory = request.getfixturevalue(collection)
    rows = load_with_dali(directory)
    assert sorted((label, image.tobytes()) for label, image in rows) == sorted(expected(source).values())


@needs_orl
def test_orl_faces_load_with_all_three(tmp_path):
    directory = tmp_path / "out"
    convert(ORL, directory, ConvertConfig(shard_bytes=10**6, workers=1))
    names = sorted(path.name for path in ORL.iterdir() if path.is_dir())
    faces = {
        f"{name}/{path.stem}": (label, path.read_bytes())
        for label, name in enumerate(names)
        for path in (ORL / name).glob("*.pgm")
    }
    assert len(faces) == 400
    assert load_with_webdataset(directory) == faces
    assert load_with_datasets(train_tars(directory), tmp_path / "cache")[1] == faces
    decoded = load_with_dali(directory, "pgm", decode=True)
    pixels = {
        (label, np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).tobytes()) for label, data in faces.values()
    }
    assert {(label, image.tobytes()) for label, image in decoded} == pixels


def test_wids_lists_every_shard_with_its_samples_and_bytes(jpegs):
    """What `wids.ShardListDataset` (webdataset 0.2; no longer in 1.0) reads: tried with it by hand, it gives every picture."""
    _, directory = jpegs
    listed = json.loads((directory / "train" / "wids.json").read_text())
    assert {name: listed[name] for name in ("__kind__", "wids_version", "name")} == {
        "__kind__": "wids-shard-index-v1",
        "wids_version": 1,
        "name": "train",
    }
    found = []
    for path in sorted((directory / "train").glob("*.tar")):
        with tarfile.open(path) as tar:
            pictures = sum(name.endswith(".jpg") for name in tar.getnames())
        found.append({"url": path.name, "nsamples": pictures, "filesize": path.stat().st_size})
    assert len(found) > 2
    assert listed["shardlist"] == found


def owners_of_batches(directory, size):
    """The identities of each batch of so many samples in a row, streamed by webdataset."""
    labels = [label for label, _ in load_with_webdataset(directory).values()]
    return [labels[start : start + size] for start in range(0, len(labels) - size + 1, size)]


def test_plain_streaming_gives_p_times_k_batches(tmp_path):
    """P x K = 8 x 4 off the tars in a row: 7 identities of 20 images (5 groups of 4) and 33 of 4 to 11, in 4 shards."""
    source = draw_collection(tmp_path / "in", {f"id{n:02d}": 20 if n < 7 else 4 + n % 8 for n in range(40)})
    shares = {}
    for order in ("groups", "random"):
        convert(source, tmp_path / order, ConvertConfig(workers=1, order=order, shard_bytes=256_000))
        assert len(train_tars(tmp_path / order)) > 2
        batches = owners_of_batches(tmp_path / order, 32)
        positives = [sum(batch.count(owner) > 1 for owner in batch) / len(batch) for batch in batches]
        shares[order] = np.mean(positives), min(len(set(batch)) for batch in batches)
    (with_positive, identities), (mixed, _) = shares["groups"], shares["random"]
    assert with_positive > 0.9
    assert mixed < 0.6
    assert identities >= 7
