import json
import shutil
import struct

import matplotlib
import numpy as np
import pytest

from tests.trainer.evaluation.report.fake_runs import evaluate, train
from trainer.evaluation.protocols import ProtocolConfig, SetResult
from trainer.evaluation.report.write import write_report
from trainer.evaluation.results import FACESCALE, RAW_PIXELS, UNSEEN_IDENTITIES, ResultRow, load_results, save_results

EARLIER = {"loss", "accuracy", "health", "throughput", "roc", "cmc", "tsne", "tsne3d", "umap"}
FIGURES = EARLIER | {"histogram", "identities", "genuine_pairs", "impostor_pairs", "misses"}
TEXTS = {"report.html", "results.json", "results.md"}


def files(figures, *endings):
    return TEXTS | {f"{name}.{ending}" for name in figures for ending in endings}


@pytest.fixture(scope="module")
def report(pictured, tmp_path_factory):
    return write_report(shutil.copytree(pictured, tmp_path_factory.mktemp("runs") / "run"))


@pytest.fixture
def run(plain, tmp_path):
    return shutil.copytree(plain, tmp_path / "run")


@pytest.fixture
def quick(monkeypatch):
    """Without the slow layouts."""
    monkeypatch.setattr("trainer.evaluation.report.write.PROJECTIONS", {})


def test_report_has_every_file_and_every_picture_is_a_readable_png(report):
    assert {path.name for path in report.iterdir()} == files(FIGURES, "png")
    for picture in report.glob("*.png"):
        head = picture.read_bytes()[:24]
        assert head[:8] == b"\x89PNG\r\n\x1a\n"
        width, height = struct.unpack(">II", head[16:24])
        assert width > 800
        assert height > 200
    before = {"config.yaml", "log.jsonl", "evaluations.jsonl", "evaluation"}
    assert {path.name for path in report.parent.iterdir()} == before | {"report"}


def test_the_page_is_bounded(report):
    assert (report / "report.html").stat().st_size < 8_000_000


def test_tables_hold_the_measured_numbers_beside_raw_pixels(report):
    rows = load_results(report.parent / "evaluation").rows
    text = (report / "results.md").read_text()
    table = text[text.index("| Margin") :].split("\n\n")[0].splitlines()
    assert table[0] == "| Margin | Set | Embedding | kNN | Contrastive | Rank5 | Loss |"
    assert len(table) == 2 + 4 + 3
    s = next(row for row in rows if (row.set, row.embedder) == (UNSEEN_IDENTITIES, RAW_PIXELS)).result.scalars
    verification = f"{100 * s['verification_accuracy']:.2f} ± {100 * s['verification_std']:.2f} %"
    numbers = (
        f"{100 * s['knn_leave_one_out_5']:.2f} % | {verification} | {100 * s['rank5']:.2f} % | {s['triplet_loss']:.4f}"
    )
    assert f"| 0.2 | unseen identities | raw pixels | {numbers} |" in table
    assert table[-3:] == [
        "| – | set not told | published, not ours | 79.55 % | – | – | – |",  # noqa: RUF001
        "| – | VGGFace2 | published, not ours | – | – | 72.33 % | – |",  # noqa: RUF001
        "| – | LFW | published, not ours | – | 89.33 % | 57.85 % | – |",  # noqa: RUF001
    ]
    for picture in FIGURES:
        assert f"]({picture}.png)" in text
    point = s["tar_at_far"][0]
    interval = f"[{100 * point['low']:.2f}, {100 * point['high']:.2f}]"
    assert f"{100 * point['tar']:.2f} % {interval}, {point['impostor_pairs']:,} impostor pairs" in text


def test_results_json_carries_rows_settings_and_origin_of_published_numbers(report):
    found = json.loads((report / "results.json").read_text())
    assert [row["embedder"] for row in found["rows"]].count("raw pixels") == 2
    assert found["rows"][0]["rank1"] == load_results(report.parent / "evaluation").rows[0].result.scalars["rank1"]
    assert found["settings"]["loss"]["margin"] == 0.2
    assert found["published"]["note"] == "published by the original project, other data"


def test_report_is_the_same_when_written_again_and_replaces_the_old(report):
    first = {path.name: path.read_bytes() for path in report.iterdir()}
    (report / "left.txt").write_text("of an older version")
    backend = matplotlib.get_backend()
    second = {path.name: path.read_bytes() for path in write_report(report.parent).iterdir()}
    assert matplotlib.get_backend() == backend
    assert second.keys() == first.keys()
    assert [name for name in first if first[name] != second[name]] == []


def test_figures_come_as_pdf_on_request_and_are_the_same_each_time(run, quick):
    folder = write_report(run, pdf=True)
    assert {path.name for path in folder.iterdir()} == files(EARLIER - {"tsne", "tsne3d", "umap"}, "png", "pdf")
    first = {path.name: path.read_bytes() for path in folder.glob("*.pdf")}
    assert all(content.startswith(b"%PDF-") for content in first.values())
    assert {path.name: path.read_bytes() for path in write_report(run, pdf=True).glob("*.pdf")} == first


def test_an_evaluation_of_an_earlier_version_is_reported_without_what_it_lacks(run, quick):
    folder = write_report(run)
    assert {path.name for path in folder.iterdir()} == files(EARLIER - {"tsne", "tsne3d", "umap"}, "png")
    assert "run has no example pictures: its evaluation is of an earlier version" in (folder / "results.md").read_text()


def test_several_runs_stand_side_by_side(pictured, plain, tmp_path, quick):
    folder = write_report([pictured, plain], out=tmp_path / "out")
    assert folder == tmp_path / "out"
    text = (folder / "results.md").read_text()
    table = text[text.index("| Run") :].split("\n\n")[0].splitlines()
    assert [line.split(" | ")[0] for line in table[2:]] == ["| run", "| run", "| plain", "| plain"] * 2 + ["| –"] * 3  # noqa: RUF001
    assert [line.split(" | ")[1] for line in table[2:6]] == ["0.2", "0.2", "0.5", "0.5"]
    assert [entry["run"] for entry in json.loads((folder / "results.json").read_text())["runs"]] == ["run", "plain"]
    assert "| loss.margin | 0.2 | 0.5 |" in text
    assert "trunk" not in text[text.index("## Settings") :]
    assert not (pictured / "report").exists()


def test_several_runs_need_a_folder_and_each_is_given_once(run, plain, tmp_path):
    with pytest.raises(ValueError, match="2 runs are given and no folder for their report; say --out FOLDER"):
        write_report([run, plain])
    with pytest.raises(ValueError, match="run is given twice"):
        write_report([run, plain, run], out=tmp_path / "out")
    with pytest.raises(ValueError, match="no run is given"):
        write_report([], out=tmp_path / "out")


def test_a_folder_that_is_no_report_is_left_alone(run, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="mine, which exists and is no report"):
        write_report(run, out=tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.tex").exists()


def test_runs_of_the_same_name_are_told_by_the_folder_around_them(run, plain, tmp_path, quick):
    other = shutil.copytree(plain, tmp_path / "other" / "run")
    text = (write_report([run, other], out=tmp_path / "out") / "results.md").read_text()
    assert f"# Results of `{tmp_path.name}/run` and `other/run`" in text


def test_small_refusals_are_named(tmp_path, quick):
    run = tmp_path / "run"
    train(run, steps=40, evaluate_every=100)
    (run / "evaluations.jsonl").unlink()
    evaluate(run, identities=5, images=4, config=ProtocolConfig(ranks=(1, 5), knn=(1, 5), knn_gallery_images=4))
    text = (write_report(run) / "results.md").read_text()
    assert "- TAR at FAR 1 %, unseen identities: 160 impostor pairs at FAR 0.01 are 1.6 false accepts;" in text
    assert "- knn_gallery_1, unseen identities: the first 4 images of each identity as gallery give 20 gallery" in text
    assert "refused: 160 impostor pairs" in text
    assert "- run was not evaluated during training (run.evaluate_every)." in text


def test_a_list_of_pairs_alone_makes_a_report(plain, tmp_path, quick):
    run = shutil.copytree(plain, tmp_path / "run")
    far = np.geomspace(1e-4, 1, 50)
    scalars = {"verification_accuracy": 0.9612, "verification_std": 0.01, "eer": 0.04, "auc": 0.99, "refusals": {}}
    scalars |= {"genuine_pairs": 3000, "impostor_pairs": 3000, "protocol": "LFW, 10 folds"}
    lfw = ResultRow("LFW", FACESCALE, SetResult(scalars, {"roc_far": far, "roc_tar": far**0.2}))
    save_results(run / "evaluation", [lfw], None, None)
    folder = write_report(run)
    assert {path.stem for path in folder.glob("*.png")} == {"loss", "accuracy", "health", "throughput", "roc"}
    assert "| – | LFW | facescale | – | 96.12 ± 1.00 % | – | – |" in (folder / "results.md").read_text()  # noqa: RUF001


def test_one_whose_roc_was_refused_is_reported_and_the_refusal_told(plain, tmp_path, quick):
    run = shutil.copytree(plain, tmp_path / "run")
    found = load_results(run / "evaluation")
    rows = []
    for row in found.rows:
        curves = {"cmc": row.result.curves["cmc"]}
        scalars = row.result.scalars | {
            "tar_at_far": None,
            "eer": None,
            "auc": None,
            "refusals": {"auc": "too few <b>"},
        }
        rows.append(ResultRow(row.set, row.embedder, SetResult(scalars, curves)))
    save_results(run / "evaluation", rows, found.embeddings, found.identities)
    folder = write_report(run)
    assert not (folder / "roc.png").exists()
    assert "- auc, unseen identities: too few <b>." in (folder / "results.md").read_text()
    assert "auc, unseen identities: too few &lt;b&gt;." in (folder / "report.html").read_text()


def test_a_log_of_an_earlier_version_is_reported_without_what_it_lacks(run, quick):
    entries = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    kept = ("step", "images_seen", "loss", "active_fraction", "d_ap", "d_an")
    (run / "log.jsonl").write_text("".join(f"{json.dumps({name: e[name] for name in kept})}\n" for e in entries))
    folder = write_report(run)
    assert not (folder / "throughput.png").exists()
    assert (folder / "health.png").exists()


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


def test_log_lines_in_any_order_and_one_cut_short_by_a_kill_make_the_same_curve(run, quick):
    whole = (write_report(run) / "loss.png").read_bytes()
    lines = (run / "log.jsonl").read_text().splitlines(keepends=True)
    (run / "log.jsonl").write_text("".join(reversed(lines)) + '{"step": 4010, "los')
    assert (write_report(run) / "loss.png").read_bytes() == whole
