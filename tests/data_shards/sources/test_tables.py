import io
import os
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import ipc, parquet

from data_shards.sources.base import Place
from data_shards.sources.tables import Tables, has_pictures

WRITE = """
import sys
import datasets
folder, kind = sys.argv[1:]
names = ["ann", "bob"]
pictures = [{"bytes": open(f"{folder}/{n}.jpg", "rb").read(), "path": f"{n}.jpg"} for n in range(6)]
label = datasets.ClassLabel(names=names) if kind != "plain" else datasets.Value("int64")
features = datasets.Features({"image": datasets.Image(), "label": label})
data = datasets.Dataset.from_dict({"image": pictures, "label": [n // 3 for n in range(6)]}, features=features)
data.to_parquet(f"{folder}/train-00000.parquet", batch_size=2)
data.save_to_disk(f"{folder}/saved")
"""


def jpeg(number):
    buffer = io.BytesIO()
    Image.new("L", (8, 6), number * 20).save(buffer, "JPEG")
    return buffer.getvalue()


def written_by_datasets(folder, kind):
    for number in range(6):
        (folder / f"{number}.jpg").write_bytes(jpeg(number))
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "cache")}
    subprocess.run([sys.executable, "-c", WRITE, str(folder), kind], env=environment, capture_output=True, check=True)


def contents(source):
    found = list(source.pictures())
    reader = source.open()
    order = np.random.default_rng(1).permutation(len(found))
    data = {
        row: reader.read(Place(found[row].name, found[row].part, found[row].offset, found[row].size)) for row in order
    }
    reader.close()
    return found, [data[row] for row in range(len(found))]


@pytest.mark.parametrize("kind", ["classes", "plain"])
def test_what_datasets_writes_as_parquet_and_arrow(tmp_path, kind):
    written_by_datasets(tmp_path, kind)
    names = ["ann", "bob"] if kind == "classes" else ["0000000", "0000001"]
    (arrow,) = (tmp_path / "saved").glob("*.arrow")
    for path in (tmp_path / "train-00000.parquet", arrow):
        source = Tables((str(path),))
        found, data = contents(source)
        assert data == [jpeg(n) for n in range(6)]
        assert [(f.identity, f.name, f.stem, f.size, f.extension) for f in found] == [
            (names[n // 3], f"{path.name} row {n}", str(n), len(jpeg(n)), "jpg") for n in range(6)
        ]
        assert source.streams == (path.suffix == ".parquet")
    assert has_pictures(str(tmp_path / "train-00000.parquet"))


def test_plain_binary_columns_names_as_labels_and_several_files(tmp_path):
    for part in range(2):
        table = pa.table({"img": [jpeg(part), jpeg(part + 2)], "identity": ["Ann Lee", f"p{part}"], "n": [1, 2]})
        parquet.write_table(table, tmp_path / f"{part}.parquet", row_group_size=1)
    found, data = contents(Tables((str(tmp_path / "0.parquet"), str(tmp_path / "1.parquet"))))
    assert [(f.identity, f.name, f.stem) for f in found] == [
        ("Ann Lee", "0.parquet row 0", "00000-00000000"),
        ("p0", "0.parquet row 1", "00000-00000001"),
        ("Ann Lee", "1.parquet row 0", "00001-00000000"),
        ("p1", "1.parquet row 1", "00001-00000001"),
    ]
    assert data == [jpeg(0), jpeg(2), jpeg(1), jpeg(3)]


def test_arrow_files_of_the_other_kind(tmp_path):
    table = pa.table({"image": [jpeg(1), jpeg(2)], "label": [4, 5]})
    with ipc.new_file(str(tmp_path / "a.arrow"), table.schema) as writer:
        writer.write_table(table)
    found, data = contents(Tables((str(tmp_path / "a.arrow"),)))
    assert [f.identity for f in found] == ["0000004", "0000005"]
    assert data == [jpeg(1), jpeg(2)]


def test_rows_that_cannot_be_used_are_refused_alone(tmp_path):
    struct = [
        {"bytes": jpeg(1), "path": None},
        {"bytes": None, "path": "/elsewhere/1.jpg"},
        {"bytes": b"text", "path": None},
        {"bytes": b"", "path": None},
        {"bytes": jpeg(2), "path": "x.PNG"},
        {"bytes": jpeg(3), "path": None},
        None,
    ]
    parquet.write_table(pa.table({"image": struct, "label": [0, 0, 0, 0, 0, None, 0]}), tmp_path / "a.parquet")
    assert [(f.extension, f.refused) for f in Tables((str(tmp_path / "a.parquet"),)).pictures()] == [
        ("jpg", ""),
        ("", "has no bytes (only a path)"),
        ("", "is no JPEG, PNG, PGM, BMP or WebP by its first bytes"),
        ("", "is empty"),
        ("png", ""),
        ("jpg", "has the label None: allowed are names and numbers from 0"),
        ("", "has no bytes"),
    ]


@pytest.mark.parametrize(
    ("columns", "settings", "message"),
    [
        ({"a": [1], "label": [1]}, {}, "has the columns a, label: name that of the pictures with --image-column"),
        (
            {"image": [b"x"], "who": ["a"]},
            {},
            "has the columns image, who: name that of the labels with --label-column",
        ),
        ({"image": [b"x"], "img": [b"x"], "label": [1]}, {}, "name that of the pictures"),
        ({"image": [b"x"], "label": [1]}, {"label": "none"}, "name that of the labels"),
    ],
)
def test_columns_that_are_not_clear_are_asked_for(tmp_path, columns, settings, message):
    parquet.write_table(pa.table(columns), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=message):
        list(Tables((str(tmp_path / "a.parquet"),), **settings).pictures())


def test_named_columns(tmp_path):
    parquet.write_table(pa.table({"blob": [jpeg(1)], "who": ["ann"]}), tmp_path / "a.parquet")
    (found,) = Tables((str(tmp_path / "a.parquet"),), image="blob", label="who").pictures()
    assert found.identity == "ann"


def test_damaged_files_are_refused_in_one_line(tmp_path):
    table = pa.table({"image": [jpeg(n % 12) for n in range(300)], "label": list(range(300))})
    parquet.write_table(table, tmp_path / "a.parquet")
    with ipc.new_stream(str(tmp_path / "a.arrow"), table.schema) as writer:
        writer.write_table(table)
    for path in (tmp_path / "a.parquet", tmp_path / "a.arrow"):
        whole = path.read_bytes()
        for keep in np.linspace(0, len(whole) - 9, 15).astype(int):
            path.write_bytes(whole[:keep])
            with pytest.raises(ValueError, match=r"source .*a\.(parquet|arrow) is") as caught:
                list(Tables((str(path),)).pictures())
            assert "\n" not in str(caught.value)
    assert not has_pictures(str(tmp_path / "a.parquet"))
