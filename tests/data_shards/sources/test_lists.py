import os

import fsspec
import pyarrow as pa
import pytest
from pyarrow import parquet

from data_shards.sources.base import Place
from data_shards.sources.lists import PictureList


@pytest.fixture
def pictures(tmp_path):
    for name in ("a.jpg", "with space.jpg", 'quote".jpg', "comma,.png", "new\nline.jpg", "sub/deep.jpg"):
        path = tmp_path / "pictures" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"picture " + name.encode())
    return tmp_path / "pictures"


def write(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def read_all(source):
    reader = source.open()
    found = {
        f.name: (f.identity, f.stem, f.extension, f.refused or reader.read(Place(f.name, f.part, f.offset, f.size)))
        for f in source.pictures()
    }
    reader.close()
    return found


def test_names_of_every_kind(tmp_path, pictures):
    text = 'identity,path,score\nann,a.jpg,1\n bob ,with space.jpg,1\nann,"quote"".jpg",1\ncy,"comma,.png",2\n'
    text += 'cy,"new\nline.jpg",3\ndan,sub/deep.jpg,4\n'
    source = PictureList(write(tmp_path / "list.csv", text), str(pictures))
    assert read_all(source) == {
        "a.jpg": ("ann", "a", "jpg", b"picture a.jpg"),
        "with space.jpg": ("bob", "with space", "jpg", b"picture with space.jpg"),
        'quote".jpg': ("ann", 'quote"', "jpg", b'picture quote".jpg'),
        "comma,.png": ("cy", "comma,", "png", b"picture comma,.png"),
        "new\nline.jpg": ("cy", "new\nline", "jpg", b"picture new\nline.jpg"),
        "sub/deep.jpg": ("dan", "deep", "jpg", b"picture sub/deep.jpg"),
    }


@pytest.mark.parametrize(
    ("name", "text"), [("l.csv", "a.jpg,ann\n"), ("l.tsv", "a.jpg\tann\n"), ("l.csv", "\ufefffile,person\na.jpg,ann\n")]
)
def test_lists_without_a_header_with_tabs_with_a_byte_order_mark(pictures, name, text):
    source = PictureList(write(pictures / name, text))
    assert read_all(source) == {"a.jpg": ("ann", "a", "jpg", b"picture a.jpg")}


def test_bytes_that_are_no_utf8(pictures):
    with open(os.path.join(os.fsencode(pictures), b"caf\xe9.jpg"), "wb") as file:
        file.write(b"x")
    source = PictureList(write(pictures / "l.csv", b"caf\xe9.jpg,z\xe9\n"))
    assert read_all(source) == {"caf\udce9.jpg": ("z\udce9", "caf\udce9", "jpg", b"x")}


def test_absolute_paths_and_urls(tmp_path, pictures):
    system = fsspec.filesystem("memory")
    system.pipe_file("/faces/u.jpg", b"from afar")
    text = f"path,label\n{pictures}/a.jpg,ann\nmemory://faces/u.jpg,bob\n"
    try:
        assert read_all(PictureList(write(tmp_path / "l.csv", text))) == {
            f"{pictures}/a.jpg": ("ann", "a", "jpg", b"picture a.jpg"),
            "memory://faces/u.jpg": ("bob", "u", "jpg", b"from afar"),
        }
    finally:
        system.rm("/faces", recursive=True)


def test_what_cannot_be_taken_is_refused_with_its_reason(tmp_path, pictures):
    os.mkfifo(pictures / "pipe.jpg")
    (pictures / "folder.jpg").mkdir()
    lines = [
        "path,identity",
        "a.jpg,ann",
        "a.jpg,bob",
        "none.jpg,ann",
        "notes.txt,ann",
        "sub/deep.jpg,",
        "../../x.jpg,ann",
    ]
    lines += ["pipe.jpg,ann", "folder.jpg,ann", f"pipe:touch {tmp_path}/canary.jpg,ann", "ftp://h/x.jpg,ann"]
    found = read_all(PictureList(write(pictures / "l.csv", "\n".join(lines))))
    reasons = {name: value[3] for name, value in found.items() if isinstance(value[3], str)}
    scheme = reasons.pop(f"pipe:touch {tmp_path}/canary.jpg")
    assert "is not a URL that we read or write" in scheme
    assert "is not a URL that we read or write" in reasons.pop("ftp://h/x.jpg")
    assert reasons == {
        "a.jpg (line 3)": "is listed twice (lines 2 and 3)",
        "none.jpg": "cannot be read: No such file or directory",
        "notes.txt": "is no picture by its name",
        "sub/deep.jpg": "has no identity (line 6)",
        "../../x.jpg": "has '..' in its path",
        "pipe.jpg": "is no regular file",
        "folder.jpg": "is no regular file",
    }
    assert not (tmp_path / "canary.jpg").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name,who\na.jpg,b\n", r"has the columns name, who: needed are path\|file\|filename"),
        ("path,identity\na.jpg\n", "line 2: 1 columns, needed are 2"),
        ('path,identity\n"a.jpg,ann\n', "line 2: unexpected end of data"),
        ("path,identity\n" + "x" * 200_000 + ".jpg,a\n", r"line \d: field larger than field limit"),
    ],
)
def test_a_list_that_is_none_is_refused_in_one_line(tmp_path, text, message):
    with pytest.raises(ValueError, match=message) as caught:
        list(PictureList(write(tmp_path / "l.csv", text)).pictures())
    assert "\n" not in str(caught.value)


def test_parquet_lists(pictures):
    table = pa.table({"path": ["a.jpg", "sub/deep.jpg", None], "identity": [7, 8, 9], "more": [1, 2, 3]})
    parquet.write_table(table, pictures / "l.parquet")
    found = read_all(PictureList(str(pictures / "l.parquet")))
    assert found.pop("") == ("0000009", "", "", "is no picture by its name")
    assert found == {
        "a.jpg": ("0000007", "a", "jpg", b"picture a.jpg"),
        "sub/deep.jpg": ("0000008", "deep", "jpg", b"picture sub/deep.jpg"),
    }
    (pictures / "l.parquet").write_bytes(b"PAR1 no table PAR1")
    with pytest.raises(ValueError, match=r"l.parquet is no Parquet file that can be read"):
        list(PictureList(str(pictures / "l.parquet")).pictures())
