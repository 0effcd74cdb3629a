"""`facescale report`: one page, tables and pictures of one run or of several side by side, on the command line."""

import argparse
from collections.abc import Callable
from pathlib import Path

ADD = Callable[..., argparse.ArgumentParser]


def add_report(add: ADD) -> None:
    text = "Write RUN/report: one HTML page, results as Markdown and JSON, every figure as PNG."
    parser = add("report", text, _report)
    parser.add_argument(
        "run", type=Path, nargs="+", metavar="RUN", help="run folder that `facescale evaluate` has judged"
    )
    parser.add_argument("--out", type=Path, help="folder to make; RUN/report if not given; needed for several runs")
    parser.add_argument("--pdf", action="store_true", help="every figure as a vector PDF, too")


def _report(args: argparse.Namespace) -> int:
    from trainer.evaluation.report.write import write_report

    folder = write_report(args.run, out=args.out, pdf=args.pdf)
    print((folder / "results.md").read_text(encoding="utf-8").split("\n## ")[0])
    pictures = ", ".join(sorted(path.name for path in folder.glob("*.png")))
    print(f"Report: {folder / 'report.html'}; tables: {folder / 'results.md'}; pictures: {pictures}")
    return 0
