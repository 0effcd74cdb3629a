import io
import os
import shutil
import subprocess
import tarfile
import tracemalloc
import zipfile

import numpy as np
import pytest

from data_shards.sources.archives import GzipTarArchive, TarArchive, ZipArchive, archive_kind
from data_shards.sources.base import Place


def tree(root, identities=4, images=5, size=3000):
    """Folders of incompressible files; the sources do not look into them."""
    random = np.random.default_rng(1)
    for identity in range(identities):
        folder = root / f"part{identity % 2}" / f"id {identity}"
        folder.mkdir(parents=True)
        for image in range(images):
            (folder / f"{image}.a.jpg").write_bytes(random.bytes(size + image))
        (folder / "notes.txt").write_text("no picture")
        (folder / ".hidden.jpg").write_text("no picture")
    return root


def content(source):
    """{name: (identity, stem, bytes)} of every picture, read in a random order."""
    found = list(source.pictures())
    assert not any(picture.refused for picture in found), found
    reader = source.open()
    order = np.random.default_rng(2).permutation(len(found))
    read = {
        row: reader.read(Place(found[row].name, found[row].part, found[row].offset, found[row].size)) for row in order
    }
    reader.close()
    return {picture.name: (picture.identity, picture.stem, read[row]) for row, picture in enumerate(found)}


def expected(root, archive):
    return {
        f"{archive}/{path.relative_to(root)}": (path.parent.name, path.stem, path.read_bytes())
        for path in root.rglob("*.jpg")
        if not path.name.startswith(".")
    }


@pytest.mark.parametrize("format", ["gnu", "pax", "ustar", "v7"])
def test_tar_as_gnu_tar_writes_it(tmp_path, format):
    root = tree(tmp_path / "in")
    command = ["tar", f"--format={format}", "-cf", tmp_path / "a.tar", "-C", root, "part0", "part1"]
    subprocess.run(command, check=True)
    source = TarArchive((str(tmp_path / "a.tar"),))
    assert archive_kind(str(tmp_path / "a.tar")) == "tar"
    assert content(source) == expected(root, "a.tar")


def test_tar_gz_as_gnu_tar_writes_it_read_at_random(tmp_path):
    root = tree(tmp_path / "in", images=20, size=200_000)  # 16 MB: several points to read on from
    subprocess.run(["tar", "-czf", tmp_path / "a.tgz", "-C", root, "part0", "part1"], check=True)
    source = GzipTarArchive((str(tmp_path / "a.tgz"),))
    assert archive_kind(str(tmp_path / "a.tgz")) == "tar.gz"
    assert content(source) == expected(root, "a.tgz")


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("seekable", [True, False])
def test_zip_as_python_writes_it(tmp_path, method, seekable):
    root = tree(tmp_path / "in")

    class Unseekable(io.FileIO):  # sizes and checksums then follow the data
        def seekable(self):
            return False

        def seek(self, *_):
            raise OSError

    kind = io.FileIO if seekable else Unseekable
    with kind(tmp_path / "a.zip", "w") as out, zipfile.ZipFile(out, "w", method) as archive:
        for path in sorted(root.rglob("*")):
            if path.is_file():
                archive.write(path, path.relative_to(root))
    assert archive_kind(str(tmp_path / "a.zip")) == "zip"
    assert content(ZipArchive((str(tmp_path / "a.zip"),))) == expected(root, "a.zip")


@pytest.mark.skipif(not shutil.which("zip"), reason="there is no zip program here")
def test_zip_as_info_zip_writes_it(tmp_path):
    root = tree(tmp_path / "in")
    subprocess.run(["zip", "-qr", tmp_path / "a.zip", "."], cwd=root, check=True)
    assert content(ZipArchive((str(tmp_path / "a.zip"),))) == expected(root, "a.zip")


def test_several_archives_are_one_source(tmp_path):
    root = tree(tmp_path / "in")
    for part in ("part0", "part1"):
        subprocess.run(["tar", "-cf", tmp_path / f"{part}.tar", "-C", root / part, "."], check=True)
    source = TarArchive((str(tmp_path / "part0.tar"), str(tmp_path / "part1.tar")))
    found = content(source)
    assert len(found) == 20
    assert {identity for identity, _, _ in found.values()} == {f"id {number}" for number in range(4)}


def member(tar, name, data=b"picture", **more):
    info = tarfile.TarInfo(name)
    info.size = len(data) if not more else 0
    for field, value in more.items():
        setattr(info, field, value)
    tar.addfile(info, io.BytesIO(data) if not more else None)


@pytest.mark.parametrize("kind", [TarArchive, GzipTarArchive])
def test_what_an_archive_must_not_hold_is_refused_and_nothing_appears(tmp_path, kind):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w:gz" if kind is GzipTarArchive else "w") as tar:
        member(tar, "a/good.jpg")
        member(tar, "/etc/absolute.jpg")
        member(tar, "a/../../up.jpg")
        member(tar, "a/soft.jpg", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        member(tar, "a/hard.jpg", type=tarfile.LNKTYPE, linkname="a/good.jpg")
        member(tar, "a/device.jpg", type=tarfile.CHRTYPE)
        member(tar, "a/pipe.jpg", type=tarfile.FIFOTYPE)
        member(tar, "loose.jpg")
        member(tar, "a/good.jpg", b"again")
    found = list(kind((str(path),)).pictures())
    assert [(picture.name, picture.refused) for picture in found] == [
        ("a.tar/a/good.jpg", ""),
        ("a.tar//etc/absolute.jpg", "has an absolute path"),
        ("a.tar/a/../../up.jpg", "has '..' in its path"),
        ("a.tar/a/soft.jpg", "is a symbolic link in the archive"),
        ("a.tar/a/hard.jpg", "is a hard link in the archive"),
        ("a.tar/a/device.jpg", "is no regular file in the archive"),
        ("a.tar/a/pipe.jpg", "is no regular file in the archive"),
        ("a.tar/loose.jpg", "lies in no identity's folder"),
        ("a.tar/a/good.jpg (2)", ""),
    ]
    assert os.listdir(tmp_path) == ["a.tar"]


def test_what_a_zip_must_not_hold_is_refused(tmp_path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/good.jpg", b"picture")
        archive.writestr("../up.jpg", b"x")
        archive.writestr("a/bzip2.jpg", b"x", zipfile.ZIP_BZIP2)
        link = zipfile.ZipInfo("a/link.jpg")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
    found = [(picture.name, picture.refused) for picture in ZipArchive((str(path),)).pictures()]
    assert found == [
        ("a.zip/a/good.jpg", ""),
        ("a.zip/../up.jpg", "has '..' in its path"),
        ("a.zip/a/bzip2.jpg", "is compressed by method 12: allowed are stored and deflated"),
        ("a.zip/a/link.jpg", "is no regular file in the archive"),
    ]


def test_a_zip_bomb_never_grows_beyond_what_is_listed(tmp_path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/bomb.jpg", bytes(50_000_000))
    data = path.read_bytes()
    size = (50_000_000).to_bytes(4, "little")
    path.write_bytes(data.replace(size, (1000).to_bytes(4, "little")))  # it says that it is small
    (found,) = ZipArchive((str(path),)).pictures()
    reader = ZipArchive((str(path),)).open()
    tracemalloc.start()
    with pytest.raises(ValueError, match="is damaged: it is larger than the 1,000 bytes that the archive lists"):
        reader.read(Place(found.name, found.part, found.offset, found.size))
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()
    reader.close()


def test_a_flipped_bit_in_a_zip_is_found(tmp_path):
    root = tree(tmp_path / "in", identities=1, images=1)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.write(root / "part0" / "id 0" / "0.a.jpg", "id/0.jpg")
    data = bytearray((tmp_path / "a.zip").read_bytes())
    data[1000] ^= 4
    (tmp_path / "a.zip").write_bytes(data)
    source = ZipArchive((str(tmp_path / "a.zip"),))
    (found,) = source.pictures()
    reader = source.open()
    with pytest.raises(ValueError, match="is damaged: its checksum in the archive differs"):
        reader.read(Place(found.name, found.part, found.offset, found.size))
    reader.close()


@pytest.mark.parametrize(("kind", "option"), [(TarArchive, "-cf"), (GzipTarArchive, "-czf")])
def test_an_archive_cut_short_says_so_and_keeps_what_is_before(tmp_path, kind, option):
    root = tree(tmp_path / "in")
    subprocess.run(["tar", option, tmp_path / "a.tar", "-C", root, "part0", "part1"], check=True)
    whole = (tmp_path / "a.tar").read_bytes()
    names = [picture.name for picture in kind((str(tmp_path / "a.tar"),)).pictures()]
    end = len(whole.rstrip(b"\0")) if kind is TarArchive else len(whole)
    for keep in np.linspace(1, end - 60, 25).astype(int):
        (tmp_path / "a.tar").write_bytes(whole[:keep])
        source = kind((str(tmp_path / "a.tar"),))
        found = _listed(source)
        if not found:
            continue
        assert found[-1].refused, f"{keep} of {len(whole)} bytes pass for whole"
        assert [picture.name for picture in found[:-1]] == names[: len(found) - 1]


def _listed(source):
    try:
        return list(source.pictures())
    except ValueError as error:
        return [] if "\n" not in str(error) else pytest.fail(str(error))


def test_what_is_no_archive_is_refused_in_one_line(tmp_path):
    (tmp_path / "a.zip").write_bytes(b"PK\x03\x04 and no more")
    (tmp_path / "a.tar").write_bytes(b"x" * 2000)
    (tmp_path / "a.tar.gz").write_bytes(b"\x1f\x8b\x08" + b"x" * 2000)
    (tmp_path / "a.tar.bz2").write_bytes(b"BZh9" + b"x" * 2000)
    for kind, name in ((ZipArchive, "a.zip"), (TarArchive, "a.tar"), (GzipTarArchive, "a.tar.gz")):
        with pytest.raises(ValueError, match=f"source .*{name} is no whole") as caught:
            list(kind((str(tmp_path / name),)).pictures())
        assert "\n" not in str(caught.value)
    with pytest.raises(
        ValueError, match=r"is compressed in a way that we do not read: allowed are tar, tar\.gz and zip"
    ):
        archive_kind(str(tmp_path / "a.tar.bz2"))
    assert archive_kind(str(tmp_path / "a.tar")) is None


def test_listing_a_tar_keeps_nothing_in_memory(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for number in range(20_000):
            tar.addfile(tarfile.TarInfo(f"id{number // 50}/{number}.jpg"))
    source = TarArchive((str(tmp_path / "a.tar"),))
    tracemalloc.start()
    assert sum(1 for _ in source.pictures()) == 20_000
    assert tracemalloc.get_traced_memory()[1] < 8_000_000
    tracemalloc.stop()
