"""Compares the ratios of two `bench.json`s and fails on a real loss: one outside both spreads and beyond a tolerance.

    python benchmarks/check.py NEW [--stored benchmarks/results/bench/bench.json] [--tolerance 0.15]

Only ratios of things that ran side by side are compared, never seconds: they mean the same on another machine, more or less.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

STORED = Path(__file__).parent / "results" / "bench" / "bench.json"


def losses(stored: dict[str, Any], new: dict[str, Any], tolerance: float) -> list[str]:
    """A line for each ratio whose median fell below the stored lower quartile, whose upper quartile fell below the stored
    median, and which lost more than a share `tolerance` of the stored median. Ratios that one side lacks are passed over."""
    found = []
    for name, was in stored["ratios"].items():
        now = new["ratios"].get(name)
        if now is None:
            continue
        apart = now["median"] < was["lower_quartile"] and now["upper_quartile"] < was["median"]
        if apart and now["median"] < (1 - tolerance) * was["median"]:
            spread = f"{now['lower_quartile']} to {now['upper_quartile']}"
            found.append(f"{name}: {now['median']} ({spread}), was {was['median']}")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("new", type=Path)
    parser.add_argument("--stored", type=Path, default=STORED)
    parser.add_argument("--tolerance", type=float, default=0.15, help="share of a ratio that may be lost, in [0, 1)")
    args = parser.parse_args(argv)
    try:
        stored, new = (json.loads(path.read_text()) for path in (args.stored, args.new))
        compared = sorted(set(stored["ratios"]) & set(new["ratios"]))
        found = losses(stored, new, args.tolerance)
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"check: cannot compare {args.new} with {args.stored}: {type(error).__name__} {error}", file=sys.stderr)
        return 2
    if not compared:
        print(f"check: {args.new} and {args.stored} have no ratio in common", file=sys.stderr)
        return 2
    for line in found:
        print(f"check: LOST {line}")
    print(f"check: {len(compared)} ratios compared, {len(found)} lost more than {args.tolerance:.0%} and their spread")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
