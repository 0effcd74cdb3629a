"""The whole path on the ORL faces: PGM pictures, 40 identities of 10 images."""

import json
from pathlib import Path

import numpy as np
import pytest

from data_shards.convert import ConvertConfig, convert
from data_shards.index import ShardSet
from tests.distributed.launching import CPU, ROOT, launch, log
from trainer.cli import main

ORL = ROOT.parent / "shared" / "data" / "orl_faces"
UNSEEN = tuple(f"s{number}" for number in range(21, 41))

pytestmark = pytest.mark.skipif(not ORL.is_dir(), reason=f"the ORL faces are not at {ORL}")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("orl")
    summary = convert(ORL, folder / "shards", ConvertConfig(holdout_identities=UNSEEN, holdout_images=2))
    assert (summary.read, summary.written, summary.failed) == (400, 400, 0)
    options = (
        "--data.image-size 48 --plan.identities-per-batch 8 --model.trunk resnet18 --run.steps 6 --run.log-every 2"
    )
    launch(CPU, 2, *options.split(), "--data.shards", folder / "shards", "--run.folder", folder / "run")
    assert main(["evaluate", str(folder / "run")]) == 0
    return folder / "run"


def test_counts_of_the_shards(run):
    shards = ShardSet.open(run.parent / "shards")
    splits = {name: (len(shards.split(name)), len(shards.split(name).identities)) for name in shards.splits}
    assert splits == {"train": (160, 20), "unseen_identities": (200, 20), "unseen_images": (40, 20)}
    assert {shards.identity_names[label] for label in shards.split("unseen_identities").identities} == set(UNSEEN)


def test_counts_of_the_evaluation(run):
    assert [line["step"] for line in log(run)] == [2, 4, 6]
    rows = json.loads((run / "evaluation" / "results.json").read_text())
    opened = [row for row in rows if row["set"] == "unseen identities"]
    closed = [row for row in rows if row["set"] == "unseen images of training identities"]
    assert [row["embedder"] for row in opened] == [row["embedder"] for row in closed] == ["facescale", "raw pixels"]
    for row in opened:
        assert (row["identities"], row["gallery"], row["probes"]) == (20, 20, 180)
        assert row["leave_one_out_probes"] == 200
    for row in closed:
        assert (row["identities"], row["probes"], row["knn_gallery"]) == (20, 40, 160)
        assert 0 <= row["centroid_accuracy"] <= 1


def test_raw_pixels_come_near_the_published_baseline(run):
    """../shared/data/README.md: 72.2 % / 93.3 % on whole 92 x 112 pictures by L2; ours is 64 px of the central square, cosine."""
    rows = json.loads((run / "evaluation" / "results.json").read_text())
    pixels = next(row for row in rows if row["embedder"] == "raw pixels" and row["set"] == "unseen identities")
    assert pixels["rank1"] == pytest.approx(0.722, abs=0.1)
    assert pixels["rank5"] == pytest.approx(0.933, abs=0.1)


def test_report(run):
    assert main(["report", str(run)]) == 0
    made = {path.name for path in (run / "report").iterdir()}
    assert {"results.json", "results.md", "loss.png", "accuracy.png", "tsne.png", "roc.png", "cmc.png"} <= made


def test_embed(run, tmp_path):
    assert main(["embed", str(run), str(tmp_path / "out"), "--split", "unseen_images"]) == 0
    embeddings = np.load(tmp_path / "out" / "embeddings.npy")
    assert embeddings.shape == (40, 128)
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, rtol=1e-5)
    keys = (tmp_path / "out" / "keys.txt").read_text().split()
    names = ShardSet.open(run.parent / "shards").identity_names
    labels = np.load(tmp_path / "out" / "identities.npy")
    assert [key.split("/")[0] for key in keys] == [names[label] for label in labels]
