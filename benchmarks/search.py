"""Exact search beside faiss, torch, scikit-learn and pytorch-metric-learning; TAR@FAR over all pairs beside the bare products.

    python benchmarks/search.py [--rounds 3] [--gallery 100000 1000000] [--pairs 50000]

Unit vectors of 128 dimensions around centres, 10,000 probes, k = 5, all cores. Contenders take turns in one process; the
neighbours that each finds are compared with ours. `pairs`: all pairs of 50,000 embeddings of 2,500 identities, four FARs, a
process of its own.
Needs `pip install pytorch-metric-learning` for that contender.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks.measure import has, machine, memory, reset_peak, spread  # noqa: E402

PROBES, SIZE, NEIGHBOURS = 10_000, 128, 5
FARS = (0.1, 0.01, 1e-3, 1e-6)


def faces(count: int, identities: int, seed: int) -> tuple[Any, Any]:
    import torch
    from torch.nn.functional import normalize

    centres = torch.randn(identities, SIZE, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(identities, (count,), generator=generator)
    return normalize(centres[labels] + 1.5 * torch.randn(count, SIZE, generator=generator)), labels


def measured_search(gallery_size: int, rounds: int) -> dict[str, Any]:
    """Seconds of each contender, ratios to bare faiss, and the share of neighbours that equal ours."""
    gallery, _ = faces(gallery_size, gallery_size // 20, 1)
    probes, _ = faces(PROBES, gallery_size // 20, 2)
    contenders = _contenders(gallery, probes, gallery_size)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    found: dict[str, Any] = {}
    for number in range(rounds):
        names = list(contenders)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            if number and seconds[name][0] > 120:
                continue
            begun = time.perf_counter()
            found[name] = contenders[name]()
            seconds[name].append(time.perf_counter() - begun)
            print(gallery_size, name, round(seconds[name][-1], 2), flush=True)
    bare = spread(seconds["faiss.IndexFlatIP"])["median"]
    return {
        name: spread(times)
        | {"x faiss": round(spread(times)["median"] / bare, 2), "equal": _equal(found[name], found["facescale"])}
        for name, times in seconds.items()
    }


def _equal(theirs: Any, ours: Any) -> float:
    return float((theirs == ours).all(1).double().mean())


def _contenders(gallery: Any, probes: Any, size: int) -> dict[str, Callable[[], Any]]:
    import faiss
    import torch

    from trainer.evaluation.index import search

    def bare() -> Any:
        index = faiss.IndexFlatIP(SIZE)
        index.add(gallery.numpy())
        return torch.from_numpy(index.search(probes.numpy(), NEIGHBOURS)[1])

    def by_torch() -> Any:
        return torch.cat(
            [(block @ gallery.T).topk(NEIGHBOURS).indices for block in probes.split(max(1, 2**26 // size))]
        )

    contenders = {
        "facescale": lambda: search(gallery, probes, NEIGHBOURS)[1],
        "faiss.IndexFlatIP": bare,
        "torch": by_torch,
    }
    if size <= 100_000:
        from sklearn.neighbors import NearestNeighbors

        def by_sklearn() -> Any:
            neighbours = NearestNeighbors(n_neighbors=NEIGHBOURS, algorithm="brute", n_jobs=-1).fit(gallery.numpy())
            return torch.from_numpy(neighbours.kneighbors(probes.numpy(), return_distance=False))

        contenders["scikit-learn, brute"] = by_sklearn
        if has("pytorch-metric-learning"):
            from pytorch_metric_learning.distances import CosineSimilarity
            from pytorch_metric_learning.utils.inference import CustomKNN

            knn = CustomKNN(CosineSimilarity(), batch_size=1024)
            contenders["pytorch-metric-learning, CustomKNN"] = lambda: knn(
                probes, NEIGHBOURS, gallery, ref_includes_query=False
            )[1]
    return contenders


def measured_pairs(count: int, rounds: int) -> dict[str, Any]:
    """Seconds and peak extra MiB of TAR@FAR over all pairs, and of the products that it needs, into memory that is there."""
    from trainer.evaluation.all_pairs import _impostor_blocks, operating_points_of_all_pairs, sorted_by_identity

    samples = sorted_by_identity(*faces(count, count // 20, 3))
    seconds: dict[str, list[float]] = {"facescale": [], "bare products": []}
    before, peak, points = reset_peak(), 0.0, []
    for _ in range(rounds):
        begun = time.perf_counter()
        points = operating_points_of_all_pairs(samples, FARS)
        seconds["facescale"].append(time.perf_counter() - begun)
        peak = max(peak, memory("VmHWM") - before)
        begun = time.perf_counter()
        for _ in _impostor_blocks(samples):
            pass
        seconds["bare products"].append(time.perf_counter() - begun)
    ratio = [ours / bare for ours, bare in zip(*seconds.values(), strict=True)]
    return {
        "pairs": samples.impostor_pairs + samples.genuine_pairs,
        "seconds": {name: spread(times) for name, times in seconds.items()},
        "x bare products": spread(ratio),
        "peak_mib": peak,
        "tar": [getattr(point, "tar", None) for point in points],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--gallery", type=int, nargs="*", default=[100_000, 1_000_000])
    parser.add_argument("--pairs", type=int, default=50_000)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "search.json")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        measure = {"search": measured_search, "pairs": measured_pairs}[args.one[0]]
        print(json.dumps(measure(int(args.one[1]), args.rounds)))
        return 0
    found: dict[str, Any] = {"machine": machine("torch", "faiss-gpu", "scikit-learn", "pytorch-metric-learning")}
    for kind, size in [("search", size) for size in args.gallery] + ([("pairs", args.pairs)] if args.pairs else []):
        command = [sys.executable, __file__, "--rounds", str(args.rounds), "--one", kind, str(size)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ)
        found[f"{kind} {size}"] = json.loads(done.stdout.splitlines()[-1])
        print(kind, size, json.dumps(found[f"{kind} {size}"], indent=1), flush=True)
    args.out.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
