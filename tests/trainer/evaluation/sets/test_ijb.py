"""IJB-B and IJB-C from a folder in the distribution's layout, against loops over templates as its authors describe them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score, roc_curve

from data_shards.index import ShardSet
from data_shards.loader import LoaderConfig
from data_shards.transform import TEMPLATE
from tests.trainer.evaluation.sets.ijb_folder import Miniature, write_ijb
from trainer.evaluation.embed import embed, raw_pixels
from trainer.evaluation.sets import templates
from trainer.evaluation.sets.judge import SetsConfig, judge_sets

CONFIG = LoaderConfig(image_size=112, decode_threads=1)
SMALL = LoaderConfig(image_size=16, decode_threads=1)


def pixels(split, samples):
    return embed(raw_pixels, split, SMALL, samples=samples)


def judge(folder, work, **settings):
    sets = SetsConfig(ijb=(folder,), **({"ijb_ranks": (1, 2)} | settings))
    embedders = [("raw pixels", pixels)]
    return judge_sets(sets, None, embedders, work=work, image_size=112, margin=0.2, squared=False)[0]


@pytest.fixture(scope="module")
def mini(tmp_path_factory) -> Miniature:
    return write_ijb(tmp_path_factory.mktemp("ijb") / "IJBC")


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("work")


def vectors(mini: Miniature, work: Path, weighted: bool) -> dict[int, np.ndarray]:
    """Each template's vector, one image after the other."""
    (folder,) = (path.parent for path in work.glob("*/manifest.json"))
    split = ShardSet.open(folder).split("unseen_identities")
    embedding = {split.key(n): vector for n, vector in enumerate(pixels(split, None)[0].double().numpy())}
    found = {}
    for template, images in mini.templates.items():
        media = {}
        for name, medium, score in images:
            vector = embedding[f"{template}/{name.removesuffix('.jpg')}"]
            media.setdefault(medium, []).append(vector * score if weighted else vector)
        total = sum(np.mean(frames, axis=0) for frames in media.values())
        found[template] = total / np.linalg.norm(total)
    return found


@pytest.mark.parametrize("weighted", [False, True])
def test_against_loops_and_scikit_learn(mini, work, weighted):
    row = judge(mini.folder, work, ijb_detector_scores=weighted, ijb_fars=(0.2, 1e-6), ijb_fpirs=(0.5,))
    assert row.set == "IJB-C"
    found, of = row.result.scalars, vectors(mini, work, weighted)
    same = np.array([label for _, _, label in mini.pairs])
    scores = np.array([of[a] @ of[b] for a, b, _ in mini.pairs])
    assert found["auc"] == pytest.approx(roc_auc_score(same, scores), abs=1e-6)
    far, tar, _ = roc_curve(same, scores, drop_intermediate=False)
    assert found["tar_at_far"][0]["tar"] == pytest.approx(tar[np.flatnonzero(far <= 0.2)[-1]])
    assert found["tar_at_far"][1]["tar"] is None
    assert (found["genuine_pairs"], found["impostor_pairs"]) == (16, 112)
    assert (found["samples"], found["templates"]) == (56, 24)
    for place, (name, listed) in enumerate(mini.galleries.items()):
        check_gallery(found["identification"][place], name, listed, mini.probes, of)
    union = [entry for listed in mini.galleries.values() for entry in listed]
    check_gallery(found["identification"][2] | {"nonmated": 0}, "all", union, mini.probes, of)
    assert found["rank1"] == found["identification"][2]["rank1"]
    assert 0.2 < found["rank1"] < 1, "a figure that tells right from wrong"
    assert row.result.curves["cmc"][0] == found["rank1"]


def check_gallery(said, name, listed, probes, of):
    """Every probe against every template of a gallery; FPIR 0.5 of 8 non-mated probes is refused."""
    assert said["gallery"] == name
    subjects = [subject for _, subject in listed]
    hits, nonmated = [], 0
    for template, subject in probes:
        ranked = sorted(range(len(listed)), key=lambda row: -(of[listed[row][0]] @ of[template]))
        if subject in subjects:
            hits.append([subjects[row] for row in ranked].index(subject))
        else:
            nonmated += 1
    assert said["rank1"] == np.mean(np.array(hits) == 0)
    assert said["rank2"] == np.mean(np.array(hits) <= 1)
    assert (said["mated"], said["nonmated"], said["templates"]) == (len(hits), nonmated, len(listed))
    if "tpir_at_fpir" in said:
        assert said["tpir_at_fpir"][0]["refused"].startswith("8 non-mated probes at FPIR 0.5 are 4 false accepts")


def test_open_set_points_of_each_gallery_and_their_mean(mini, work, monkeypatch):
    monkeypatch.setattr("trainer.metric.verification.FEWEST_FALSE_ACCEPTS", 1)
    found, of = judge(mini.folder, work, ijb_fpirs=(0.25,)).result.scalars, vectors(mini, work, False)
    rates = []
    for place, listed in enumerate(mini.galleries.values()):
        best = {t: max(listed, key=lambda entry, t=t: of[entry[0]] @ of[t]) for t, _ in mini.probes}
        score = {t: of[entry[0]] @ of[t] for t, entry in best.items()}
        enrolled = {subject for _, subject in listed}
        strangers = sorted(score[t] for t, subject in mini.probes if subject not in enrolled)
        limit = strangers[-3]  # of 8 non-mated probes 2 may raise an alarm
        mated = [(t, subject) for t, subject in mini.probes if subject in enrolled]
        rates.append(np.mean([score[t] > limit and best[t][1] == subject for t, subject in mated]))
        assert found["identification"][place]["tpir_at_fpir"][0]["tpir"] == pytest.approx(rates[-1])
        assert found["identification"][place]["tpir_at_fpir"][0]["fpir"] == 0.25
    assert found["tpir_at_fpir"] == [
        {"target": 0.25, "fpir": 0.25, "tpir": pytest.approx(np.mean(rates)), "low": None, "refused": None}
    ]


def test_faces_are_aligned_to_the_fields_places(mini, work):
    judge(mini.folder, work)
    (folder,) = (path.parent for path in work.glob("*/manifest.json"))
    split = ShardSet.open(folder).split("unseen_identities")
    assert {tuple(row) for row in split.samples[["width", "height"]].tolist()} == {(112, 112)}
    images = embed(lambda batch: batch.reshape(len(batch), -1).float(), split, CONFIG)[0].view(-1, 3, 112, 112)
    for x, y in TEMPLATE.round().astype(int):
        assert images[:, :, y - 1 : y + 2, x - 1 : x + 2].min() > 150, "the bright spot"
    assert images.mean() < 90


def test_templates_are_whole_however_many_images_are_held(mini, work, monkeypatch):
    whole = judge(mini.folder, work).result
    asked = []

    def counted(split, samples):
        if samples is not None:  # the whole set is asked for once, so that it can be kept
            asked.append(len(samples))
        return pixels(split, samples)

    monkeypatch.setattr(templates, "IMAGES", 5)
    monkeypatch.setattr(templates, "_FIRSTS", 3)
    monkeypatch.setattr(templates, "_NUMBERS", 16 * 16 * 3 * 4)
    sets = SetsConfig(ijb=(mini.folder,), ijb_ranks=(1, 2))
    given = {"work": work, "image_size": 112, "margin": 0.2, "squared": False}
    (row,) = judge_sets(sets, None, [("raw pixels", counted)], **given)
    assert row.result.scalars == whole.scalars
    assert max(asked) <= 5
    assert sum(asked) == 56


def test_ijb_b_and_a_distribution_without_galleries(tmp_path):
    mini = write_ijb(tmp_path / "IJBB", "ijbb", ("S1", "S2"))
    row = judge(mini.folder, tmp_path / "work")
    assert row.set == "IJB-B"
    assert [one["gallery"] for one in row.result.scalars["identification"]] == ["S1", "S2", "all"]
    for path in (mini.folder / "meta").glob("*1N*"):
        path.unlink()
    found = judge(mini.folder, tmp_path / "work").result.scalars
    assert "rank1" not in found
    assert found["refusals"] == dict.fromkeys(("rank1", "rank2"), "the distribution has no lists of galleries")
    assert found["auc"] == row.result.scalars["auc"]


def test_the_same_distribution_in_two_folders(mini, tmp_path):
    (tmp_path / "again").symlink_to(mini.folder)
    sets = SetsConfig(ijb=(mini.folder, tmp_path / "again"), ijb_ranks=(1,))
    with pytest.raises(ValueError, match="sets: IJB-C is there 2 times; results are told apart by the name"):
        judge_sets(sets, None, [], work=tmp_path / "work", image_size=112, margin=0.2, squared=False)


def test_missing_images_are_named_or_left_out(tmp_path):
    mini = write_ijb(tmp_path / "IJBC")
    only, one_of_two = mini.templates[13][0][0], mini.templates[14][0][0]
    for name in (only, one_of_two):
        (mini.folder / "loose_crop" / name).unlink()
    with pytest.raises(
        ValueError, match=rf"loose_crop: 2 images are missing or cannot be aligned: {only}, {one_of_two}$"
    ):
        judge(mini.folder, tmp_path / "work")
    found = judge(mini.folder, tmp_path / "work", skip_missing=True).result.scalars
    assert (found["images_left_out"], found["pairs_left_out"]) == (2, 8)
    assert (found["templates"], found["verification_pairs"]) == (23, 120)
    assert found["probes"] == 15


def edit(mini, name, change):
    path = mini.folder / "meta" / f"ijbc_{name}"
    path.write_text(change(path.read_text()))


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("face_tid_mid.txt", lambda text: text.replace("1.jpg 11 500", "1.jpg 11", 1), "a line is not name, template, medium"),
        ("face_tid_mid.txt", lambda text: text.replace(" 11 ", " x ", 1), "tid_mid.txt: a line is not .*'x'"),
        ("face_tid_mid.txt", lambda text: text.replace("2.jpg", "1234.jpg", 1), "5pts_score.txt lacks 1 images: 1234.jpg$"),
        ("name_5pts_score.txt", lambda text: text.replace("1.jpg ", "1.jpg 7 ", 1), "5pts_score.txt: a line is not name, P1X"),
        ("template_pair_label.txt", lambda text: "11 99999 0\n" + text, "1 templates without an image in ijbc_face_tid.*: 99999"),
        ("template_pair_label.txt", lambda text: "11 12 2\n" + text, "a label is neither 1, the same subject, nor 0"),
        ("template_pair_label.txt", lambda text: "11 12 1\n", "IJB-C has 1 genuine and 0 impostor pairs"),
        ("1N_gallery_G1.csv", lambda text: text + "77777,1\n", "1N lists: 1 templates without an image .*: 77777"),
        ("1N_gallery_G1.csv", lambda text: text + "12\n", "G1.csv: a line does not begin with a template's"),
        ("1N_gallery_G1.csv", lambda text: text + "11,999\n", "G1.csv: template 11 is of two subjects"),
        ("1N_gallery_G1.csv", lambda text: "T,S\n11,100\n", "gallery G1 has 1 subjects, but ranks go up to 2; lower them"),
        ("1N_probe_mixed.csv", lambda text: text.splitlines()[0], "mixed.csv: it names no template"),
        ("1N_probe_mixed.csv", lambda text: "T,S\n12,100\n", "gallery G2: no probe is of one of its 4 subjects"),
    ],
)  # fmt: skip
def test_a_wrong_list_is_one_line(tmp_path, name, change, said):
    mini = write_ijb(tmp_path / "IJBC")
    edit(mini, name, change)
    with pytest.raises(ValueError, match=said) as caught:
        judge(mini.folder, tmp_path / "work")
    assert "\n" not in str(caught.value)


def test_lists_that_are_missing(tmp_path):
    with pytest.raises(ValueError, match=r"meta has 0 files \*_face_tid_mid.txt"):
        judge(tmp_path, tmp_path / "work")
    mini = write_ijb(tmp_path / "IJBC")
    (mini.folder / "meta" / "ijbc_1N_probe_mixed.csv").unlink()
    with pytest.raises(ValueError, match=r"probe_mixed\.csv cannot be read: No such file"):
        judge(mini.folder, tmp_path / "work")
    (mini.folder / "meta" / "ijbc_name_5pts_score.txt").unlink()
    with pytest.raises(ValueError, match=r"5pts_score\.txt cannot be read"):
        judge(mini.folder, tmp_path / "work")


def test_template_scores_are_those_of_single_pairs():
    generator = torch.Generator().manual_seed(0)
    made = torch.nn.functional.normalize(torch.randn(700, 24, generator=generator))
    pairs = np.random.default_rng(0).integers(0, 700, (5000, 2)).astype(np.int32)
    found = templates.template_scores(made, pairs)
    one_by_one = [float((made[a].double() * made[b].double()).sum().float()) for a, b in pairs.tolist()]
    assert found.tolist() == pytest.approx(one_by_one, abs=2e-8)
