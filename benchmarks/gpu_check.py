"""`make gpu-check`: the tests marked `gpu`, then the main job on the GPUs of this machine, then a table of what ran how fast.

Not yet run, for want of a GPU; on a machine without one it says so and exits 1. Everything it starts is the ordinary command
line: mixed decode, NCCL and GPU FAISS are chosen by the device alone.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "demo-gpu"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000, help="training steps")
    args = parser.parse_args(argv)
    import torch

    gpus = torch.cuda.device_count()
    if not gpus:
        print("facescale: PyTorch sees no GPU on this machine; make gpu-check needs one. `make test` runs without.")
        return 1
    shutil.rmtree(FOLDER, ignore_errors=True)
    ran = [_timed("tests marked gpu", [sys.executable, "-m", "pytest", "-m", "gpu", "-q"])]
    for name, command in _main_job(gpus, args.steps):
        ran.append(_timed(name, command))
    _table(torch.cuda.get_device_name(0), gpus, ran)
    return 0 if all(code == 0 for _, code, _ in ran) else 1


def _main_job(gpus: int, steps: int) -> list[tuple[str, list[str]]]:
    facescale = [sys.executable, "-m", "trainer.cli"]
    pictures, shards, run = (str(FOLDER / name) for name in ("pictures", "shards", "run"))
    synthesize = "--identities 400 --images-per-identity 20 --size 160 --seed 7"
    shard = "--holdout-identities 100 --holdout-images 2"
    train = f"--data.shards {shards} --data.image-size 112 --plan.identities-per-batch {32 * gpus} --run.steps {steps}"
    launch = (
        f"-m accelerate.commands.accelerate_cli launch --num_processes {gpus} --num_machines 1 --mixed_precision no"
    )
    launch += " --dynamo_backend no" + (" --multi_gpu" if gpus > 1 else "")
    options = f"-m trainer.train --config launch/recipes/demo.yaml {train} --run.folder {run} --run.evaluate-every 250"
    profile = f"-m trainer.cli profile --config launch/recipes/demo.yaml {train} --out {FOLDER / 'profile'}"
    return [
        ("synthesize", [*facescale, "synthesize", pictures, *synthesize.split()]),
        ("shard", [*facescale, "shard", pictures, shards, *shard.split()]),
        ("train (mixed decode, NCCL)", [sys.executable, *launch.split(), *options.split()]),
        ("profile (where a step's time goes)", [sys.executable, *launch.split(), *profile.split()]),
        ("evaluate (GPU FAISS)", [*facescale, "evaluate", run, "--device", "cuda:0"]),
        ("report", [*facescale, "report", run]),
    ]


def _timed(name: str, command: list[str]) -> tuple[str, int, float]:
    print(f"== {name}: {' '.join(command[1:])}", flush=True)
    begin = time.perf_counter()
    code = subprocess.run(command, cwd=ROOT, check=False).returncode
    return name, code, time.perf_counter() - begin


def _table(device: str, gpus: int, ran: list[tuple[str, int, float]]) -> None:
    print(f"\n{gpus} x {device}\n")
    for name, code, seconds in ran:
        print(f"{name:28} {'ok' if code == 0 else f'FAILED ({code})':12} {seconds:8.1f} s")
    log = FOLDER / "run" / "log.jsonl"
    if log.is_file():
        lines = [json.loads(line) for line in log.read_text().splitlines()][-20:]  # the first ones warm up
        rates = [line["images_per_s"] for line in lines]
        waits = [line["data_wait_percent"] for line in lines]
        print(f"\ntraining: median {statistics.median(rates):,.0f} images/s ({min(rates):,.0f} to {max(rates):,.0f}),")
        print(f"data wait {statistics.median(waits):.1f} %")


if __name__ == "__main__":
    sys.exit(main())
