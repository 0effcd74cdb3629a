"""Starts `accelerate launch -m trainer.train` for real."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
CPU, DEEPSPEED = "launch/accelerate/cpu.yaml", "launch/accelerate/deepspeed.yaml"


def launch(
    config_file: str,
    processes: int,
    *options: object,
    check: bool = True,
    gpu: bool = False,
    command: tuple[str, ...] = ("trainer.train",),
) -> subprocess.CompletedProcess[str]:
    """Runs training, or another `command`, with these options; raises with its output if it fails and `check` says so."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | ({} if gpu else {"CUDA_VISIBLE_DEVICES": ""})
    where = ["--config_file", config_file, "--num_processes", str(processes), "--main_process_port", str(free_port())]
    launcher = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", *where, "-m"]
    done = subprocess.run(
        [*launcher, *command, *map(str, options)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert not check or done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return done


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        found: int = free.getsockname()[1]
        return found


def log(run: Path, name: str = "log.jsonl") -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


def rewind(run: Path, step: int) -> None:
    """Makes a checkpoint the newest again, as if the run had been killed before it wrote a later one."""
    (run / "checkpoints" / "latest").write_text(f"step-{step:08d}")
