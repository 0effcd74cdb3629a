import pickle

import numpy as np
import pytest

from data_shards.sources import insightface_bin
from data_shards.sources.base import Place
from data_shards.sources.insightface_bin import InsightFaceBin


def jpeg(number):
    return b"\xff\xd8\xff\xe0 picture " + str(number).encode()


def write(path, pictures, same, protocol=pickle.HIGHEST_PROTOCOL):
    insightface_bin._load.cache_clear()
    with open(path, "wb") as file:  # as insightface's lfw2pack.py does
        pickle.dump((pictures, same), file, protocol=protocol)
    return InsightFaceBin(str(path))


@pytest.fixture(autouse=True)
def forget():
    yield
    insightface_bin._load.cache_clear()


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
    "make", [bytes, lambda data: np.frombuffer(data, np.uint8), bytearray], ids=["bytes", "array", "bytearray"]
)
def test_every_protocol_and_kind_of_bytes(tmp_path, protocol, make):
    source = write(tmp_path / "lfw.bin", [make(jpeg(n)) for n in range(6)], [True, False, True], protocol)
    found = list(source.pictures())
    assert [(f.identity, f.name, f.stem, f.extension, f.refused) for f in found] == [
        (f"{identity:06d}", f"lfw.bin image {n}", f"{n:06d}", "jpg", "")
        for n, identity in enumerate((0, 0, 2, 3, 4, 4))
    ]
    reader = source.open()
    assert [reader.read(Place(f.name, f.part, f.offset, f.size)) for f in found] == [jpeg(n) for n in range(6)]
    reader.close()


def test_python_2_pickles_with_numpy_truth_values(tmp_path):
    path = tmp_path / "lfw.bin"
    # (['\xff\xd8\xff..', ...], [True, False]) as Python 2's protocol 2 writes str: SHORT_BINSTRING
    strings = b"".join(b"U" + bytes([len(jpeg(n))]) + jpeg(n) for n in range(4))
    path.write_bytes(b"\x80\x02(](" + strings + b"e](\x88\x89et.")
    found = list(InsightFaceBin(str(path)).pictures())
    assert [f.identity for f in found] == ["000000", "000000", "000002", "000003"]
    source = write(path, [jpeg(0), jpeg(1)], [np.True_])
    assert [f.identity for f in source.pictures()] == ["000000", "000000"]


def test_pictures_that_return_join_their_pairs(tmp_path):
    a, b, c, d, e = map(jpeg, range(5))
    source = write(tmp_path / "lfw.bin", [a, b, b, c, a, d, d, e], [True, True, False, False])
    assert [f.identity for f in source.pictures()] == ["000000"] * 5 + ["000005", "000005", "000007"]
    assert list(source.pairs()) == [
        ("lfw.bin image 0", "lfw.bin image 1", True),
        ("lfw.bin image 2", "lfw.bin image 3", True),
        ("lfw.bin image 4", "lfw.bin image 5", False),
        ("lfw.bin image 6", "lfw.bin image 7", False),
    ]


class Runs:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def hostile(canary):
    import codecs
    import os
    import subprocess

    command = f"touch {canary}"
    yield Runs(os.system, command)
    yield Runs(eval, f"__import__('os').system('{command}')")
    yield Runs(exec, f"import os; os.system('{command}')")
    yield Runs(subprocess.check_output, ["touch", str(canary)])
    yield Runs(getattr, "", "join")
    yield Runs(open, str(canary), "w")
    yield Runs(codecs.encode, "abc", "rot13")
    yield Runs(np.load, str(canary))
    yield Runs(np.fromfile, str(canary))
    yield Runs(bytes, 10**12)
    yield Runs(bytearray, 10**12)
    yield Runs(np.dtype, "O")
    yield np.array([object()], dtype=object)


def test_a_hostile_pickle_is_refused_and_runs_nothing(tmp_path):
    canary, refused = tmp_path / "canary", 0
    for number, thing in enumerate(hostile(canary)):
        for protocol in (0, 2, 4):
            path = tmp_path / f"{number}-{protocol}.bin"
            try:
                source = write(path, [thing, jpeg(1)], [True], protocol)
            except (pickle.PicklingError, AttributeError, TypeError):
                continue
            reader = source.open()
            for action in (lambda s=source: list(s.pictures()), lambda r=reader: r.read(Place("x", 0, 0, 1))):
                with pytest.raises(
                    ValueError, match=r"is refused or no verification set|is no encoded picture"
                ) as caught:
                    action()
                assert "\n" not in str(caught.value)
                refused += 1
            reader.close()
    assert not canary.exists()
    assert refused > 60


@pytest.mark.parametrize(
    "raw",
    [
        b"cos\nsystem\n(S'touch CANARY'\ntR.",
        b"cposix\nsystem\n(S'touch CANARY'\ntR.",
        b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93\x8c\x011\x85R.",
        b"\x80\x02\x82\x01.",  # a code of copyreg's registry
        b"Ppersistent\n.",
        b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f.",
        b"",
        b"no pickle",
        b"\x80\x04N.",
        b"\x80\x04]\x94.",
    ],
)
def test_raw_opcodes_are_refused_in_one_line(tmp_path, monkeypatch, raw):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.bin").write_bytes(raw)
    with pytest.raises(ValueError, match=r"source .*a\.bin is (refused or )?no") as caught:
        list(InsightFaceBin(str(tmp_path / "a.bin")).pictures())
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "CANARY").exists()


def test_a_set_whose_lists_do_not_fit_is_refused(tmp_path):
    source = write(tmp_path / "a.bin", [jpeg(0)] * 5, [True, False])
    with pytest.raises(ValueError, match="holds 5 pictures and 2 pairs, two pictures make a pair"):
        list(source.pictures())


def test_what_is_no_picture_is_refused_alone(tmp_path):
    source = write(tmp_path / "a.bin", [jpeg(0), b"text", jpeg(2), 7], [False, False])
    assert [f.refused for f in source.pictures()] == [
        "",
        "is no JPEG, PNG, PGM, BMP or WebP by its first bytes",
        "",
        "is no encoded picture but of the type int",
    ]


def test_a_truncated_set_is_refused(tmp_path):
    write(tmp_path / "a.bin", [jpeg(n) for n in range(20)], [True] * 10)
    whole = (tmp_path / "a.bin").read_bytes()
    for keep in range(1, len(whole), 37):
        insightface_bin._load.cache_clear()
        (tmp_path / "a.bin").write_bytes(whole[:keep])
        with pytest.raises(ValueError, match="is refused or no verification set"):
            list(InsightFaceBin(str(tmp_path / "a.bin")).pictures())
