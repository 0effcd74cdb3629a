"""The templates in launch/ start real runs: several nodes on loopback, Slurm by stand-ins for its commands, Kubernetes and
SkyPilot by the commands that their files hold."""

import os
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from data_shards.convert import ConvertConfig, convert
from data_shards.synthetic import synthesize
from tests.distributed.ranks import steps_logged
from trainer import config
from trainer.preemption import EXIT_PREEMPTED

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
BIN = Path(sys.executable).parent
RECIPE = "launch/recipes/vggface2.yaml"
STEPS = 4


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("synthetic")
    synthesize(folder / "pictures", identities=8, images_per_identity=5, size=32, seed=3)
    convert(folder / "pictures", folder / "shards", ConvertConfig(images_per_group=2))
    return folder / "shards"


@pytest.fixture
def recipe(shards, tmp_path) -> Path:
    """What stands in for the recipe that the templates name."""
    options = (
        "--data.image-size 32 --plan.identities-per-batch 6 --plan.images-per-identity 2 --model.trunk resnet18 "
        f"--model.embedding-size 16 --run.log-every 1 --run.checkpoint-every 100 --run.steps {STEPS} --run.no-tensorboard"
    )
    found = config.parse(
        [*options.split(), "--data.shards", str(shards), "--run.folder", str(tmp_path / "run")], "test"
    )
    config.save(found, tmp_path / "recipe.yaml")
    return tmp_path / "recipe.yaml"


def _environment(**more: object) -> dict[str, str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "SLURM_"))}
    environment |= {"PATH": f"{BIN}:{environment['PATH']}", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    return environment | {name: str(value) for name, value in more.items()}


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _nodes(commands: list[list[str]], environments: list[dict[str, str]]) -> None:
    """Runs one command a node, at the same time."""
    nodes = [
        subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for command, environment in zip(commands, environments, strict=True)
    ]
    said = [node.communicate(timeout=200)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0] * len(nodes), "\n".join(said)
    assert "over 2 rank(s)" in said[0]
    assert "over 2 rank(s)" not in said[1], "rank 0 alone says what it trains"


def test_two_nodes_under_accelerate(recipe, tmp_path):
    where = f"--num_processes 2 --main_process_ip 127.0.0.1 --main_process_port {_free_port()}".split()
    start = [str(BIN / "accelerate"), "launch", "--config_file", "launch/accelerate/ddp_nodes.yaml", *where]
    commands = [
        [*start, "--machine_rank", str(rank), "-m", "trainer.train", "--config", str(recipe)] for rank in range(2)
    ]
    _nodes(commands, [_environment()] * 2)
    assert steps_logged(tmp_path / "run") == STEPS


def test_two_nodes_by_the_trainjob(recipe, tmp_path):
    """Trainer sets PET_*, which torchrun reads."""
    _, job = yaml.safe_load_all((LAUNCH / "kubernetes" / "trainjob.yaml").read_text())
    trainer = job["spec"]["trainer"]
    changed = {"--config=" + RECIPE: f"--config={recipe}"}
    changed |= {"--data.shards=/data/shards": "", "--run.folder=/data/runs/first": ""}
    arguments = [changed.get(argument, argument) for argument in trainer["args"]]
    assert len(set(trainer["args"]) & set(changed)) == 3
    command = [*trainer["command"], *filter(None, arguments)]
    address = {
        "PET_MASTER_ADDR": "127.0.0.1",
        "PET_MASTER_PORT": _free_port(),
        "PET_NNODES": 2,
        "PET_NPROC_PER_NODE": 1,
    }
    _nodes([command] * 2, [_environment(**address, PET_NODE_RANK=rank) for rank in range(2)])
    assert steps_logged(tmp_path / "run") == STEPS


def test_two_nodes_by_the_skypilot_task(recipe, tmp_path):
    task = yaml.safe_load((LAUNCH / "skypilot" / "train.yaml").read_text())
    script = task["run"]
    shards = config.load(recipe).data.shards
    for found, wanted in (
        ("~/facescale/bin", BIN),
        ("--master-port=29500", f"--master-port={_free_port()}"),
        (RECIPE, recipe),
        ("/data/shards", shards),
        ("/data/runs/first", tmp_path / "run"),
    ):
        assert found in script
        script = script.replace(found, str(wanted))
    task = {"SKYPILOT_NUM_NODES": 2, "SKYPILOT_NUM_GPUS_PER_NODE": 1, "SKYPILOT_NODE_IPS": "127.0.0.1\n127.0.0.1"}
    _nodes([["bash", "-c", script]] * 2, [_environment(**task, SKYPILOT_NODE_RANK=rank) for rank in range(2)])
    assert steps_logged(tmp_path / "run") == STEPS


_SRUN = """#!/usr/bin/env python3
# Starts SLURM_NTASKS tasks, notes their processes, and ends with the highest exit code, as srun does.
import os, subprocess, sys
from pathlib import Path

at = sys.argv.index("bash")
options, command = sys.argv[1:at], sys.argv[at:]
assert "--kill-on-bad-exit=0" in options
tasks = int(os.environ["SLURM_NTASKS"])
processes = [
    subprocess.Popen(command, env=os.environ | {"SLURM_PROCID": str(number), "SLURM_LOCALID": str(number)})
    for number in range(tasks)
]
Path(os.environ["STAND_IN"], "tasks").write_text(" ".join(str(process.pid) for process in processes))
codes = [process.wait() for process in processes]
sys.exit(max(code if code >= 0 else 128 - code for code in codes))
"""
_SCONTROL = """#!/bin/bash
case $1 in
show) echo 127.0.0.1; echo 127.0.0.1 ;;
requeue) echo "$2" >> "$STAND_IN/requeued" ;;
esac
"""


class Slurm:
    """Starts the template as Slurm does, with stand-ins for `srun` and `scontrol`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        for name, text in (("srun", _SRUN), ("scontrol", _SCONTROL)):
            (folder / name).write_text(text)
            (folder / name).chmod((folder / name).stat().st_mode | stat.S_IXUSR)

    def start(self, *options: str, restarts: int = 0) -> subprocess.Popen[str]:
        (self.folder / "tasks").unlink(missing_ok=True)
        environment = _environment(
            SLURM_JOB_ID=_free_port() - 20000,
            SLURM_JOB_NODELIST="node[1-2]",
            SLURM_NTASKS=2,
            SLURM_NTASKS_PER_NODE=2,
            SLURM_RESTART_COUNT=restarts,
            STAND_IN=self.folder,
        )
        environment["PATH"] = f"{self.folder}:{environment['PATH']}"
        command = ["bash", str(LAUNCH / "slurm" / "train.sbatch"), *options]
        return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)

    def tasks(self) -> list[int]:
        return [int(number) for number in (self.folder / "tasks").read_text().split()]

    def requeued(self) -> int:
        path = self.folder / "requeued"
        return len(path.read_text().split()) if path.is_file() else 0


@pytest.fixture
def slurm(tmp_path) -> Slurm:
    return Slurm(tmp_path / "slurm")


def _under_way(run: Path, batch: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 120
    while steps_logged(run) < 3:
        assert batch.poll() is None, batch.communicate()[1]
        assert time.monotonic() < end
        time.sleep(0.05)


def test_slurm_preempts_and_requeues(slurm, recipe, tmp_path):
    """Its time is up: Slurm signals the ranks, the job is queued again, its second start goes on; also after a rank is killed."""
    options = ("--config", str(recipe), "--run.steps", "60")
    batch = slurm.start(*options)
    _under_way(tmp_path / "run", batch)
    asked = time.monotonic()
    for task in slurm.tasks():
        os.kill(task, signal.SIGUSR1)
    os.kill(batch.pid, signal.SIGTERM)  # preemption may signal the batch shell, too: it waits
    said = batch.communicate(timeout=60)[1]
    assert time.monotonic() - asked < 30
    assert f"ended with code {EXIT_PREEMPTED}" in said
    assert slurm.requeued() == 1
    saved = steps_logged(tmp_path / "run")
    assert 3 <= saved < 60

    batch = slurm.start(*options, restarts=1)
    until = saved + 3
    while steps_logged(tmp_path / "run") < until:
        assert batch.poll() is None, batch.communicate()[1]
        time.sleep(0.05)
    os.kill(slurm.tasks()[1], signal.SIGKILL)
    said = batch.communicate(timeout=60)[1]
    assert f"step {saved} to 60" in said, "it went on where it was"
    assert "is dead; it was at" in said
    assert slurm.requeued() == 2

    batch = slurm.start(*options, restarts=2)
    said = batch.communicate(timeout=200)[1]
    assert batch.returncode == 0, said
    assert f"step {saved} to 60" in said
    assert slurm.requeued() == 2
    assert steps_logged(tmp_path / "run") == 60


def test_slurm_does_not_requeue_what_cannot_work(slurm, recipe):
    batch = slurm.start("--config", str(recipe), "--data.shards", "/nowhere")
    said = batch.communicate(timeout=100)[1]
    assert batch.returncode in (1, 2)
    assert "facescale: " in said
    assert slurm.requeued() == 0


def test_slurm_gives_up_after_many_starts(slurm, recipe, tmp_path):
    batch = slurm.start("--config", str(recipe), "--run.steps", "1000", restarts=20)
    _under_way(tmp_path / "run", batch)
    os.kill(slurm.tasks()[1], signal.SIGKILL)
    batch.communicate(timeout=60)
    assert batch.returncode == 128 + signal.SIGKILL
    assert slurm.requeued() == 0
