"""The templates in launch/ are valid by the rules of what reads them."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from tests.docs.pending import PENDING_SETTINGS
from trainer.config import load

LAUNCH = Path(__file__).parents[1] / "launch"


@pytest.mark.parametrize("path", sorted((LAUNCH / "recipes").glob("*.yaml")), ids=lambda path: path.name)
def test_recipes_load(path):
    if PENDING_SETTINGS & yaml.safe_load(path.read_text()).keys():
        pytest.skip("has settings that are not there yet: tests/docs/pending.py")
    config = load(path)
    assert config.plan.batch_size % 8 == 0, "a recipe should run on 1, 2, 4 and 8 processes"


@pytest.mark.parametrize("path", sorted((LAUNCH / "accelerate").glob("*.yaml")), ids=lambda path: path.name)
def test_accelerate_reads_its_configs(path):
    config = load_config_from_file(str(path))
    machines = 2 if path.stem == "ddp_nodes" else 1
    assert config.num_machines == machines
    assert config.num_processes == 1 if path.stem == "one_gpu" else config.num_processes >= 2
    assert config.mixed_precision == "no" or config.distributed_type == "DEEPSPEED"
    if config.distributed_type == "DEEPSPEED":
        named = LAUNCH.parent / config.deepspeed_config["deepspeed_config_file"]
        stage = json.loads(named.read_text())["zero_optimization"]["stage"]
        assert stage == (2 if "zero2" in path.stem else 1)


def test_kubeflow_trainer_knows_every_field():
    models = pytest.importorskip("kubeflow_trainer_api.models")
    runtime, job = yaml.safe_load_all((LAUNCH / "kubernetes" / "trainjob.yaml").read_text())
    assert (
        models.TrainerV1alpha1TrainingRuntime.from_dict(runtime).to_dict() == runtime
    )  # unknown fields would be dropped
    assert models.TrainerV1alpha1TrainJob.from_dict(job).to_dict() == job
    assert job["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"]


def test_skypilot_takes_the_task():
    sky = pytest.importorskip("sky", reason="SkyPilot brings a hundred packages; it is not among the development ones")
    task = sky.Task.from_yaml(str(LAUNCH / "skypilot" / "train.yaml"))
    assert task.num_nodes == 2


def test_slurm_script():
    path = LAUNCH / "slurm" / "train.sbatch"
    subprocess.run(["bash", "-n", str(path)], check=True)
    options = re.findall(r"^#SBATCH (--[a-z-]+)", path.read_text(), re.MULTILINE)
    assert {"--requeue", "--signal", "--nodes", "--ntasks-per-node", "--gpus-per-node", "--open-mode"} <= set(options)
    first_command = next(line for line in path.read_text().splitlines()[1:] if line and not line.startswith("#"))
    assert path.read_text().rindex("#SBATCH") < path.read_text().index(first_command), "Slurm reads no later ones"


def test_dockerfile():
    """Linted; it copies what is there and not kept out; CUDA is that of the locked PyTorch; it installs as `make setup`."""
    path = LAUNCH / "docker" / "Dockerfile"
    done = subprocess.run(
        [Path(sys.executable).parent / "hadolint", "--failure-threshold", "info", str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    text, root = path.read_text(), LAUNCH.parent
    kept = {line[1:] for line in (root / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {word for line in re.findall(r"^COPY (?!--from)(.*)$", text, re.MULTILINE) for word in line.split()[:-1]}
    assert copied == kept
    assert all((root / name).exists() for name in copied)
    (base,) = set(re.findall(r"^FROM nvidia/cuda:(\d+\.\d+)\.\d+-base", text, re.MULTILINE))
    assert base == torch.version.cuda
    assert "--requirement requirements.lock" in text
    assert "--no-deps --no-build-isolation ." in text
    assert "USER 10001" in text


def test_every_template_is_in_the_readme():
    text = (LAUNCH / "README.md").read_text()
    for path in LAUNCH.glob("*/*"):
        assert f"`{path.relative_to(LAUNCH)}`" in text, path
