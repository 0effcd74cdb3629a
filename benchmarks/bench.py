"""`make bench`: every benchmark in a size meant for 15 minutes on two cores, their ratios, and the table in benchmarks/README.md.

    python benchmarks/bench.py [--only NAME ...] [--quick] [--out FOLDER] [--no-table]

Each benchmark is a process of its own and writes FOLDER/NAME.json; FOLDER/bench.json has the machine, the commit and all ratios,
each as median and quartiles, oriented so that more is better. `check.py` compares two of these files. `--quick` takes the few
that CI can afford.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks.measure import machine  # noqa: E402

README = ROOT / "benchmarks" / "README.md"
BEGIN, END = "<!-- make bench: begin -->", "<!-- make bench: end -->"
PACKAGES = (
    "torch",
    "nvidia-dali-cuda130",
    "faiss-gpu",
    "accelerate",
    "webdataset",
    "pytorch-metric-learning",
    "simplejpeg",
)
Spread = dict[str, float]
Ratios = Iterator[tuple[str, Spread]]


def upside_down(spread: Spread) -> Spread:
    """Of 1 / x."""
    low, high = spread["upper_quartile"], spread["lower_quartile"]
    return {"median": 1 / spread["median"], "lower_quartile": 1 / low, "upper_quartile": 1 / high}


def quotient(above: tuple[float, float, float], below: tuple[float, float, float]) -> Spread:
    """Of two figures that are given as median, low and high: the widest that their spreads allow."""
    return {
        "median": above[0] / below[0],
        "lower_quartile": above[1] / below[2],
        "upper_quartile": above[2] / below[1],
    }


def of_mining(found: dict[str, Any]) -> Ratios:
    for size, times in found["sizes"].items():
        told = {name: (row["milliseconds"], row["fastest"], row["slowest"]) for name, row in times.items()}
        for name in ("product", "masked matrix", "pytorch-metric-learning"):
            if name in told:
                yield f"mining {size}: {name} / facescale, time", quotient(told[name], told["facescale"])


def of_convert(found: dict[str, Any]) -> Ratios:
    names = ("images_per_s", "lower_quartile", "upper_quartile")
    told = {name: (row[names[0]], row[names[1]], row[names[2]]) for name, row in found["rates"].items()}
    for name in ("tar cf", "webdataset.ShardWriter loop"):
        yield (
            f"conversion: facescale / {name}, images/s",
            quotient(told["facescale shard --check header"], told[name]),
        )


def of_search(found: dict[str, Any]) -> Ratios:
    for name, part in found.items():
        if name.startswith("search "):
            yield f"{name}: faiss.IndexFlatIP / facescale, time", upside_down(part["facescale"]["x faiss"])
        elif name.startswith("pairs "):
            yield f"all {name}: bare products / TAR@FAR, time", upside_down(part["x bare products"]["TAR@FAR"])


def of_train_step(found: dict[str, Any]) -> Ratios:
    yield "step: bare loop / facescale, time", upside_down(found["loop"]["ours_over_bare"])
    yield "step: naive loop / facescale, time", found["loop"]["naive_over_ours"]


def of_loader(found: dict[str, Any]) -> Ratios:
    for name, part in found["sets"].items():
        for ratio, spread in part["ratios"].items():
            yield f"loader {name}: {ratio}, images/s", spread


def of_run(found: dict[str, Any]) -> Ratios:
    for row in found["rows"]:
        if row["efficiency"]:
            yield (
                f"whole run, {row['kind']} scaling, {row['ranks']} x {row['images_per_rank']} images: efficiency",
                row["efficiency"],
            )


def of_peers_loop(found: dict[str, Any]) -> Ratios:
    for batch, part in found["batches"].items():
        for name, row in part["speed"].items():
            if name != "facescale":
                yield f"whole loop, {batch}: {name} / facescale, time", row["x_ours"]


JOBS: dict[str, tuple[str, Callable[[dict[str, Any]], Ratios]]] = {
    "mining": ("mining.py --rounds 3 --sizes 1024x128 4096x128 8192x128", of_mining),
    "convert": ("convert.py --pictures 8000 --rounds 5", of_convert),
    "search": ("search.py --rounds 3 --gallery 100000 --pairs 20000 --approximate 0", of_search),
    "train_step": ("train_step.py --only loop exchange --steps 8", of_train_step),
    "loader": ("loader.py --pictures 224x224 --sizes 112 --rounds 3 --workers 2", of_loader),
    "run": ("run.py --rounds 2 --steps 5 --warmup 2", of_run),
    "peers_loop": ("peers_loop.py --rounds 3 --steps 1 --workers 1 --batches 16x4 --identities 60 20", of_peers_loop),
}
QUICK = {
    "mining": "mining.py --rounds 3 --sizes 4096x128",
    "loader": "loader.py --pictures 224x224 --sizes 112 --rounds 3 "
    "--only facescale_uint8 floor dali_decode dali_webdataset_uint8",
}


def run(names: list[str], out: Path, quick: bool = False) -> dict[str, Any]:
    """What bench.json holds."""
    ratios, seconds = {}, {}
    for name in names:
        command, extract = JOBS[name]
        script, *options = (QUICK[name] if quick else command).split()
        result = out / f"{name}.json"
        result.unlink(missing_ok=True)
        begun = time.perf_counter()
        subprocess.run([sys.executable, str(ROOT / "benchmarks" / script), *options, "--out", str(result)], check=True)
        seconds[name] = round(time.perf_counter() - begun, 1)
        for ratio, spread in extract(json.loads(result.read_text())):
            ratios[ratio] = {key: round(spread[key], 3) for key in ("median", "lower_quartile", "upper_quartile")}
    return {"machine": machine(*PACKAGES), "commit": commit(), "seconds": seconds, "ratios": ratios}


def commit() -> str:
    """Of the working tree, with + where it was changed since."""

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", "*.py")
    return (git("rev-parse", "--short=12", "HEAD") or "unknown") + ("+" if changed else "")


def table(found: dict[str, Any]) -> str:
    """In Markdown."""
    about = found["machine"]
    lines = [
        f"{about['cpu']}, {about['cores']} cores, Python {about['python']}, commit {found['commit']}; "
        f"{sum(found['seconds'].values()) / 60:.0f} minutes in all.",
        "",
        "| ratio, more is better | median | quartiles |",
        "|---|---:|---:|",
    ]
    for name, spread in found["ratios"].items():
        lines.append(
            f"| {name} | {spread['median']:.2f} | {spread['lower_quartile']:.2f} to {spread['upper_quartile']:.2f} |"
        )
    return "\n".join(lines)


def put_table(text: str, readme: Path) -> None:
    """Between the two marks."""
    before, rest = readme.read_text().split(BEGIN)
    readme.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=tuple(JOBS), default=list(JOBS))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "bench")
    parser.add_argument("--no-table", action="store_true", help="leave benchmarks/README.md as it is")
    parser.add_argument("--quick", action="store_true", help=f"only {', '.join(QUICK)}, in a small size")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    found = run([name for name in args.only if not args.quick or name in QUICK], args.out, args.quick)
    (args.out / "bench.json").write_text(json.dumps(found, indent=1) + "\n")
    if not args.no_table:
        put_table(table(found), README)
    print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
