"""`facescale report` on the command line."""

import argparse
from collections.abc import Callable
from pathlib import Path

ADD = Callable[..., argparse.ArgumentParser]


def add_report(add: ADD) -> None:
    text = "Write RUN/report: results as JSON and Markdown, curves, t-SNE, ROC and CMC as PNG."
    parser = add("report", text, _report)
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder that `facescale evaluate` has judged")


def _report(args: argparse.Namespace) -> int:
    from trainer.evaluation.report import write_report

    folder = write_report(args.run)
    print((folder / "results.md").read_text().split("\n## ")[0])
    print(f"Report: {folder / 'results.md'}; pictures: {', '.join(sorted(path.name for path in folder.glob('*.png')))}")
    return 0
