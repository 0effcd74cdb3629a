import io
import json
import tarfile

import pytest
import webdataset

from data_shards.sources.base import Place
from data_shards.sources.webdataset import WebDatasetShards, looks_like_webdataset


def write(path, samples):
    with webdataset.TarWriter(str(path)) as writer:
        for sample in samples:
            writer.write(sample)
    return str(path)


def listed(source):
    reader = source.open()
    found = {
        picture.name: (picture.identity, picture.stem, picture.refused)
        if picture.refused
        else (
            picture.identity,
            picture.stem,
            reader.read(Place(picture.name, picture.part, picture.offset, picture.size)),
        )
        for picture in source.pictures()
    }
    reader.close()
    return found


def test_labels_from_cls(tmp_path):
    path = write(tmp_path / "0.tar", [{"__key__": f"s{n}", "jpg": b"picture %d" % n, "cls": n // 2} for n in range(4)])
    assert looks_like_webdataset(path)
    assert listed(WebDatasetShards((path,))) == {
        f"0.tar/s{n}.jpg": (f"{n // 2:07d}", f"s{n}", b"picture %d" % n) for n in range(4)
    }


def test_labels_from_json_by_the_usual_names_or_a_named_field(tmp_path):
    samples = [{"__key__": f"s{n}", "png": b"p%d" % n, "json": {"label": f"ann{n}", "who": n + 7}} for n in range(2)]
    path = write(tmp_path / "0.tar", samples)
    assert [who for who, _, _ in listed(WebDatasetShards((path,))).values()] == ["ann0", "ann1"]
    assert [who for who, _, _ in listed(WebDatasetShards((path,), "json:who")).values()] == ["0000007", "0000008"]
    refused = {text for _, _, text in listed(WebDatasetShards((path,), "json:none")).values()}
    assert refused == {"has no label (.cls or .json)"}
    with pytest.raises(ValueError, match="label is 'who': of WebDataset shards it must be json:FIELD"):
        list(WebDatasetShards((path,), "who").pictures())


def test_the_folder_of_the_key_is_the_identity(tmp_path):
    path = write(tmp_path / "0.tar", [{"__key__": "ann/001", "jpg": b"x", "cls": 5}])
    assert listed(WebDatasetShards((path,))) == {"0.tar/ann/001.jpg": ("ann", "001", b"x")}


def test_what_is_no_sample_is_refused_with_a_reason_or_passed_over(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name, data in (
            ("a.jpg", b"1"),
            ("a.cls", b"3"),
            ("b.jpg", b"2"),
            ("c.txt", b"no picture"),
            ("d.jpg", b"4"),
            ("d.png", b"5"),
            ("d.cls", b"6"),
            ("e.jpg", b"7"),
            ("e.json", b"{broken"),
            ("f.jpg", b"8"),
            ("f.pyd", b"cos\nsystem\n(S'touch canary'\ntR."),
            ("g/../h.jpg", b"9"),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    assert listed(WebDatasetShards((str(tmp_path / "0.tar"),))) == {
        "0.tar/a.jpg": ("0000003", "a", b"1"),
        "0.tar/b.jpg": ("", "b", "has no label (.cls or .json)"),
        "0.tar/d.jpg": ("0000006", "d", b"4"),
        "0.tar/d.png": ("0000006", "d", "is a second picture of its sample"),
        "0.tar/e.jpg": ("", "e", "has no label (.cls or .json)"),
        "0.tar/f.jpg": ("", "f", "has no label (.cls or .json)"),
        "0.tar/g/../h.jpg": ("..", "h", "has '..' in its path"),
    }


def test_a_tar_of_folders_is_no_webdataset(tmp_path):
    path = write(tmp_path / "0.tar", [{"__key__": f"ann/{n}", "jpg": b"x"} for n in range(3)])
    assert not looks_like_webdataset(path)


def test_a_tar_cut_short_says_so(tmp_path):
    path = write(tmp_path / "0.tar", [{"__key__": f"a/{n}", "jpg": bytes(2000), "cls": 1} for n in range(9)])
    data = (tmp_path / "0.tar").read_bytes()
    (tmp_path / "0.tar").write_bytes(data[:12_000])
    found = list(WebDatasetShards((path,)).pictures())
    assert found[-1].refused.startswith("is cut short or damaged behind a/")
    assert json.dumps(found[-1].refused)
