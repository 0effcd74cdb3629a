"""The whole training run on 1, 2, … processes: images/s, efficiency, and which phase of the step grew.

    python benchmarks/run.py [--ranks 1 2] [--rounds 3] [--steps 15] [--images 64] [--trunk resnet50] [--image-size 112]

`facescale profile` on synthetic shards (JPEGs of 160 px), P x K with K = 4. Weak: `--images` a rank, however many ranks; strong:
`--images` in all. A rank has its part of the cores that the most ranks leave it, also where fewer run, so that it stands for a
device; `whole machine` is one process with all of them. On GPUs a rank has one, and all cores are there for all. Rounds visit
every number of ranks in turn; efficiencies are of runs of one round. Efficiency is images/s over ranks times images/s of the
first number of ranks; a phase's growth is its seconds a step beyond those there (strong: beyond their share).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks.measure import free_port, machine, spread  # noqa: E402

K = 4
WHOLE = "whole machine"


def profiled(shards: Path, ranks: int, images: int, cores: list[int], args: argparse.Namespace) -> dict[str, Any]:
    """profile.json of some steps of `ranks` ranks with `images` each, on these cores."""
    gpu = _gpus() > 0
    options = f"--steps {args.steps} --warmup {args.warmup} --plan.images-per-identity {K} --model.trunk {args.trunk}"
    options += f" --plan.identities-per-batch {images * ranks // K} --data.image-size {args.image_size}"
    where = "ddp.yaml" if gpu else "cpu.yaml"
    launcher = (
        f"-m accelerate.commands.accelerate_cli launch --config_file launch/accelerate/{where} --num_processes {ranks}"
    )
    launcher += f" --main_process_port {free_port()}"
    start = [sys.executable, *(launcher.split() if ranks > 1 else []), "-m", "trainer.cli", "profile"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(max(1, len(cores) // ranks))}
    with tempfile.TemporaryDirectory(prefix="facescale-run-") as folder:
        done = subprocess.run(
            [*start, *options.split(), "--data.shards", str(shards), "--out", folder],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
        )
        if done.returncode:
            raise SystemExit(f"{ranks} rank(s): {done.stderr[-3000:]}")
        found: dict[str, Any] = json.loads(Path(folder, "profile.json").read_text())
    return found


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def settings(args: argparse.Namespace) -> Iterator[tuple[str, int, int, list[int]]]:
    """(kind, ranks, images a rank, cores) of every run of a round."""
    cores = sorted(os.sched_getaffinity(0))
    for ranks in args.ranks:
        mine = cores if _gpus() else cores[: ranks * max(1, len(cores) // max(args.ranks))]
        yield "weak", ranks, args.images, mine
        if ranks != args.ranks[0]:
            yield "strong", ranks, args.images * args.ranks[0] // ranks, mine
    if not _gpus() and max(args.ranks) > 1:
        yield WHOLE, 1, args.images, cores


def rows(rounds: list[dict[tuple[str, int], dict[str, Any]]], first: int) -> list[dict[str, Any]]:
    """The table, out of what every round found by kind and ranks."""
    found = []
    for kind, ranks in rounds[0]:
        runs = [each[kind, ranks] for each in rounds]
        bases = [each["weak", first] for each in rounds]
        rates = [run["images_per_s"] for run in runs]
        efficiency = [rate * first / ranks / base["images_per_s"] for rate, base in zip(rates, bases, strict=True)]
        path, base = (_medians(several) for several in (runs, bases))
        share = first / ranks if kind == "strong" else 1.0
        found.append(
            {
                "kind": kind,
                "ranks": ranks,
                "images_per_rank": runs[0]["images_per_rank"],
                "images_per_s": spread(rates, 2),
                "efficiency": None if kind == WHOLE else spread(efficiency),
                "step_s": spread([run["step_s"]["median"] for run in runs]),
                "critical_path_s": path,
                "all_reduce_total_s": median(run["all_reduce_total_s"] for run in runs),
                "grew_s": {name: seconds - share * base[name] for name, seconds in path.items()},
            }
        )
    return found


def _medians(runs: list[dict[str, Any]]) -> dict[str, float]:
    return {name: median(run["critical_path_s"][name] for run in runs) for name in runs[0]["critical_path_s"]}


def table(found: list[dict[str, Any]]) -> str:
    head = (
        "| | ranks x images | images/s | efficiency | step, ms | what grew most, ms a step |\n|---|---|---|---|---|---|"
    )
    lines = [head]
    for row in found:
        grew = sorted(row["grew_s"].items(), key=lambda item: -item[1])[:3]
        told = ", ".join(f"{name} {1e3 * seconds:+.0f}" for name, seconds in grew if seconds > 5e-4)
        rate, efficiency = row["images_per_s"], row["efficiency"]
        share = (
            f"{efficiency['median']:.0%} ({efficiency['lower_quartile']:.0%} to {efficiency['upper_quartile']:.0%})"
            if efficiency
            else ""
        )
        lines.append(
            f"| {row['kind']} | {row['ranks']} x {row['images_per_rank']} | {rate['median']:.1f} ({rate['lower_quartile']:.1f} "
            f"to {rate['upper_quartile']:.1f}) | {share} | {1e3 * row['step_s']['median']:.0f} | {told or 'nothing'} |"
        )
    return "\n".join(lines)


def draw_shards(folder: Path, identities: int) -> Path:
    from data_shards.convert import ConvertConfig, convert
    from data_shards.synthetic import synthesize

    synthesize(folder / "pictures", identities=identities, images_per_identity=12, size=160, seed=0)
    convert(folder / "pictures", folder / "shards", ConvertConfig())
    return folder / "shards"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="numbers of processes, ascending")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--trunk", default="resnet50")
    parser.add_argument("--image-size", type=int, default=112)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "run.json")
    args = parser.parse_args()
    args.ranks = sorted(args.ranks)
    rounds: list[dict[tuple[str, int], dict[str, Any]]] = []
    with tempfile.TemporaryDirectory(prefix="facescale-run-") as folder:
        shards = draw_shards(Path(folder), max(40, args.images * args.ranks[-1] // K))
        for number in range(args.rounds):
            rounds.append({})
            for kind, ranks, images, cores in settings(args):
                found = rounds[-1][kind, ranks] = profiled(shards, ranks, images, cores, args)
                print(
                    f"round {number + 1}, {kind}, {ranks} x {images}: {found['images_per_s']:.1f} images/s", flush=True
                )
    shared = {name: found[name] for name in ("device", "trunk", "image_size", "precision", "k", "loader")}
    report = {"machine": machine("torch", "torchvision", "nvidia-dali-cuda130"), "rounds": args.rounds, **shared}
    report["rows"] = rows(rounds, args.ranks[0])
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    print(table(report["rows"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
