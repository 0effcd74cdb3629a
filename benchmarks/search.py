"""Exact search beside faiss, torch, scikit-learn and pytorch-metric-learning; TAR@FAR over all pairs beside the bare products.

    python benchmarks/search.py [--rounds 3] [--gallery 100000 1000000] [--pairs 50000] [--approximate 100000]

Unit vectors of 128 dimensions around centres, 10,000 probes, k = 5, all cores. Contenders take turns in one process; the
neighbours that each finds are compared with ours. `pairs`: all pairs of 50,000 embeddings of 2,500 identities, four FARs, a
process of its own. What is not asked for (`--gallery` without sizes, 0) stays in the results as it is.
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
SLOW = 120
"""Seconds; a contender that takes longer has one round."""
FARS = (0.1, 0.01, 1e-3, 1e-6)


def faces(count: int, identities: int, seed: int) -> tuple[Any, Any]:
    import torch
    from torch.nn.functional import normalize

    centres = torch.randn(identities, SIZE, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(identities, (count,), generator=generator)
    return normalize(centres[labels] + 1.5 * torch.randn(count, SIZE, generator=generator)), labels


def measured_search(gallery_size: int, rounds: int) -> dict[str, Any]:
    """Seconds of each contender, ratios to bare faiss in the same round, and the share of probes with the same neighbours."""
    gallery, _ = faces(gallery_size, gallery_size // 20, 1)
    probes, _ = faces(PROBES, gallery_size // 20, 2)
    contenders = _contenders(gallery, probes, gallery_size)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    found: dict[str, Any] = {}
    for number in range(rounds):
        names = [name for name in contenders if not (number and seconds[name][0] > SLOW)]
        for name in names[number % len(names) :] + names[: number % len(names)]:
            begun = time.perf_counter()
            found[name] = contenders[name]()
            seconds[name].append(time.perf_counter() - begun)
            print(gallery_size, name, round(seconds[name][-1], 2), flush=True)
    return {
        name: spread(times)
        | {"rounds": len(times), "x faiss": spread(_ratios(times, seconds["faiss.IndexFlatIP"]))}
        | {"equal": _equal(found[name], found["facescale"])}
        for name, times in seconds.items()
    }


def _ratios(times: list[float], others: list[float]) -> list[float]:
    return [mine / other for mine, other in zip(times, others, strict=False)]


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

    def by_sklearn() -> Any:
        from sklearn.neighbors import NearestNeighbors

        neighbours = NearestNeighbors(n_neighbors=NEIGHBOURS, algorithm="brute", n_jobs=-1).fit(gallery.numpy())
        return torch.from_numpy(neighbours.kneighbors(probes.numpy(), return_distance=False))

    contenders = {
        "facescale": lambda: search(gallery, probes, NEIGHBOURS)[1],
        "facescale, float32 alone": lambda: _without_bf16(lambda: search(gallery, probes, NEIGHBOURS)[1]),
        "faiss.IndexFlatIP": bare,
        "torch, product and topk": by_torch,
        "scikit-learn, brute": by_sklearn,
    }
    if has("pytorch-metric-learning"):
        from pytorch_metric_learning.distances import CosineSimilarity
        from pytorch_metric_learning.utils.inference import CustomKNN

        knn = CustomKNN(CosineSimilarity(), batch_size=2**27 // size)
        contenders["pytorch-metric-learning, CustomKNN"] = lambda: knn(
            probes, NEIGHBOURS, gallery, ref_includes_query=False
        )[1]
    return contenders


def _without_bf16(found: Callable[[], Any]) -> Any:
    """As on a CPU without instructions for it."""
    from trainer.evaluation.search import torch_search

    kept, torch_search.cpu_has_bf16 = torch_search.cpu_has_bf16, lambda: False
    try:
        return found()
    finally:
        torch_search.cpu_has_bf16 = kept


def measured_approximate(gallery_size: int, _: int) -> dict[str, Any]:
    """Seconds of building and searching once, the recall of 1,000 probes taken exactly included, and that recall."""
    from trainer.evaluation.index import search
    from trainer.evaluation.search.approximate import ApproximateConfig, search_approximately

    gallery, _ = faces(gallery_size, gallery_size // 20, 1)
    probes, _ = faces(PROBES, gallery_size // 20, 2)
    exact = search(gallery, probes, NEIGHBOURS)[1]
    found = {}
    for config in (
        ApproximateConfig(),
        ApproximateConfig(probed=128),
        ApproximateConfig(method="ivfpq"),
        ApproximateConfig(method="ivfpq", candidates=40),
        ApproximateConfig(method="hnsw"),
    ):
        begun = time.perf_counter()
        result = search_approximately(gallery, probes, NEIGHBOURS, config)
        took = time.perf_counter() - begun
        whole = (result.positions[:, :, None] == exact[:, None, :]).any(1).double().mean()
        name = f"{config.method}, {'effort' if config.method == 'hnsw' else 'probed'} "
        name += f"{config.effort if config.method == 'hnsw' else config.probed}, candidates {config.candidates}"
        found[name] = {"seconds": round(took, 2), "recall": result.recall, "recall of all probes": float(whole)}
        print(gallery_size, name, found[name], flush=True)
    return found


def measured_pairs(count: int, rounds: int) -> dict[str, Any]:
    """Seconds of TAR@FAR and of the histograms over all pairs, of the products that they need, into memory that is there, and the
    peak MiB of the process with TAR@FAR, and beyond what it had before."""
    from trainer.evaluation.search.all_pairs import operating_points_of_all_pairs, sorted_by_identity
    from trainer.evaluation.search.distance_histograms import distance_histograms

    samples = sorted_by_identity(*faces(count, count // 20, 3))
    seconds: dict[str, list[float]] = {"TAR@FAR": [], "bare products": [], "histograms": []}
    before, peak, points = reset_peak(), 0.0, []
    for number in range(rounds):
        seconds["TAR@FAR"].append(_timed(lambda: points.append(operating_points_of_all_pairs(samples, FARS))))
        peak = peak if number else memory("VmHWM")
        seconds["bare products"].append(_timed(lambda: _products(samples.embeddings)))
        seconds["histograms"].append(_timed(lambda: distance_histograms(samples)))
        print(count, {name: round(times[-1], 2) for name, times in seconds.items()}, flush=True)
    return {
        "pairs": samples.impostor_pairs + samples.genuine_pairs,
        "seconds": {name: spread(times) for name, times in seconds.items()},
        "x bare products": {
            name: spread(_ratios(seconds[name], seconds["bare products"])) for name in ("TAR@FAR", "histograms")
        },
        "peak_mib": round(peak),
        "peak_extra_mib": round(peak - before),
        "tar": [getattr(point, "tar", None) for point in points[-1]],
    }


def _timed(work: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def _products(embeddings: Any) -> None:
    """Of all pairs, in the blocks in which they are fastest here."""
    import torch

    rows, columns = 2048, 1024
    out = torch.empty(rows * columns)
    for row in range(0, len(embeddings), rows):
        mine = embeddings[row : row + rows]
        for column in range(row, len(embeddings), columns):
            theirs = embeddings[column : column + columns]
            torch.mm(mine, theirs.T, out=out[: len(mine) * len(theirs)].view(len(mine), len(theirs)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--gallery", type=int, nargs="*", default=[100_000, 1_000_000])
    parser.add_argument("--pairs", type=int, default=50_000)
    parser.add_argument("--approximate", type=int, default=100_000)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "search.json")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        measure = {"search": measured_search, "pairs": measured_pairs, "approximate": measured_approximate}[args.one[0]]
        print(json.dumps(measure(int(args.one[1]), args.rounds)))
        return 0
    found: dict[str, Any] = {"machine": machine("torch", "faiss-gpu", "scikit-learn", "pytorch-metric-learning")}
    if args.out.is_file():
        found = json.loads(args.out.read_text()) | found
    todo = [("search", size) for size in args.gallery]
    todo += [(kind, size) for kind, size in (("pairs", args.pairs), ("approximate", args.approximate)) if size]
    for kind, size in todo:
        command = [sys.executable, __file__, "--rounds", str(args.rounds), "--one", kind, str(size)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ)
        found[f"{kind} {size}"] = json.loads(done.stdout.splitlines()[-1])
        print(kind, size, json.dumps(found[f"{kind} {size}"], indent=1), flush=True)
        args.out.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
