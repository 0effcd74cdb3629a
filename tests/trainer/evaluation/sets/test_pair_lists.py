"""LFW's own list, its other format, CSV, and what is wrong with each."""

from pathlib import Path

import pytest

from data_shards.convert import ConvertConfig, convert
from data_shards.index import ShardSet
from data_shards.synthetic import synthesize
from trainer.evaluation.sets.pair_lists import Pair, find_images, folds_of, read_pairs

LFW = Path(__file__).parents[5] / "shared" / "data" / "lfw_pairs.txt"


@pytest.mark.skipif(not LFW.is_file(), reason=f"{LFW} is not here")
def test_lfw_view_2():
    found = read_pairs(LFW)
    assert len(found.pairs) == 6000
    assert found.folds == 10
    assert [sum(pair.same for pair in found.pairs if pair.fold == fold) for fold in range(10)] == [300] * 10
    assert [sum(not pair.same for pair in found.pairs if pair.fold == fold) for fold in range(10)] == [300] * 10
    assert found.pairs[0] == Pair("Abel_Pacheco/Abel_Pacheco_0001", "Abel_Pacheco/Abel_Pacheco_0004", True, 0, 2)
    different = Pair("Abdel_Madi_Shabneh/Abdel_Madi_Shabneh_0001", "Dean_Barker/Dean_Barker_0001", False, 0, 302)
    assert found.pairs[300] == different


def written(folder: Path, text: str) -> Path:
    path = folder / "pairs.txt"
    path.write_text(text)
    return path


def test_lfw_view_1(tmp_path):
    found = read_pairs(written(tmp_path, "2\nA\t1\t2\nB\t3\t4\nA\t1\tB\t1\nA\t2\tC\t10\n"))
    assert [pair.same for pair in found.pairs] == [True, True, False, False]
    assert found.pairs[3].second == "C/C_0010"
    assert found.folds == 1
    assert folds_of(found, otherwise=2).tolist() == [0, 1, 0, 1]


def test_csv(tmp_path):
    found = read_pairs(written(tmp_path, "fold, same ,first,second\n0,1,a/1.jpg,a/2.jpg\n1,FALSE,a/1.jpg,b/1.jpg\n"))
    assert found.pairs == [Pair("a/1.jpg", "a/2.jpg", True, 0, 2), Pair("a/1.jpg", "b/1.jpg", False, 1, 3)]
    assert folds_of(found, otherwise=10).tolist() == [0, 1]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty"),
        ("1\t2\nA\t1\t2\n", r"says 1 x 2 x 2 = 4 pairs in line 1 and has 1; it is cut or not LFW's"),
        ("1\nA\t1\t2\nA\t1\n", r"line 3: 'A\\t1' is neither NAME, N, M nor NAME, N, OTHER, M with tabs between"),
        ("1\nA\t1\tx\nA\t1\tB\t2\n", "line 2: .* is neither NAME"),
        ("a,b\n1,2\n", "line 1 is neither LFW's nor names the column 'first'; a CSV needs first, second, same"),
        ("first,second,same\na,b,perhaps\n", "line 2: same is 'perhaps'; allowed is 1 or 0, true or false"),
        ("first,second,same\na,,1\n", "line 2: first and second must both name an image"),
        ("first,second,same,fold\na,b,1,x\n", "line 2: fold is 'x'; allowed are integers from 0"),
        ("first,second,same\n", "holds no pair"),
    ],
)
def test_a_list_that_is_wrong_says_where(tmp_path, text, said):
    with pytest.raises(ValueError, match=said):
        read_pairs(written(tmp_path, text))


def test_what_is_no_text(tmp_path):
    path = tmp_path / "pairs.bin"
    path.write_bytes(b"\x80\x04\x95\xff")
    with pytest.raises(ValueError, match="is not UTF-8 text"):
        read_pairs(path)
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        read_pairs(tmp_path / "none.txt")


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> ShardSet:
    folder = tmp_path_factory.mktemp("pairs")
    synthesize(folder / "pictures", identities=4, images_per_identity=3, size=32, seed=1)
    convert(folder / "pictures", folder / "shards", ConvertConfig())
    return ShardSet.open(folder / "shards")


def test_images_are_found_by_name(source, tmp_path):
    split = source.split("train")
    keys = [split.key(sample) for sample in range(len(split))]
    list_of = read_pairs(
        written(
            tmp_path, f"first,second,same\n{keys[7]},{keys[2]}.jpg,0\n{keys[2]},{keys[1]},1\n{keys[7]},{keys[6]},1\n"
        )
    )
    ((_, samples),), pairs, kept = find_images(list_of, source)
    assert samples.tolist() == [1, 2, 6, 7], "each image once"
    assert pairs.tolist() == [[3, 1], [1, 0], [3, 2]]
    assert kept.tolist() == [True] * 3


def test_missing_images_are_named(source, tmp_path):
    key = source.split("train").key(0)
    identity = key.rpartition("/")[0]
    text = f"first,second,same\n{key},{identity}/none,1\n{key},nobody/1,0\n"
    with pytest.raises(ValueError, match=f"names 2 images that .* does not have: {identity}/none, nobody/1$"):
        find_images(read_pairs(written(tmp_path, text)), source)
