"""Shards from a store: how good the batches of windowed plans are, how fast bytes come, and what training makes of both.

    python benchmarks/streaming.py [--only quality speed training] [--identities 80] [--images 30] [--steps 150] [--seeds 2]

- quality: of a set of VGGFace2's shape (--scale of its identities), laid out by the conversion's own plan, from the index alone:
  the exact plan, windows of several sizes, and a plain stream through a shuffle buffer.
- speed: images/s of the loader and of its reader alone, from a folder, from an HTTP server on this machine that answers after
  --delays ms, and from the cache.
- training: Rank-1 on unseen identities after equally many images, exact against windowed.
"""

import argparse
import json
import multiprocessing
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks.measure import machine, spread  # noqa: E402
from data_shards.augment import AugmentConfig  # noqa: E402
from data_shards.convert import ConvertConfig, convert  # noqa: E402
from data_shards.index import SAMPLE, ShardSet, Split  # noqa: E402
from data_shards.listing import ROW  # noqa: E402
from data_shards.loader import Loader, LoaderConfig, training_loader  # noqa: E402
from data_shards.plan import Plan, PlanConfig  # noqa: E402
from data_shards.plan_quality import quality_of, stream_quality  # noqa: E402
from data_shards.reader import open_reader  # noqa: E402
from data_shards.shard_plan import plan_shards  # noqa: E402
from data_shards.stream_config import StreamConfig  # noqa: E402
from data_shards.synthetic import synthesize  # noqa: E402
from data_shards.windowed_plan import WindowedPlan, plan_of  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "streaming.json"
VGGFACE2 = {"identities": 8631, "mean": 364, "deviation": 100, "least": 80, "most": 843, "bytes": 50_000}
"""Images of each training identity; encoded bytes of each image."""
BATCHES = 40
COMMON = (
    "--data.image-size 48 --plan.identities-per-batch 24 --plan.images-per-identity 4 --model.trunk resnet18 "
    "--augment.mirror 0 --augment.crop-area 0.85 1 --augment.brightness 0.05 --augment.contrast 0.05 "
    "--augment.saturation 0.05 --augment.greyscale 0 --optimizer.learning-rate 3e-3 --optimizer.warmup-steps 20 "
    "--run.evaluate-images 2000 --run.checkpoint-every 100000 --run.no-tensorboard --guard.action warn --run.device cpu"
)


def drawn_index(scale: float, seed: int = 0) -> np.ndarray:
    """Index rows of a set of VGGFace2's shape as `facescale shard` would lay it out, of `SAMPLE`; no picture is made."""
    random = np.random.default_rng(seed)
    identities = max(64, round(VGGFACE2["identities"] * scale))
    counts = random.normal(VGGFACE2["mean"], VGGFACE2["deviation"], identities).round()
    counts = counts.clip(VGGFACE2["least"], VGGFACE2["most"]).astype(int)
    rows = np.zeros(int(counts.sum()), ROW)
    rows["identity"] = np.repeat(np.arange(identities), counts)
    rows["draw"] = random.integers(0, 2**63, len(rows))
    rows["size"] = VGGFACE2["bytes"]
    names = [f"n{number:06d}" for number in range(identities)]
    plan = plan_shards(rows, names, np.ones(len(rows), bool), ConvertConfig())
    samples = np.zeros(len(rows), SAMPLE)
    samples["identity"] = rows["identity"]
    for number, shard in enumerate(plan.shards):
        own = plan.order[int(shard["start"]) : int(shard["stop"])]
        samples["shard"][own], samples["offset"][own] = number, np.arange(len(own))
    return samples


def quality(scale: float, p: int, k: int, epochs: int, windows: list[int]) -> dict[str, Any]:
    samples = drawn_index(scale)
    starts = np.append(np.flatnonzero(np.diff(samples["identity"].astype(int), prepend=-1)), len(samples))
    tars = int(samples["shard"].max()) + 1
    found: dict[str, Any] = {}
    exact = PlanConfig(identities_per_batch=p, images_per_identity=k)
    found["exact"] = quality_of(Plan(starts, exact), samples["identity"], epochs).plain()
    for window in windows:
        asked = PlanConfig(identities_per_batch=p, images_per_identity=k, window_shards=window)
        plan = WindowedPlan(starts, samples["shard"], asked)
        found[f"window of {window}"] = quality_of(plan, samples["identity"], epochs).plain()
        print(f"window of {window}", found[f"window of {window}"], flush=True)
    for buffer in (0, 10_000):
        name = f"stream, shuffle buffer of {buffer:,}"
        found[name] = stream_quality(samples, p * k, buffer=buffer, epochs=epochs).plain()
    about = {"identities": len(starts) - 1, "images": len(samples), "tars": tars, "p": p, "k": k, "epochs": epochs}
    return about | {"plans": found}


class Handler(BaseHTTPRequestHandler):
    """A file, or a range of it, after a delay."""

    protocol_version = "HTTP/1.1"
    root, delay = Path(), 0.0

    def do_GET(self) -> None:
        time.sleep(self.delay)
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        with open(self.root / self.path.lstrip("/"), "rb") as file:
            file.seek(int(asked[1]) if asked else 0)
            data = file.read(int(asked[2]) + 1 - int(asked[1]) if asked else -1)
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    request_queue_size = 64


def _serve(root: Path, delay: float, port: Any) -> None:
    Handler.root, Handler.delay = root, delay
    server = Server(("127.0.0.1", 0), Handler)
    port.put(server.server_address[1])
    server.serve_forever()


@contextmanager
def served(root: Path, delay: float) -> Iterator[str]:
    context = multiprocessing.get_context("spawn")
    port = context.Queue()
    process = context.Process(target=_serve, args=(root, delay, port), daemon=True)
    process.start()
    try:
        yield f"http://127.0.0.1:{port.get()}"
    finally:
        process.terminate()
        process.join()


def _loader_rate(split: Split, window: int) -> tuple[float, Loader]:
    """Images/s of 64 x 4 batches of 112 px behind the first two."""
    config = PlanConfig(identities_per_batch=16, images_per_identity=4, window_shards=window)
    loader = training_loader(split, plan_of(split, config), LoaderConfig(image_size=112), AugmentConfig())
    next(loader)
    next(loader)
    begun = time.perf_counter()
    for _ in islice(loader, BATCHES):
        pass
    return BATCHES * config.batch_size / (time.perf_counter() - begun), loader


def _reader_rate(split: Split, window: int) -> float:
    """Images/s of the reader alone, with the loader's read-ahead."""
    config = PlanConfig(identities_per_batch=16, images_per_identity=4, window_shards=window)
    reader, coming = open_reader(split), []
    begun = time.perf_counter()
    for draws in plan_of(split, config).batches(0, 0, 1, BATCHES):
        reader.hold(draws.shards)
        reader.read_ahead(draws.samples)
        coming.append(draws.samples)
        if len(coming) > reader.read_ahead_batches:
            reader.read(coming.pop(0))
    for samples in coming:
        reader.read(samples)
    return BATCHES * config.batch_size / (time.perf_counter() - begun)


def speed(shards: Path, folder: Path, window: int, delays: list[float], rounds: int) -> dict[str, Any]:
    """Rates from a cold and a warm cache by delay; each round begins with an empty cache."""
    found: dict[str, list[float]] = {}

    def note(name: str, split: Split, at: int) -> None:
        found.setdefault(f"{name}, loader", []).append(_loader_rate(split, at)[0])
        found.setdefault(f"{name}, reader", []).append(_reader_rate(split, at))

    local = ShardSet.open(shards).split("train")
    for number in range(rounds):
        note("folder", local, 0)
        for delay in delays:
            with served(shards, delay / 1000) as url:
                for name, at, size in (
                    ("exact", 0, 0.0),
                    ("exact, warm cache", 0, 9.0),
                    (f"window of {window}", window, 9.0),
                ):
                    for part, rate in (("loader", lambda s, w: _loader_rate(s, w)[0]), ("reader", _reader_rate)):
                        cache = folder / f"{number}-{delay}-{at}-{size}-{part}"
                        stream = StreamConfig(cache_dir=cache, cache_gb=size)
                        split = ShardSet.open(url, stream).split("train")
                        if "warm" in name:
                            open_reader(split).read(np.arange(len(split)))
                        key = f"http after {delay:g} ms, {name}, {part}"
                        found.setdefault(key, []).append(rate(split, at))
    return {
        "images": len(local),
        "tars": len(local.shards),
        "bytes": int(local.shard_bytes.sum()),
        "batches": BATCHES,
        "batch": 64,
        "images_per_s": {name: spread(values, 0) for name, values in found.items()},
    }


def training(shards: Path, windows: list[int], steps: int, seeds: int) -> dict[str, Any]:
    """Rank-1 after equally many images by window, 0 being the exact plan."""
    split = ShardSet.open(shards).split("train")
    found: dict[str, Any] = {
        "steps": steps,
        "batch": 96,
        "tars": len(split.shards),
        "images": len(split),
        "windows": {},
    }
    for window in windows:
        config = PlanConfig(identities_per_batch=24, images_per_identity=4, window_shards=window)
        plan = plan_of(split, config)
        ranks = [_rank1(shards, window, steps, seed) for seed in range(seeds)]
        found["windows"][str(window)] = {
            "rank1": ranks,
            "mean": round(statistics.mean(ranks), 4),
            "steps_per_epoch": plan.steps_per_epoch,
            "quality": quality_of(plan, split.samples["identity"], 3).plain(),
        }
        print("window", window, found["windows"][str(window)], flush=True)
    return found


def _rank1(shards: Path, window: int, steps: int, seed: int) -> float:
    with tempfile.TemporaryDirectory(prefix="facescale-streaming-") as folder:
        run = Path(folder, "run")
        command = [sys.executable, "-m", "trainer.train", *COMMON.split(), "--data.shards", str(shards)]
        command += ["--run.folder", str(run), "--run.seed", str(seed), "--run.steps", str(steps)]
        command += ["--run.evaluate-every", str(steps), "--plan.window-shards", str(window)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"window {window}: {done.stderr[-2000:]}")
        return float(json.loads((run / "evaluations.jsonl").read_text().splitlines()[-1])["rank1"])


def _shards(args: argparse.Namespace, folder: Path) -> Path:
    if args.shards:
        return args.shards
    synthesize(folder / "pictures", identities=args.identities, images_per_identity=args.images, size=args.size)
    config = ConvertConfig(shard_samples=args.shard_samples, holdout_identities=args.identities // 4)
    convert(folder / "pictures", folder / "shards", config)
    return folder / "shards"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="*", choices=["quality", "speed", "training"], default=["quality", "speed", "training"]
    )
    parser.add_argument("--scale", type=float, default=1.0, help="of VGGFace2's identities")
    parser.add_argument("--quality-windows", type=int, nargs="*", default=[64, 16, 4, 1], help="in tars")
    parser.add_argument("--epochs", type=int, default=1, help="whose quality is measured")
    parser.add_argument("--shards", type=Path, help="for speed and training, with unseen_identities; else drawn")
    parser.add_argument("--identities", type=int, default=80)
    parser.add_argument("--images", type=int, default=40)
    parser.add_argument("--size", type=int, default=112, help="of drawn pictures, in pixels")
    parser.add_argument("--shard-samples", type=int, default=120)
    parser.add_argument(
        "--windows", type=int, nargs="*", default=[0, 10, 5, 2], help="of training; 0 is the exact plan"
    )
    parser.add_argument("--window", type=int, default=5, help="of speed")
    parser.add_argument("--delays", type=float, nargs="*", default=[0, 20], help="ms until the server answers")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, default=2)
    args = parser.parse_args()
    RESULTS.parent.mkdir(exist_ok=True)
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    results["machine"] = machine("torch", "fsspec", "aiohttp")
    with tempfile.TemporaryDirectory(prefix="facescale-streaming-") as name:
        folder = Path(name)
        if "quality" in args.only:
            results["quality"] = quality(args.scale, 64, 4, args.epochs, args.quality_windows)
        shards = _shards(args, folder) if set(args.only) - {"quality"} else Path()
        if "speed" in args.only:
            results["speed"] = speed(shards, folder, args.window, args.delays, args.rounds)
        if "training" in args.only:
            results["training"] = training(shards, args.windows, args.steps, args.seeds)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
