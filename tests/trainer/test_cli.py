"""The command as a user meets it: every subcommand's help, one whole small run, and what bad input is answered with."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data_shards.convert import ConvertConfig, convert
from data_shards.index import ShardSet
from tests.data_shards.collections_on_disk import draw_collection, every_file
from trainer.cli import main
from trainer.devices import resolve

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

TRAIN = ["--data.image-size", "32", "--plan.identities-per-batch", "4", "--plan.images-per-identity", "2"]
TRAIN += ["--model.trunk", "resnet18", "--model.embedding-size", "8", "--optimizer.warmup-steps", "1"]
TRAIN += ["--run.steps", "3", "--run.device", "cpu", "--run.precision", "fp32", "--run.no-tensorboard"]
TRAIN += ["--run.log-every", "2", "--run.checkpoint-every", "2"]


def command(*args: object) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    words = [sys.executable, "-m", "trainer.cli", *map(str, args)]
    return subprocess.run(words, capture_output=True, text=True, env=environment, timeout=120, check=False)


def code_of(args: list[str]) -> int:
    """Exit code of the command; the settings' parser leaves by SystemExit where it was asked for help."""
    try:
        return main(args)
    except SystemExit as stop:
        return stop.code or 0


OPTIONS = {
    "synthesize": ["OUT", "--identities", "--images-per-identity", "--size", "--seed", "--workers"],
    "align": ["SOURCE", "OUT", "--size", "--faces", "--min-score", "--landmarks", "--detector", "--quality", "--workers"],
    "shard": [
        "SOURCE", "OUT", "--holdout-identities", "--holdout-images", "--shard-mib", "--images-per-group", "--order",
        "--seed", "--max-pixels", "--workers",
    ],
    "verify": ["DIR", "--decode"],
    "shards": ["stats", "export", "forget"],
    "train": ["--config", "--run.folder", "--run.resume", "--plan.identities-per-batch", "--loss.margin"],
    "config": ["--diff", "--schema", "--config"],
    "profile": ["--steps", "--warmup", "--out", "--config"],
    "embed": ["RUN_OR_PHOTOS", "OUT", "--network", "--shards", "--split", "--device"],
    "search": ["GALLERY", "PROBE", "--network", "--top", "--threshold", "--sheet", "--json"],
    "evaluate": ["RUN", "--shards", "--gallery-images", "--closed-gallery-images", "--knn", "--seed", "--device"],
    "report": ["RUN", "--out", "--pdf"],
    "export": ["RUN", "OUT", "--format", "--checkpoint", "--push"],
    "import": ["CHECKPOINT.pth", "OUT", "--image-size"],
    "plan": ["--gpu", "--nodes", "--p", "--shards", "--calibrate", "--check", "--json", "--out"],
    "doctor": ["--folder", "--json"],
}  # fmt: skip


def test_help_names_every_command(capsys):
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    named = [line.split()[0] for line in said.splitlines() if line[:4] == "    " and line[4:5].strip()]
    assert named == list(OPTIONS)


@pytest.mark.parametrize("name", OPTIONS)
def test_help_of_a_command_names_its_options(capsys, name):
    assert code_of([name, "--help"]) == 0
    said = capsys.readouterr()
    assert f"usage: facescale {name}" in said.out
    assert [option for option in OPTIONS[name] if option not in said.out] == []
    assert said.err == ""


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "facescale: the following arguments are required: COMMAND (see facescale --help)"),
        (["frobnicate"], "facescale: argument COMMAND: invalid choice: 'frobnicate'"),
        (["shard", "in"], "facescale shard: the following arguments are required: OUT"),
        (["shard", "in", "out", "--workers", "two"], "facescale shard: argument --workers: invalid int value: 'two'"),
        (["shard", "in", "out", "--order", "sorted"], "facescale shard: argument --order: invalid choice: 'sorted'"),
        (["verify", "a", "b"], "facescale: unrecognized arguments: b"),
        (["synthesize", "out"], "facescale synthesize: the following arguments are required: --identities"),
        (["evaluate", "run", "--knn"], "facescale evaluate: argument --knn: expected at least one argument"),
        (["train", "--run.stepz", "3"], "facescale: Unrecognized options: --run.stepz, 3"),
        (["train", "--config"], "facescale: --config needs a file"),
        (["train", "--config", "none.yaml"], "facescale: config file none.yaml does not exist"),
    ],
)
def test_wrong_usage_is_told_in_one_line_and_ends_with_2(capsys, tmp_path, monkeypatch, args, message):
    monkeypatch.chdir(tmp_path)
    assert main(args) == 2
    said = capsys.readouterr()
    (line,) = said.err.splitlines()
    assert line.startswith(message)
    assert said.out == ""
    assert list(tmp_path.iterdir()) == []


# One whole small run. Module-wide and read only; tests that change it take a copy.


@pytest.fixture(scope="module")
def run(shards, tmp_path_factory) -> Path:
    """Three steps of training in this process, without a launcher."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as environment:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            environment.delenv(name, raising=False)
        assert main(["train", *TRAIN, "--data.shards", str(shards), "--run.folder", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def judged(run, tmp_path_factory) -> Path:
    """A copy of the run that was evaluated."""
    folder = tmp_path_factory.mktemp("judged") / "run"
    shutil.copytree(run, folder)
    assert main(["evaluate", str(folder), "--knn", "3", "1", "--device", "cpu"]) == 0
    return folder


def test_train_without_a_launcher_leaves_a_run(run):
    assert {path.name for path in run.iterdir()} == {"config.yaml", "log.jsonl", "checkpoints", "logs"}
    assert [json.loads(line)["step"] for line in (run / "log.jsonl").read_text().splitlines()] == [2, 3]


def test_embed_writes_the_held_out_identities_in_the_splits_order(run, shards, tmp_path, capsys):
    assert main(["embed", str(run), str(tmp_path / "out"), "--device", "cpu"]) == 0
    assert capsys.readouterr().out == f"30 embeddings of 8 dimensions in {tmp_path}/out\n"
    split = ShardSet.open(shards).split("unseen_identities")
    embeddings, identities = (np.load(tmp_path / "out" / f"{name}.npy") for name in ("embeddings", "identities"))
    assert (embeddings.shape, embeddings.dtype) == ((30, 8), np.float32)
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-6)
    assert identities.tolist() == split.samples["identity"].tolist() == np.repeat([1, 4, 7, 10, 11], 6).tolist()
    keys = (tmp_path / "out" / "keys.txt").read_text().splitlines()
    assert keys == [f"n{identity:02d}/{image:03d}" for identity in (1, 4, 7, 10, 11) for image in range(6)]
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"embeddings.json", "embeddings.npy", "identities.npy", "keys.txt"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_evaluate_judges_both_sets_and_raw_pixels_beside(judged):
    rows = json.loads((judged / "evaluation" / "results.json").read_text())
    assert [(row["set"], row["embedder"]) for row in rows] == [
        (name, embedder)
        for name in ("unseen identities", "unseen images of training identities")
        for embedder in ("facescale", "raw pixels")
    ]
    assert {"knn_leave_one_out_1", "knn_leave_one_out_3"} <= rows[0].keys()


def test_pairs_of_a_set_that_is_kept_are_not_embedded_again(judged, tmp_path, capsys):
    run = Path(shutil.copytree(judged, tmp_path / "run"))
    (tmp_path / "pairs.csv").write_text("first,second,same,fold\nn01/000,n01/001,1,0\nn01/002,n04/000,0,0\n")
    (tmp_path / "more.csv").write_text("first,second,same,fold\nn07/000,n07/001,1,0\nn10/002,n04/000,0,1\n")
    kept = {path.name for path in (run / "embeddings").iterdir()}
    for name in ("pairs.csv", "more.csv"):
        assert main(["evaluate", str(run), "--knn", "1", "--device", "cpu", "--pairs", str(tmp_path / name)]) == 0
    assert {path.name for path in (run / "embeddings").iterdir()} == kept
    said = capsys.readouterr().err
    assert said.count("facescale: exact search: ") == 2
    rows = json.loads((run / "evaluation" / "results.json").read_text())
    assert [row["set"] for row in rows][-1] == "more.csv"


def test_report_is_written_from_an_evaluated_run(judged, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("trainer.evaluation.report.write.PROJECTIONS", {})  # the slow ones
    run = Path(shutil.copytree(judged, tmp_path / "run"))
    assert main(["report", str(run)]) == 0
    said = capsys.readouterr().out
    assert f"Report: {run}/report/report.html; tables: {run}/report/results.md; pictures: accuracy.png, cmc.png" in said
    assert (run / "report" / "results.json").is_file()


def test_an_export_has_the_evaluation_of_its_weights_and_is_evaluated_alike(judged, shards, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["export", str(judged), str(out), "--format", "huggingface"]) == 0
    row = json.loads((judged / "evaluation" / "results.json").read_text())[0]
    config = json.loads((out / "config.json").read_text())
    points = {point["target"]: point["threshold"] for point in row["tar_at_far"] if point["tar"] is not None}
    expected = {f"far_{far:g}": (2 - 2 * similarity) ** 0.5 for far, similarity in points.items()}
    assert expected
    assert config["thresholds"] == pytest.approx({"verification": row["verification_threshold"], **expected}, abs=1e-5)
    assert f"| unseen identities | {100 * row['rank1']:.2f} % |" in (out / "README.md").read_text()
    assert main(["evaluate", str(out), "--shards", str(shards), "--knn", "3", "1", "--device", "cpu"]) == 0
    again = json.loads((out / "evaluation" / "results.json").read_text())[0]
    assert again == row


def test_an_export_of_other_weights_leaves_the_evaluation_out(judged, tmp_path, capsys):
    words = ["export", str(judged), str(tmp_path / "out"), "--format", "huggingface", "--checkpoint", "2"]
    assert main(words) == 0
    said = capsys.readouterr()
    assert said.err == f"facescale: {judged}/evaluation is not known to be of these weights; left out\n"
    assert said.out.startswith(
        f"step 2 of {judged} as huggingface in {tmp_path}/out: README.md, config.json, model.saf"
    )
    assert "None was made of these weights" in (tmp_path / "out" / "README.md").read_text()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["thresholds"] == {}


def test_an_export_has_neither_shards_nor_checkpoints(run, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["export", str(run), str(out), "--format", "huggingface"]) == 0
    assert main(["evaluate", str(out)]) == 1
    assert main(["evaluate", str(out), "--shards", "x", "--checkpoint", "best"]) == 1
    assert capsys.readouterr().err.splitlines() == [
        f"facescale: {out} is an exported network, which has no shards of its own: give --shards",
        f"facescale: {out} is an exported network and has no checkpoints; leave --checkpoint out",
    ]


def test_report_of_several_runs_needs_a_folder(judged, tmp_path, capsys):
    assert main(["report", str(judged), str(tmp_path)]) == 1
    assert capsys.readouterr().err == ("facescale: 2 runs are given and no folder for their report; say --out FOLDER\n")


def test_train_resumes_to_the_same_weights(run, shards, tmp_path):
    """Killed behind step 2: the third, made anew, ends in the bytes that the run at a stretch ended in."""
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    last = copy / "checkpoints" / "step-00000003"
    shutil.rmtree(last)
    (copy / "checkpoints" / "latest").write_text("step-00000002")
    assert main(["train", *TRAIN, "--data.shards", str(shards), "--run.folder", str(copy), "--run.resume"]) == 0
    written = run / "checkpoints" / "step-00000003" / "model.safetensors"
    assert (last / "model.safetensors").read_bytes() == written.read_bytes()
    assert [json.loads(line)["step"] for line in (copy / "log.jsonl").read_text().splitlines()] == [2, 3]
    assert (copy / "config.yaml").read_bytes() == (run / "config.yaml").read_bytes()


# Bad input: one line on stderr, exit code 1, everything as it was.


@pytest.fixture
def fails(capsys, tmp_path):
    """Runs the command and returns what it says behind `facescale: `."""

    def check(*args: object, code: int = 1) -> str:
        before, folders = every_file(tmp_path), sorted(tmp_path.rglob("*"))
        assert main([str(arg) for arg in args]) == code
        assert sorted(tmp_path.rglob("*")) == folders, "nothing was made or taken away"
        assert every_file(tmp_path) == before
        said = capsys.readouterr()
        (line,) = said.err.splitlines()
        assert said.out == ""
        assert line.startswith("facescale: ")
        return line.removeprefix("facescale: ")

    return check


def test_shard_of_a_source_that_is_not_there_or_empty(fails, tmp_path):
    assert fails("shard", tmp_path / "none", tmp_path / "out") == f"source {tmp_path}/none is not there"
    (tmp_path / "file").write_text("x")
    assert fails("shard", tmp_path / "file", tmp_path / "out").startswith(f"source {tmp_path}/file is of no kind")
    (tmp_path / "in").mkdir()
    assert fails("shard", tmp_path / "in", tmp_path / "out").startswith(f"source {tmp_path}/in holds no pictures")


def test_shard_of_one_identity(fails, tmp_path):
    draw_collection(tmp_path / "in", {"alone": 3})
    message = fails("shard", tmp_path / "in", tmp_path / "out", "--workers", 1)
    assert "identit" in message
    assert "at least" in message


def test_shard_of_text_files_alone(fails, tmp_path):
    for identity in "ab":
        (tmp_path / "in" / identity).mkdir(parents=True)
        (tmp_path / "in" / identity / "0.jpg").write_text("hello")
    message = fails("shard", tmp_path / "in", tmp_path / "out", "--workers", 1)
    assert message.startswith(f"none of the 2 pictures of {tmp_path}/in can be used; a/0.jpg is no JPEG")


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_shard_into_something_that_exists(fails, tmp_path, pictures, kind):
    if kind == "folder":
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine.txt").write_text("keep")
    else:
        (tmp_path / "out").write_text("keep")
    assert fails("shard", pictures, tmp_path / "out").startswith(f"output {tmp_path}/out exists and is no")


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--holdout-identities", "many", "--holdout-identities many is neither a number nor a file of names"),
        ("--holdout-identities", "", "--holdout-identities  is neither"),
        ("--holdout-identities", "1.5", "holdout_identities is 1.5; a fraction is between 0 and 1"),
        ("--holdout-identities", "nan", "holdout_identities is nan; a fraction is between 0 and 1"),
        ("--holdout-identities", "-1", "holdout_identities is -1; a count is 0 or more"),
        ("--holdout-identities", "99", "holdout_identities is 99"),
        ("--holdout-images", "9", "holdout_images is 9, but no training identity has 11 images"),
        ("--holdout-images", "-1", "holdout_images is -1; a count is 0 or more"),
        ("--shard-mib", "0", "--shard-mib is 0.0; it must be above 0"),
        ("--shard-mib", "nan", "--shard-mib is nan; it must be above 0"),
        ("--shard-mib", "inf", "--shard-mib is inf; it must be above 0"),
        ("--images-per-group", "0", "images_per_group is 0; it must be 1 or more"),
        ("--max-pixels", "0", "max_pixels is 0; it must be 1 or more"),
        ("--workers", "0", "workers is 0; it must be 1 or more"),
    ],
)
def test_shard_with_nonsense_settings(fails, tmp_path, pictures, option, value, message):
    found = fails("shard", pictures, tmp_path / "out", option, value)
    assert " ".join(found.split()).startswith(" ".join(message.split()))


def test_holdout_files(fails, tmp_path, pictures):
    names = tmp_path / "names.txt"
    names.write_text("n01\nnobody\n")
    found = fails("shard", pictures, tmp_path / "out", "--holdout-identities", names)
    assert found.startswith("holdout_identities names 'nobody', which is not among the 13 identities")
    names.write_bytes(b"\xff\xfe\x00")
    found = fails("shard", pictures, tmp_path / "out", "--holdout-identities", names)
    assert found == f"--holdout-identities {names} is not a text file of names"


def test_a_holdout_file_is_taken_by_its_lines(tmp_path, pictures):
    (tmp_path / "names.txt").write_text("n03\n\n  n05  \n")
    args = ["shard", pictures, tmp_path / "out", "--holdout-identities", tmp_path / "names.txt", "--workers", 1]
    assert main([str(arg) for arg in args]) == 0
    found = ShardSet.open(tmp_path / "out")
    assert [found.identity_names[i] for i in found.split("unseen_identities").identities] == ["n03", "n05"]


def test_a_text_file_among_pictures_is_left_out_and_named(tmp_path, capsys):
    source = draw_collection(tmp_path / "in", {"a": 3, "b": 3})
    (source / "a" / "note.jpg").write_text("not a picture")
    assert main(["shard", str(source), str(tmp_path / "out"), "--workers", "1"]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert "7 pictures read, 6 written, 1 left out" in said.out
    assert "left out: a/note.jpg is no JPEG, PNG, PGM, BMP or WebP by its first bytes" in said.out
    assert len(ShardSet.open(tmp_path / "out").split("train")) == 6


@pytest.mark.parametrize("name", ["verify", "train"])
def test_a_folder_that_holds_no_shards(fails, tmp_path, name):
    (tmp_path / "some").mkdir()
    shards = ["--data.shards", tmp_path / "some", "--run.folder", tmp_path / "run"]
    args = [tmp_path / "some"] if name == "verify" else [*TRAIN, *shards]
    assert fails(name, *args).startswith(f"{tmp_path}/some holds no manifest.json")


def test_verify_finds_a_flipped_byte_and_changes_nothing(tmp_path, shards, capsys):
    damaged = Path(shutil.copytree(shards, tmp_path / "shards"))
    split = ShardSet.open(damaged).split("train")
    row, tar = split.samples[3], split.shards[split.samples[3]["shard"]]
    content = bytearray(tar.read_bytes())
    content[int(row["offset"]) + int(row["size"]) // 2] ^= 1
    tar.write_bytes(content)
    before = every_file(tmp_path)
    assert main(["verify", str(damaged)]) == 1
    said = capsys.readouterr()
    assert said.out == f"{damaged}: 2 problems\n"
    assert said.err.splitlines() == [
        f"{tar}: differs from what was written (SHA-256)",
        f"{tar}: {split.key(3)}: the picture's bytes differ (CRC-32)",
    ]
    assert every_file(tmp_path) == before


def test_verify_of_whole_shards_ends_with_0(shards, capsys):
    for args in (["verify", str(shards)], ["verify", str(shards), "--decode"]):
        assert main(args) == 0
        assert capsys.readouterr() == (f"{shards}: all as the manifest says\n", "")


def test_train_with_more_identities_than_there_are(fails, tmp_path, shards):
    args = [*TRAIN, "--data.shards", shards, "--run.folder", tmp_path / "run", "--plan.identities-per-batch", 64]
    assert fails("train", *args) == (
        "plan.identities_per_batch is 64; the shards have 7 training identities with at least 2 images"
    )


def test_train_into_a_folder_with_something_in_it(fails, tmp_path, shards):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("keep")
    found = fails("train", *TRAIN, "--data.shards", shards, "--run.folder", tmp_path / "run")
    assert found.startswith(f"run folder {tmp_path}/run exists and is not empty")


def test_export_into_a_folder_with_something_in_it(fails, tmp_path, run):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    found = fails("export", run, tmp_path / "out", "--format", "onnx")
    assert found == f"{tmp_path}/out exists and is not empty; choose another folder"


def test_export_of_a_checkpoint_that_is_not_there(fails, tmp_path, run):
    found = fails("export", run, tmp_path / "out", "--format", "original", "--checkpoint", "9")
    assert found == f"{run}/checkpoints has no checkpoint step-00000009; there are step-00000002, step-00000003"


@pytest.mark.parametrize("name", ["evaluate", "embed", "report", "export"])
def test_a_folder_that_is_no_run(fails, tmp_path, name):
    (tmp_path / "some").mkdir()
    out = {"embed": [tmp_path / "out"], "export": [tmp_path / "out", "--format", "onnx"]}.get(name, [])
    message = fails(name, tmp_path / "some", *out)
    assert f"{tmp_path}/some is n" in message  # … is no run folder, … is not the folder of a run
    assert "config.yaml" in message


@pytest.mark.parametrize("name", ["evaluate", "embed"])
def test_a_run_without_a_checkpoint(fails, tmp_path, run, name):
    (tmp_path / "run").mkdir()
    shutil.copy(run / "config.yaml", tmp_path / "run")
    out = [tmp_path / "out"] if name == "embed" else []
    assert fails(name, tmp_path / "run", *out) == f"{tmp_path}/run/checkpoints has no checkpoint: train first"


def test_a_run_whose_checkpoint_is_damaged(fails, tmp_path, run):
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    shutil.rmtree(copy / "checkpoints" / "step-00000002")
    weights = copy / "checkpoints" / "step-00000003" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    found = fails("evaluate", copy, "--knn", 1)
    assert found.startswith(f"checkpoint {weights.parent}: model.safetensors is missing or damaged")


def test_report_without_an_evaluation(fails, tmp_path, run):
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    assert fails("report", copy) == (
        f"{copy}/evaluation/results.json does not exist; run `facescale evaluate {copy}` first"
    )


def test_embed_into_a_folder_with_something_in_it(fails, tmp_path, run):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    assert fails("embed", run, tmp_path / "out") == f"{tmp_path}/out exists and is not empty; choose another folder"


def test_embed_of_a_split_that_is_not_there(fails, tmp_path, run, shards):
    assert fails("embed", run, tmp_path / "out", "--split", "test") == (
        f"{shards} has no split 'test': it has train, unseen_identities, unseen_images"
    )


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--gallery-images", 0], "evaluation.gallery_images_per_identity is 0; it must be at least 1"),
        (["--gallery-images", 6], "evaluation.gallery_images_per_identity is 6 and the largest identity has 6 images"),
        (["--knn", 0], "evaluation.knn is [0]; it must be ascending integers from 1"),
        (["--knn", 30], "evaluation.knn goes up to 30, but there are 29 other images"),
        (["--seed", -1], "evaluation.seed is -1; it must be at least 0"),
        (["--closed-gallery-images", 0], "evaluation.closed_gallery_images is 0; it must be at least 1"),
    ],
)
def test_evaluate_with_nonsense_settings(fails, run, args, message):
    before = every_file(run)
    assert message in fails("evaluate", run, *args)
    assert every_file(run) == before


@pytest.mark.parametrize("device", ["gpu", "3", "cuda3", "cuda:", "cuda:x", "cuda::1", "", "cpu:0", "CPU"])
def test_devices_that_are_none(fails, run, device):
    assert fails("evaluate", run, "--device", device) == (
        f"--device is {device!r}; allowed are auto, cpu, cuda and cuda:N"
    )


def test_a_gpu_that_is_not_there(fails, run, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert fails("evaluate", run, "--device", "cuda:1") == "--device is cuda:1, but PyTorch sees no GPU here; use cpu"
    assert resolve("auto") == "cpu"
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert [resolve(name) for name in ("auto", "cpu", "cuda", "cuda:12")] == ["cuda:0", "cpu", "cuda", "cuda:12"]


@pytest.mark.parametrize(("option", "value"), [("--identities", 0), ("--images-per-identity", 0), ("--size", 31)])
def test_synthesize_with_nonsense_settings(fails, tmp_path, option, value):
    needed = {"--identities": 1, "--images-per-identity": 1} | {option: value}
    found = fails("synthesize", tmp_path / "out", *(word for pair in needed.items() for word in pair))
    assert found.startswith(f"synthesize: {option.strip('-').replace('-', '_')} is {value}; it must be")


def test_synthesize_draws(tmp_path, capsys):
    args = ["synthesize", tmp_path / "out", "--identities", 2, "--images-per-identity", 3, "--size", 32, "--workers", 1]
    assert main([str(arg) for arg in args]) == 0
    assert capsys.readouterr().out == f"6 images of 2 identities in {tmp_path}/out\n"
    assert len(every_file(tmp_path / "out")) == 6


def test_the_place_is_shown_where_it_is_asked_for(monkeypatch, tmp_path):
    monkeypatch.setenv("FACESCALE_TRACEBACK", "1")
    with pytest.raises(ValueError, match=r"holds no manifest\.json"):
        main(["verify", str(tmp_path)])


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (KeyboardInterrupt(), "facescale: interrupted\n"),
        (OSError(28, "No space left on device", "/x"), "facescale: [Errno 28] No space left on device: '/x'\n"),
        (ValueError("two\n  lines"), "facescale: two lines\n"),
    ],
)
def test_what_ends_a_command_from_outside_is_one_line_too(monkeypatch, capsys, tmp_path, error, message):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("data_shards.verify.verify", fail)
    assert main(["verify", str(tmp_path)]) == 1
    assert capsys.readouterr().err == message


# The same in a process of its own.


def test_as_a_process_help_and_no_command():
    assert "COMMAND" in command("--help").stdout
    done = command()
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)


def test_as_a_process_bad_input_is_one_line_without_a_traceback(tmp_path):
    for args, code in (
        (["verify", tmp_path], 1),
        (["train", "--run.device", "cpu", "--data.shards", tmp_path, "--run.folder", tmp_path / "run"], 1),
        (["shard", tmp_path], 2),
    ):
        done = command(*args)
        assert done.returncode == code
        assert done.stdout == ""
        (line,) = done.stderr.splitlines()
        assert line.startswith("facescale")
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_of_another_architecture(fails, run, tmp_path):
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    settings = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(settings.replace("trunk: resnet18", "trunk: resnet34"))
    said = fails("evaluate", copy)
    assert said.startswith(f"checkpoint {copy}/checkpoints/step-00000003 is of another architecture: it lacks ")


def test_resuming_on_other_pictures(fails, run, tmp_path):
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    draw_collection(tmp_path / "in", {f"n{number}": 4 for number in range(8)})
    convert(tmp_path / "in", tmp_path / "other", ConvertConfig(workers=1))
    said = fails("train", *TRAIN, "--data.shards", tmp_path / "other", "--run.folder", copy, "--run.resume")
    assert "was trained on other pictures than data.shards now holds" in said
