import tarfile

from data_shards.tar_members import Member, dali_index, header_name, split_name


def test_dali_index_by_hand():
    sample = (Member("jpg", 512, 700, "a/1.jpg"), Member("cls", 2048, 1, "a/1.cls"))
    assert dali_index([sample]) == b"v1.2 1\njpg 512 700 a/1.jpg cls 2048 1 a/1.cls\n"


def test_names_by_hand():
    assert split_name("a.b/c.d.jpg") == ("a.b/c", "d.jpg")
    assert split_name("c.jpg") == ("c", "jpg")
    assert header_name(bytes(512)) is None
    assert header_name(tarfile.TarInfo("a/1.jpg").tobuf(tarfile.USTAR_FORMAT)) == "a/1.jpg"
    assert header_name(tarfile.TarInfo("a/1.jpg").tobuf(tarfile.GNU_FORMAT)) is None
