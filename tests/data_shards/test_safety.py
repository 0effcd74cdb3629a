"""What a conversion opens, writes and starts, as Python's audit events tell it: no more than it must."""

import json
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from collections_on_disk import draw_collection

from data_shards.convert import ConvertConfig, convert

CONVERT = """
import json, os, sys
source, out, watched = sys.argv[1:]
opened, written, started = [], [], []
STARTS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.startfile", "pty.spawn")

def hook(event, args):
    if event in STARTS:
        started.append(event)
    if event != "open" or not isinstance(args[0], (str, bytes, os.PathLike)):
        return
    path = os.path.abspath(os.fsdecode(args[0]))
    if isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        written.append(path)
    elif path.startswith(watched + "/") and not os.path.isdir(path):
        opened.append(path)

sys.addaudithook(hook)
from data_shards.convert import ConvertConfig, convert
convert(source, out, ConvertConfig(workers=1))
print(json.dumps([sorted(set(opened)), sorted(set(written)), started]))
"""


class Runs:
    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


@pytest.fixture
def faces(tmp_path):
    """Pictures among files that a careless reader would load or run."""
    root = draw_collection(tmp_path / "in" / "faces", {"ann": 3, "bob": 3})
    canary = tmp_path / "canary"
    for name, data in {
        "model.pkl": pickle.dumps(Runs(canary)),
        "model.pth": pickle.dumps(Runs(canary)),
        "sitecustomize.py": f"open({str(canary)!r}, 'w')".encode(),
        "run.sh": f"touch {canary}".encode(),
        "config.yaml": f"!!python/object/apply:os.system ['touch {canary}']".encode(),
        "video.gif": b"GIF89a",
        "jpg": b"no extension",
        "x.jpg.txt": b"text",
    }.items():
        (root / "ann" / name).write_bytes(data)
    return root


def as_folders(root):
    return root


def as_zip(root):
    path = root.parent / "faces.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(root.rglob("*.*")):
            archive.write(file, file.relative_to(root))
    return path


def as_tar(root, options="-cf"):
    path = root.parent / "faces.tar"
    subprocess.run(["tar", options, path, "-C", root, "."], check=True)
    return path


def as_tar_gz(root):
    return as_tar(root, "-czf")


def as_shards(root):
    convert(root, root.parent / "set", ConvertConfig(workers=1))
    tar = root.parent / "set" / "train" / "000000.tar"
    member = tar.parent / "ann" / "000.pyd"  # what webdataset's own reader unpickles, behind a key of a picture
    member.parent.mkdir()
    member.write_bytes((root / "ann" / "model.pkl").read_bytes())
    subprocess.run(["tar", "-rf", tar, "-C", tar.parent, "ann/000.pyd"], check=True)
    member.unlink()
    return tar


@pytest.mark.parametrize("way", [as_folders, as_zip, as_tar, as_tar_gz, as_shards])
def test_only_pictures_are_opened_only_the_output_is_written_and_nothing_is_run(faces, tmp_path, way):
    source, out = way(faces), tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-c", CONVERT, str(source), str(out), str(tmp_path / "in")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    opened, written, started = json.loads(done.stdout)
    pictures = sorted(map(str, faces.rglob("*.jpg"))) if way is as_folders else [str(source)]
    assert opened == pictures
    assert len([path for path in written if path.startswith(f"{out}/")]) > 5
    assert [path for path in written if not path.startswith(f"{out}/") and "__pycache__" not in path] == []
    assert started == []
    assert not (tmp_path / "canary").exists()
    assert sorted(Path(out, "train").iterdir())[0].name == "000000.idx"
