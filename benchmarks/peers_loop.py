"""The whole training loop beside others: seconds an image, and Rank-1 on unseen identities after equal time.

    python benchmarks/peers_loop.py [--rounds 7] [--steps 3] [--batches 24x4] [--accuracy SECONDS] [--only NAME ...]

Same machine, same pictures (synthetic identities, JPEGs of `--picture-size`: folders for the others, shards of them for us), same
network, same optimiser; `peers_contenders.py` says what each does and what is assumed of the original project's way. Every
contender is a process that is stopped, its workers too, while it is not its turn. Those with a DataLoader first try `--workers`;
the fastest goes on. Then rounds: each, in another order each round, runs a step that does not count and `--steps` that do. Queues
of a DataLoader and of our loader are full when a turn begins. Ratios are of turns of one round. `--accuracy` starts all anew and
trains each for so many seconds, in slices that take turns. Needs the extra `bench`: pip install 'facescale[bench]'.

Other load on the cores makes steps several times as long, not in proportion: threads of a step wait for each other. The fastest
turns are told, too, for they are those that saw the quietest machine.
"""

import argparse
import atexit
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks.measure import has, machine, spread  # noqa: E402
from benchmarks.peers_contenders import CONTENDERS, FACESCALE, ORIGINAL, run  # noqa: E402
from benchmarks.peers_turns import REPLY  # noqa: E402

SLICE_S = 10.0
NEEDED = ("scikit-image", "pytorch-metric-learning")


class Contender:
    """A training loop in a process of its own, and its workers; all stopped but in its turns."""

    def __init__(self, name: str, workers: int, folder: Path, p: int, k: int, total_s: float | None = None) -> None:
        self.name, self.workers, self._log = name, workers, folder / "said.txt"
        command = [
            sys.executable,
            __file__,
            "--one",
            name,
            str(folder),
            str(p),
            str(k),
            str(workers),
            str(total_s or 0),
        ]
        with self._log.open("a") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=os.environ | {"PYTHONPATH": str(ROOT)},
                start_new_session=True,
            )
        atexit.register(self.end)
        self.take(steps=1, warm_up=True)

    def take(self, **asked: Any) -> dict[str, float]:
        """A turn: so many `steps`, or `seconds`; or `judge` pictures of a folder. What it found.

        A `warm_up` does not count as training time.
        """
        os.killpg(self._process.pid, signal.SIGCONT)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith(REPLY):
                os.killpg(self._process.pid, signal.SIGSTOP)
                found: dict[str, float] = json.loads(line.removeprefix(REPLY))
                return found
        raise SystemExit(f"{self.name} ended: {self._log.read_text()[-2000:]}")

    def end(self) -> None:
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


def draw(folder: Path, identities: int, unseen: int, images: int, size: int) -> None:
    """FOLDER/train and FOLDER/unseen in folders of identities, FOLDER/shards of the former."""
    from data_shards.convert import ConvertConfig, convert
    from data_shards.synthetic import synthesize

    synthesize(folder / "train", identities=identities + unseen, images_per_identity=images, size=size, seed=0)
    (folder / "unseen").mkdir()
    for identity in sorted((folder / "train").iterdir())[identities:]:
        identity.rename(folder / "unseen" / identity.name)
    convert(folder / "train", folder / "shards", ConvertConfig())


def fastest(name: str, folder: Path, p: int, k: int, workers: Sequence[int]) -> tuple[Contender, dict[str, float]]:
    """With as many workers as suit it best, and the median seconds a step with each number."""
    counts = (0,) if name.startswith(FACESCALE) else workers
    tried = [Contender(name, count, folder, p, k) for count in counts]
    if len(tried) == 1:
        return tried[0], {}
    seconds: dict[int, list[float]] = {each.workers: [] for each in tried}
    for _ in range(3):
        for each in tried:
            seconds[each.workers].append(each.take(steps=1)["seconds"])
    medians = {workers: median(values) for workers, values in seconds.items()}
    best = min(tried, key=lambda each: medians[each.workers])
    for each in tried:
        if each is not best:
            each.end()
    return best, {str(workers): round(value, 4) for workers, value in medians.items()}


def speeds(folder: Path, p: int, k: int, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds an image of each contender, and how many times ours that is, over interleaved rounds."""
    images = {name: 3 * (p * k // 3) if name == ORIGINAL else p * k for name in args.only}
    chosen, tried = {}, {}
    for name in args.only:
        chosen[name], tried[name] = fastest(name, folder, p, k, args.workers)
        print(f"{name}: {chosen[name].workers} workers; seconds a step by workers {tried[name]}", flush=True)
    found: dict[str, list[float]] = {name: [] for name in chosen}
    last: dict[str, dict[str, float]] = {}
    for number in range(args.rounds):
        order = list(chosen)
        random.Random(number).shuffle(order)
        for name in order:
            chosen[name].take(steps=1)
            last[name] = chosen[name].take(steps=args.steps)
            found[name].append(last[name]["seconds"] / last[name]["steps"] / images[name])
        print(f"round {number + 1}: " + ", ".join(f"{1e3 * found[name][-1]:.1f}" for name in chosen), "ms", flush=True)
    for each in chosen.values():
        each.end()
    table = {}
    for name, seconds in found.items():
        ratios = [theirs / ours for theirs, ours in zip(seconds, found[FACESCALE], strict=True)]
        table[name] = {
            "workers": chosen[name].workers,
            "s_per_image": spread(seconds, 6),
            "images_per_s": round(1 / median(seconds), 2),
            "x_ours": spread(ratios, 3),
            "least_s_per_image": round(min(seconds), 6),
            "least_x_ours": round(min(seconds) / min(found[FACESCALE]), 3),
            "s_per_step_by_workers": tried[name],
        }
        if "violating" in last[name]:
            table[name]["violating_triplets"] = round(last[name]["violating"], 4)
    return table


def accuracies(folder: Path, p: int, k: int, args: argparse.Namespace, workers: dict[str, int]) -> dict[str, Any]:
    """Rank-1 on unseen identities after equal time, which all spend in slices, by turns."""
    running = {name: Contender(name, workers.get(name, 0), folder, p, k, total_s=args.accuracy) for name in args.only}
    spent = dict.fromkeys(running, 0.0)
    steps = dict.fromkeys(running, 0.0)
    while waiting := [name for name in running if spent[name] < args.accuracy]:
        for name in waiting:
            told = running[name].take(seconds=min(SLICE_S, args.accuracy - spent[name]))
            spent[name], steps[name] = spent[name] + told["seconds"], steps[name] + told["steps"]
    found = {}
    for name, each in running.items():
        judged = each.take(judge=str(folder / "unseen"))
        found[name] = {"rank1": round(judged["rank1"], 4), "steps": int(steps[name]), "seconds": round(spent[name], 1)}
        print(f"{name}: {found[name]}", flush=True)
        each.end()
    return found


def lines(speed: dict[str, Any], accuracy: dict[str, Any]) -> str:
    head = "| loop | workers | ms an image | x ours | of the fastest turns | Rank-1 after equal time | steps |\n"
    head += "|---|---|---|---|---|---|---|"
    rows = [head]
    for name, row in speed.items():
        ms, ratio, judged = row["s_per_image"], row["x_ours"], accuracy.get(name)
        rank1 = f"{judged['rank1']:.1%}" if judged else ""
        rows.append(
            f"| {name} | {row['workers']} | {1e3 * ms['median']:.1f} ({1e3 * ms['lower_quartile']:.1f} to "
            f"{1e3 * ms['upper_quartile']:.1f}) | {ratio['median']:.2f} ({ratio['lower_quartile']:.2f} to "
            f"{ratio['upper_quartile']:.2f}) | {1e3 * row['least_s_per_image']:.1f} ms, {row['least_x_ours']:.2f} x | {rank1} | "
            f"{judged['steps'] if judged else ''} |"
        )
    return "\n".join(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3, help="of a turn that count")
    parser.add_argument("--batches", nargs="+", default=["24x4"], metavar="PxK", help="at least 64 images each")
    parser.add_argument("--accuracy", type=float, help="seconds of training of each contender")
    parser.add_argument("--only", nargs="+", choices=tuple(CONTENDERS), default=tuple(CONTENDERS))
    parser.add_argument(
        "--workers", type=int, nargs="+", default=(0, 1, 2), help="of a DataLoader: the fastest is taken"
    )
    parser.add_argument("--identities", type=int, nargs=2, default=(200, 100), metavar=("TRAIN", "UNSEEN"))
    parser.add_argument("--images-per-identity", type=int, default=20)
    parser.add_argument("--picture-size", type=int, default=160, help="side of the JPEGs that are read, in pixels")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "peers_loop.json")
    parser.add_argument("--one", nargs=6, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        name, folder, p, k, workers, total_s = args.one
        run(name, Path(folder), int(p), int(k), int(workers), float(total_s) or None)
        return 0
    if missing := [package for package in NEEDED if not has(package)]:
        parser.error(f"{', '.join(missing)} not installed: pip install 'facescale[bench]'")
    if FACESCALE not in args.only:
        parser.error(f"--only must name {FACESCALE!r}, to which the others are compared")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # contenders that are stopped would stay
    report: dict[str, Any] = {"machine": machine("torch", "torchvision", "nvidia-dali-cuda130", *NEEDED)}
    report |= {
        "picture_size": args.picture_size,
        "rounds": args.rounds,
        "steps": args.steps,
        "accuracy_s": args.accuracy,
        "batches": {},
    }
    with tempfile.TemporaryDirectory(prefix="facescale-peers-") as folder:
        draw(Path(folder), *args.identities, args.images_per_identity, args.picture_size)
        for batch in args.batches:
            p, k = map(int, batch.split("x"))
            speed = speeds(Path(folder), p, k, args)
            workers = {name: row["workers"] for name, row in speed.items()}
            accuracy = accuracies(Path(folder), p, k, args, workers) if args.accuracy else {}
            report["batches"][batch] = {"speed": speed, "rank1": accuracy}
            args.out.write_text(json.dumps(report, indent=1) + "\n")
            print(f"\n{batch}\n\n{lines(speed, accuracy)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
