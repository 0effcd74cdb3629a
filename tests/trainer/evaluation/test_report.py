import json
import shutil
import struct

import matplotlib
import numpy as np
import pytest
import torch
import yaml
from torch.nn.functional import normalize

from trainer.evaluation.protocols import ProtocolConfig, SetResult, closed_set, open_set
from trainer.evaluation.report import write_report
from trainer.evaluation.results import (
    FACESCALE,
    RAW_PIXELS,
    UNSEEN_IDENTITIES,
    UNSEEN_IMAGES,
    ResultRow,
    load_results,
    replaced_folder,
    save_results,
)
from trainer.evaluation.tables import MISSING, main_table

FILES = {"results.json", "results.md", "loss.png", "accuracy.png", "tsne.png", "roc.png", "cmc.png"}


def people(identities, images, spread, seed):
    generator = torch.Generator().manual_seed(seed)
    means = normalize(torch.randn(identities, 32, generator=generator), dim=1)
    ids = torch.arange(identities).repeat_interleave(images)
    noise = torch.randn(len(ids), 32, generator=generator) * spread / 32**0.5
    return normalize(means[ids] + noise, dim=1), ids


def evaluate(run, identities=24, images=8, config=None):
    """Blobs on the sphere: ours tighter than raw pixels, training identities tighter than unseen ones."""
    config = config or ProtocolConfig()
    rows = []
    for embedder, spread in ((FACESCALE, 1.1), (RAW_PIXELS, 2.4)):
        unseen = people(identities, images, spread, seed=1)
        rows.append(ResultRow(UNSEEN_IDENTITIES, embedder, open_set(*unseen, margin=0.2, squared=False, config=config)))
        embeddings, ids = people(identities, 2 * images, spread * 0.85, seed=2)
        held_out = torch.arange(len(ids)) % 2 == 1
        sides = (embeddings[~held_out], ids[~held_out], embeddings[held_out], ids[held_out])
        rows.append(ResultRow(UNSEEN_IMAGES, embedder, closed_set(*sides, margin=0.2, squared=False, config=config)))
    rows.sort(key=lambda row: row.set)
    save_results(run / "evaluation", rows, *people(identities, images, 1.1, seed=1))
    return rows


def train(run, steps=4000, log_every=10, evaluate_every=400):
    """A log such as training writes."""
    run.mkdir(parents=True)
    loss = {"kind": "margin", "margin": 0.2, "distance": "root"}
    config = {"model": {"trunk": "resnet50", "embedding_size": 128}, "loss": loss}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    noise = np.random.default_rng(0)
    with (run / "log.jsonl").open("w") as log:
        for step in range(log_every, steps + 1, log_every):
            gone = 1 - np.exp(-3 * step / steps)
            line = {"step": step, "epoch": step / 500, "images_seen": 256 * step, "learning_rate": 1e-3}
            line |= {"loss": 0.3 - 0.17 * gone + noise.normal(0, 0.01), "active_fraction": 0.98 - 0.7 * gone}
            line |= {
                "d_ap": 1.0 - 0.4 * gone + noise.normal(0, 0.02),
                "d_an": 0.8 + 0.15 * gone + noise.normal(0, 0.01),
            }
            line |= {"images_per_s": 410 + noise.normal(0, 5), "data_wait_percent": 2.0}
            log.write(json.dumps(line) + "\n")
    with (run / "evaluations.jsonl").open("w") as log:
        for step in range(evaluate_every, steps + 1, evaluate_every):
            gone = 1 - np.exp(-4 * step / steps)
            line = {"step": step, "images_seen": 256 * step, "rank1": 0.2 + 0.5 * gone, "rank5": 0.4 + 0.5 * gone}
            line |= {
                "knn": 0.3 + 0.5 * gone,
                "verification_accuracy": 0.6 + 0.3 * gone,
                "triplet_loss": 0.2 - 0.15 * gone,
            }
            log.write(json.dumps(line) + "\n")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "fake"
    train(run)
    evaluate(run)
    return run


@pytest.fixture(scope="module")
def report(finished, tmp_path_factory):
    return write_report(shutil.copytree(finished, tmp_path_factory.mktemp("runs") / "run"))


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def test_report_has_every_file_and_every_picture_is_a_readable_png(run):
    backend = matplotlib.get_backend()
    folder = write_report(run)
    assert folder == run / "report"
    assert {path.name for path in folder.iterdir()} == FILES
    for picture in folder.glob("*.png"):
        head = picture.read_bytes()[:24]
        assert head[:8] == b"\x89PNG\r\n\x1a\n"
        width, height = struct.unpack(">II", head[16:24])
        assert width > 800
        assert height > 600
    assert matplotlib.get_backend() == backend
    assert sorted(path.name for path in run.iterdir()) == sorted(
        ["config.yaml", "log.jsonl", "evaluations.jsonl", "evaluation", "report"]
    )


def test_tables_hold_the_measured_numbers_beside_raw_pixels(report):
    rows = load_results(report.parent / "evaluation").rows
    text = (report / "results.md").read_text()
    table = text[text.index("| Margin") :].split("\n\n")[0].splitlines()
    assert table[0] == "| Margin | Set | Embedding | kNN | Contrastive | Rank5 | Loss |"
    assert len(table) == 2 + 4
    s = next(row for row in rows if (row.set, row.embedder) == (UNSEEN_IDENTITIES, RAW_PIXELS)).result.scalars
    verification = f"{100 * s['verification_accuracy']:.2f} ± {100 * s['verification_std']:.2f} %"
    numbers = (
        f"{100 * s['knn_leave_one_out_5']:.2f} % | {verification} | {100 * s['rank5']:.2f} % | {s['triplet_loss']:.4f}"
    )
    assert f"| 0.2 | unseen identities | raw pixels | {numbers} |" in table
    for picture in ("loss", "accuracy", "roc", "cmc", "tsne"):
        assert f"]({picture}.png)" in text
    published = text.index("published by the original project, other data")
    assert text.index(table[-1]) < published
    for figure in ("79.55 %", "89.33 %", "72.33 %", "57.85 %"):
        assert text.count(figure) == 1
        assert text.index(figure) > published
    point = s["tar_at_far"][0]
    interval = f"[{100 * point['low']:.2f}, {100 * point['high']:.2f}]"
    assert f"{100 * point['tar']:.2f} % {interval}, {point['impostor_pairs']:,} impostor pairs" in text


def test_results_json_carries_rows_settings_and_origin_of_published_numbers(report):
    found = json.loads((report / "results.json").read_text())
    assert [row["embedder"] for row in found["rows"]].count("raw pixels") == 2
    assert found["rows"][0]["rank1"] == load_results(report.parent / "evaluation").rows[0].result.scalars["rank1"]
    assert found["settings"]["loss"]["margin"] == 0.2
    assert found["published"]["note"] == "published by the original project, other data"


def test_report_is_the_same_when_written_again_and_replaces_the_old(run, report):
    first = {path.name: path.read_bytes() for path in report.iterdir()}
    (run / "report").mkdir()
    (run / "report" / "left.txt").write_text("of an older version")
    second = {path.name: path.read_bytes() for path in write_report(run).iterdir()}
    assert second.keys() == first.keys()
    assert [name for name in first if first[name] != second[name]] == []


def test_small_refusals_are_named(tmp_path):
    run = tmp_path / "run"
    train(run, steps=40, evaluate_every=100)
    (run / "evaluations.jsonl").unlink()
    evaluate(run, identities=5, images=4, config=ProtocolConfig(ranks=(1, 5), knn=(1, 5), knn_gallery_images=4))
    text = (write_report(run) / "results.md").read_text()
    assert "- TAR at FAR 1 %, unseen identities: 160 impostor pairs at FAR 0.01 are 1.6 false accepts;" in text
    assert "- knn_gallery_1, unseen identities: the first 4 images of each identity as gallery give 20 gallery" in text
    assert "refused: 160 impostor pairs" in text


def test_soft_margin_is_called_soft():
    scalars = {"margin": None, "knn_headline": "gallery", "headline_neighbours": 1, "knn_gallery_1": 0.5}
    table = main_table([ResultRow(UNSEEN_IMAGES, FACESCALE, SetResult(scalars))])
    assert (
        table.splitlines()[-1]
        == f"| soft | {UNSEEN_IMAGES} | facescale | 50.00 % | {MISSING} | {MISSING} | {MISSING} |"
    )


def test_results_come_back_as_they_were_saved(tmp_path):
    rows = evaluate(tmp_path)
    found = load_results(tmp_path / "evaluation")
    assert [(row.set, row.embedder) for row in found.rows] == [(row.set, row.embedder) for row in rows]
    for before, after in zip(rows, found.rows, strict=True):
        assert after.result.scalars == before.result.scalars
        assert after.result.curves.keys() == before.result.curves.keys() == {"cmc", "roc_far", "roc_tar"}
        for name, curve in before.result.curves.items():
            np.testing.assert_array_equal(after.result.curves[name], curve)
    embeddings, identities = people(24, 8, 1.1, seed=1)
    assert torch.equal(found.embeddings, embeddings)
    assert torch.equal(found.identities, identities)


def test_a_failed_write_leaves_the_earlier_folder(tmp_path):
    folder = tmp_path / "report"
    with replaced_folder(folder) as partial:
        (partial / "a").write_text("whole")

    def fail():
        with replaced_folder(folder) as partial:
            (partial / "a").write_text("half")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert (folder / "a").read_text() == "whole"
    assert [path.name for path in tmp_path.iterdir()] == ["report"]


def damage(run, name, text):
    (run / name).write_text(text)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda run: shutil.rmtree(run / "evaluation"), r"does not exist; run `facescale evaluate .*run` first"),
        (lambda run: damage(run, "evaluation/results.json", "[{"), r"evaluation is damaged .*facescale evaluate"),
        (lambda run: damage(run, "evaluation/curves.npz", "zip?"), r"evaluation is damaged .*facescale evaluate"),
        (lambda run: damage(run, "evaluation/results.json", "[]"), "holds no result"),
        (lambda run: (run / "log.jsonl").unlink(), r"log.jsonl is missing or holds no step; train"),
        (lambda run: damage(run, "log.jsonl", ""), r"log.jsonl is missing or holds no step; train"),
        (lambda run: damage(run, "log.jsonl", "{}\n"), r"log.jsonl, line 1: no 'step'"),
        (lambda run: damage(run, "log.jsonl", "x\n{}\n"), r"log.jsonl, line 1: not a JSON object"),
        (lambda run: damage(run, "log.jsonl", 'x\n{"st'), r"log.jsonl, line 1: not a JSON object"),
        (lambda run: (run / "config.yaml").unlink(), "config.yaml does not exist; .* is not the folder of a run"),
        (lambda run: damage(run, "config.yaml", "a: ["), "config.yaml is not YAML"),
    ],
)
def test_a_run_that_cannot_be_reported_is_refused_in_one_line(run, spoil, message):
    spoil(run)
    with pytest.raises(ValueError, match=message) as refusal:
        write_report(run)
    assert "\n" not in str(refusal.value)
    assert not (run / "report").exists()


def test_log_lines_in_any_order_and_one_cut_short_by_a_kill_make_the_same_curve(run, report):
    whole = (report / "loss.png").read_bytes()
    lines = (run / "log.jsonl").read_text().splitlines(keepends=True)
    (run / "log.jsonl").write_text("".join(reversed(lines)) + '{"step": 4010, "los')
    assert (write_report(run) / "loss.png").read_bytes() == whole


def test_unknown_sets_and_embedders_are_refused():
    with pytest.raises(ValueError, match="a result's set is 'lfw'; allowed are unseen identities, "):
        ResultRow("lfw", FACESCALE, SetResult({}))
