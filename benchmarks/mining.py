"""Batch-hard mining and its loss, forward and backward, beside pytorch-metric-learning, a masked matrix and the bare product.

    python benchmarks/mining.py [--rounds 3] [--sizes 8192x128 …] [--out benchmarks/results/mining.json]

Every measurement is a process of its own (peak memory is a process's). Contenders take turns. N embeddings of d dimensions in
identities of 4, float32, margin 0.2, root distance, loss averaged over active triplets. `product` is the N x N x d matrix
product alone, forward alone, into memory that is there already. What the file holds of other sizes stays. Needs `pip install
pytorch-metric-learning` for that contender.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.measure import has, machine, memory, reset_peak

CONTENDERS = ("facescale", "masked matrix", "pytorch-metric-learning", "product")
SIZES = ((1024, 128), (4096, 128), (8192, 128), (16384, 128), (32768, 128), (1024, 512), (8192, 512), (32768, 512))
LARGEST = {"pytorch-metric-learning": 16384, "masked matrix": 16384}
"""More does not fit 24 GiB."""
MARGIN, IMAGES = 0.2, 4


def measured(contender: str, count: int, size: int) -> dict[str, float]:
    """Seconds of forward and backward (median of some), peak extra memory in MiB, and the loss; in this process."""
    import torch
    from torch.nn.functional import normalize

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    generator = torch.Generator().manual_seed(count + size)
    embeddings = normalize(torch.randn(count, size, generator=generator)).requires_grad_()
    identities = torch.arange(count // IMAGES).repeat_interleave(IMAGES)
    run = _contender(contender, embeddings, identities)
    small = embeddings[:256].detach().requires_grad_()
    _contender(contender, small, identities[:256])()  # imports and thread pools are nobody's memory
    times, peaks, loss = [], [], 0.0
    for _ in range(3 if count > 8192 else 5):
        embeddings.grad = None
        before = reset_peak()
        started = time.perf_counter()
        loss = run()
        times.append(time.perf_counter() - started)
        peaks.append(memory("VmHWM") - before)
    return {"seconds": statistics.median(times), "peak_mib": max(peaks), "loss": loss}


def _contender(name, embeddings, identities):
    import torch

    if name == "facescale":
        from trainer.metric.losses import Objective
        from trainer.metric.pool import Pool

        ours = Objective(
            kind="margin", mining="batch_hard", margin=MARGIN, sharpness=1, squared=False, average="active"
        )

        def run():
            found = ours(Pool.of(embeddings, identities), IMAGES)
            loss = found.total / found.divisor.clamp(min=1)
            loss.backward()
            return loss.item()

    elif name == "masked matrix":

        def run():
            square = (2 - 2 * embeddings @ embeddings.T).clamp(min=1e-12)
            distance = square.sqrt()
            same = identities[:, None] == identities[None]
            own = torch.eye(len(identities), dtype=torch.bool)
            positive = distance.masked_fill(~same | own, -1).max(1).values
            negative = distance.masked_fill(same, 9).min(1).values
            losses = (positive - negative + MARGIN).clamp(min=0)
            loss = losses.sum() / (losses > 0).sum().clamp(min=1)
            loss.backward()
            return loss.item()

    elif name == "pytorch-metric-learning":
        from pytorch_metric_learning.losses import TripletMarginLoss
        from pytorch_metric_learning.miners import BatchHardMiner

        mine, criterion = BatchHardMiner(), TripletMarginLoss(margin=MARGIN)

        def run():
            loss = criterion(embeddings, identities, mine(embeddings, identities))
            loss.backward()
            return loss.item()

    else:
        out = torch.empty(len(embeddings), len(embeddings))
        plain = embeddings.detach()

        def run():
            torch.mm(plain, plain.T, out=out)
            return 0.0

    return run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sizes", nargs="*", default=[f"{count}x{size}" for count, size in SIZES], help="N x d")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measured(args.one[0], int(args.one[1]), int(args.one[2]))))
        return 0
    found = json.loads(args.out.read_text())["sizes"] if args.out and args.out.is_file() else {}
    for count, size in (map(int, asked.split("x")) for asked in args.sizes):
        taken: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
        for number in range(args.rounds):
            shift = number % len(CONTENDERS)
            for name in CONTENDERS[shift:] + CONTENDERS[:shift]:
                fits = count <= LARGEST.get(name, count) and not (number >= 3 and count > 8192)
                if fits and (name != "pytorch-metric-learning" or has("pytorch-metric-learning")):
                    command = [sys.executable, __file__, "--one", name, str(count), str(size)]
                    done = subprocess.run(command, check=True, capture_output=True, text=True)
                    taken[name].append(json.loads(done.stdout.splitlines()[-1]))
        row = found[f"{count} x {size}"] = {name: _summary(runs) for name, runs in taken.items() if runs}
        print(f"{count} x {size}: {json.dumps(row)}", flush=True)
    result = {"machine": machine("torch", "pytorch-metric-learning"), "rounds": args.rounds, "sizes": found}
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def _summary(runs: list[dict[str, float]]) -> dict[str, float]:
    seconds = sorted(run["seconds"] for run in runs)
    return {
        "milliseconds": round(1000 * statistics.median(seconds), 1),
        "fastest": round(1000 * seconds[0], 1),
        "slowest": round(1000 * seconds[-1], 1),
        "peak_mib": round(statistics.median(run["peak_mib"] for run in runs), 1),
        "loss": round(runs[0]["loss"], 6),
    }


if __name__ == "__main__":
    sys.exit(main())
