"""How far `facescale plan` is off on this machine: each setting's pace foretold from the profile of each other one.

    python benchmarks/plan_accuracy.py [--rounds 2] [--steps 6] [--out plan_accuracy.json]

`facescale profile` of every setting of `SETTINGS`, by turns; of each the round with the shorter step, for what other jobs do to a
machine only makes steps longer. Then `plan`'s formulas, calibrated on one setting, are asked for all others. Wants a machine that
is otherwise idle.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from argparse import Namespace
from itertools import permutations
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks.measure import machine  # noqa: E402
from benchmarks.run import K, draw_shards, profiled  # noqa: E402


class Setting(NamedTuple):
    ranks: int
    images: int
    """Of a rank."""
    image_size: int
    trunk: str

    def __str__(self) -> str:
        return f"{self.ranks} x {self.images}, {self.image_size} px, {self.trunk}"


SETTINGS = (
    Setting(2, 32, 112, "resnet50"),
    Setting(1, 32, 112, "resnet50"),
    Setting(2, 16, 112, "resnet50"),
    Setting(2, 32, 64, "resnet50"),
    Setting(1, 64, 80, "resnet50"),
    Setting(2, 32, 96, "resnet34"),
)


def foretold(profile: Path, setting: Setting) -> float:
    """Images/s of all ranks, as `facescale plan --calibrate` says it."""
    options = f"--gpus-per-node {setting.ranks} --p {setting.images * setting.ranks // K} --k {K}"
    options += f" --image-size {setting.image_size} --trunk {setting.trunk} --json"
    command = [sys.executable, "-m", "trainer.cli", "plan", "--calibrate", str(profile), *options.split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout)["images_per_s"])


def table(best: dict[Setting, dict[str, Any]], rows: list[dict[str, Any]]) -> str:
    """Images/s as measured on the diagonal; the errors of what was foretold of a column from a row."""
    cells = {(row["calibrated_on"], row["asked_for"]): f"{row['error']:+.1%}" for row in rows}
    cells |= {(str(setting), str(setting)): f"{found['images_per_s']:.1f}/s" for setting, found in best.items()}
    names = [str(setting) for setting in best]
    lines = [f"| calibrated on, asked for | {' | '.join(names)} |", "|---|" + "---:|" * len(names)]
    lines += [f"| {row} | {' | '.join(cells[row, column] for column in names)} |" for row in names]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "plan_accuracy.json")
    args = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    best: dict[Setting, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="facescale-plan-") as folder:
        shards = draw_shards(Path(folder), 40)
        for number in range(args.rounds):
            for setting in SETTINGS:
                asked = Namespace(
                    steps=args.steps, warmup=args.warmup, trunk=setting.trunk, image_size=setting.image_size
                )
                found = profiled(shards, setting.ranks, setting.images, cores, asked)
                print(f"round {number + 1}: {setting}: {found['images_per_s']:.1f} images/s", flush=True)
                if setting not in best or found["images_per_s"] > best[setting]["images_per_s"]:
                    best[setting] = found
        files = {setting: Path(folder) / f"profile-{place}.json" for place, setting in enumerate(SETTINGS)}
        for setting, file in files.items():
            file.write_text(json.dumps(best[setting]))
        rows = []
        for known, asked_for in permutations(SETTINGS, 2):
            measured, said = best[asked_for]["images_per_s"], foretold(files[known], asked_for)
            row = {"calibrated_on": str(known), "asked_for": str(asked_for), "measured": round(measured, 2)}
            rows.append(row | {"foretold": round(said, 2), "error": round(said / measured - 1, 4)})
    errors = [abs(row["error"]) for row in rows]
    told = {"mean": round(mean(errors), 4), "largest": max(errors), "of": len(errors)}
    told["within_15_percent"] = sum(error <= 0.15 for error in errors)
    report = {"machine": machine("torch", "nvidia-dali-cuda130"), "errors": told, "rows": rows}
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    print(table(best, rows))
    print(told)
    return 0


if __name__ == "__main__":
    sys.exit(main())
