"""`facescale plan` as a user meets it."""

import json

import pytest

from tests.trainer.planner.settings import write_profile
from trainer.cli import main

SMALL = ["plan", "--trunk", "resnet18", "--image-size", "64", "--p", "256"]


def test_the_tables(capsys):
    assert main([*SMALL, "--nodes", "2", "--price", "2.5", "--epochs", "3"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(
        "16 x H100 SXM5 80 GB, 2 node(s); resnet18 at 64 px in bf16, d = 128; P x K = 256 x 4, 64 images"
    )
    for part in (
        "images/s; ",
        "limited by: ",
        "epoch: ",
        "3 epochs",
        "cost: ",
        "at 2.5 per GPU and hour\n",
        "stage of a step",
    ):
        assert part in said
    for part in (
        "memory of a rank",
        "fits; the largest --p",
        "shards, ",
        "index 87,973,",
        "  1,024",
        "Advice",
    ):
        assert part in said
    assert "is a prediction from published data; facescale's authors have measured none of it" in said
    assert "Published checks" not in said


def test_the_cautious_pace_is_told_and_can_be_asked_for(capsys):
    large = ["plan", "--p", "1024"]
    assert main(large) == 0
    cautious = capsys.readouterr().out.split("cautious: ")[1].split(" ")[0]
    assert main([*large, "--basis", "cautious"]) == 0
    said = capsys.readouterr().out
    assert f"\n{cautious} images/s; " in said
    assert "cautious: " not in said


def test_an_assumed_price_says_so(capsys):
    assert main(SMALL) == 0
    assert "(assumed on 2026-11-25, no quote: give --price)" in capsys.readouterr().out


def test_published_checks(capsys):
    assert main([*SMALL, "--check"]) == 0
    said = capsys.readouterr().out
    assert "Published checks" in said
    assert "56,056" in said
    assert "16,621" in said


def test_json_and_the_picture(capsys, tmp_path):
    out = tmp_path / "deep" / "plan"
    assert main([*SMALL, "--json", "--out", str(out), "--check"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((out / "plan.json").read_text())
    assert found["gpus"] == 8
    assert found["price_assumed"]
    assert [row["gpus"] for row in found["scaling"]][-1] == 1024
    assert len(found["published"]) == 13
    assert (out / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_a_real_set(capsys, shards):
    assert main([*SMALL[:-1], "4", "--k", "4", "--gpus-per-node", "2", "--shards", str(shards)]) == 0
    said = capsys.readouterr().out
    assert "data, from the manifest: 36 images of 8 identities; 3 shards" in said


def test_a_calibrated_cpu(capsys, tmp_path):
    path = write_profile(tmp_path / "profile.json")
    assert main(["plan", "--calibrate", str(path), "--json"]) == 0
    same = json.loads(capsys.readouterr().out)
    assert same["images_per_s"] == pytest.approx(64, rel=0.01)
    assert same["what"] == "A prediction from what `facescale profile` measured on this machine."
    assert same["cautious_images_per_s"] is None
    assert main(["plan", "--calibrate", str(path), "--image-size", "64", "--gpus-per-node", "1", "--p", "4"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("1 rank(s) on this machine's CPU; resnet18 at 64 px in fp32, d = 8; P x K = 4 x 4")
    assert "adds up: the same cores" in said
    assert "cost: " not in said


def test_a_calibrated_gpu(capsys, tmp_path):
    path = write_profile(tmp_path / "profile.json", device="NVIDIA A100-SXM4-80GB")
    assert main(["plan", "--calibrate", str(path), "--gpu", "a100"]) == 0
    assert "rates: calibrated: 64.0 images/s measured on NVIDIA A100-SXM4-80GB, 2 rank(s)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--p", "1"], "--p is 1; allowed is 2 to 10,000,000"),
        (["--p", "63"], "--p is 63, --k 4: P*K = 252 is not divisible by the 8 GPUs; --p must be a multiple of 2"),
        (["--gpus-per-node", "0"], "--gpus-per-node is 0; allowed is 1 to 64"),
        (["--picture-size", "large"], "--picture-size is 'large'; it must be like 137x180, width and height in pixels"),
        (["--gpu", "v100", "--precision", "bf16"], "--precision is bf16; Tesla V100 SXM2 32 GB has none: allowed is fp32"),
        (["--gpu", "cpu"], "--gpu is cpu, the device of --calibrate is not given; allowed is the GPU that was profiled"),
        (["--calibrate", "nowhere.json"], "--calibrate is nowhere.json, which does not exist"),
        (["--shards", "nowhere"], "nowhere holds no manifest.json: it is no finished output of `facescale shard`"),
        (["--target-shard-mb", "0"], "--target-shard-mb is 0.0; allowed is 0.01 to 1,000,000"),
        (["--storage-mb-s", "0"], "--storage-mb-s is 0.0; allowed is 0.1 to 1,000,000"),
        (["--images", "1000", "--identities", "900"], "--identities is 900; with --images 1,000 at most 500 are allowed"),
    ],
)  # fmt: skip
def test_a_mistake_is_told_in_one_line(capsys, options, message):
    assert main(["plan", *options]) == 1
    said = capsys.readouterr()
    assert said.err.startswith(f"facescale: {message}")
    assert said.err.count("\n") == 1
    assert said.out == ""


def test_more_mistakes(capsys, tmp_path, shards):
    assert main(["plan", "--gpu", "abacus"]) == 2
    assert "argument --gpu: invalid choice: 'abacus'" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main([*SMALL, "--out", str(tmp_path / "file")]) == 1
    assert "which is a file; it must be a folder" in capsys.readouterr().err
    assert main(["plan", "--shards", str(shards), "--images", "5"]) == 1
    assert "--images is 5; with --shards it must not be given" in capsys.readouterr().err
    path = write_profile(tmp_path / "profile.json")
    assert main(["plan", "--calibrate", str(path), "--gpu", "h100"]) == 1
    assert "--gpu is h100, the device of --calibrate is cpu" in capsys.readouterr().err
    assert main(["plan", "--calibrate", str(path), "--precision", "bf16"]) == 1
    assert "--precision is bf16; --calibrate was measured in fp32" in capsys.readouterr().err
