"""Images a second from the bytes of tars to augmented batches: facescale, what it could reach at most, and its peers.

    python benchmarks/loader.py [--pictures 137x180 224x224 500x375] [--sizes 112 224] [--rounds 7] [--cold]

Each contender is a process of its own; in each round they take turns, in an order that turns, too. DataLoaders first try 0 to 3
workers, on the first set, and keep the best. Warm: the page cache holds everything. Cold: before each turn the kernel is told to
forget the files of the set (posix_fadvise); what the disk keeps in caches of its own stays.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks.loader_peers import BATCH, CONTENDERS, HAVE_WORKERS, Work  # noqa: E402
from benchmarks.measure import machine, spread  # noqa: E402

PACKAGES = (
    "torch",
    "torchvision",
    "nvidia-dali-cuda130",
    "webdataset",
    "simplejpeg",
    "spdl",
    "pillow",
    "opencv-python-headless",
)
SECONDS = 1.0
"""What a turn should take; 8 batches at least."""
RATIOS = {
    "facescale / best DataLoader": ("facescale", "best DataLoader"),
    "facescale / DALI's own reader": ("facescale", "dali_webdataset"),
    "facescale uint8 / DALI's own reader, uint8": ("facescale_uint8", "dali_webdataset_uint8"),
    "facescale uint8 / DALI that only decodes": ("facescale_uint8", "dali_decode"),
    "facescale uint8 / floor": ("facescale_uint8", "floor"),
    "facescale / map-style": ("facescale", "map_style"),
    "facescale / SPDL": ("facescale", "spdl"),
}
LOADERS = tuple(name for name in CONTENDERS if name.startswith("torch_"))


class Contender:
    """A process that runs one loader and measures it on demand."""

    def __init__(self, name: str, work: Work) -> None:
        command = [
            sys.executable,
            __file__,
            "--serve",
            name,
            *map(str, (work.pictures, work.shards, work.size, work.workers)),
        ]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.work, self.shape = work, self._answer()["shape"]
        self._count = 8
        self._count = max(8, round(self._count * SECONDS / self.turn()["seconds"]))

    def turn(self, warm: int = 8) -> dict[str, Any]:
        """Seconds, CPU seconds, both of `images` images, and memory.

        Args:
            warm: batches taken before, more than any of the loaders holds ready.
        """
        assert self._process.stdin
        self._process.stdin.write(f"{warm} {self._count}\n")
        self._process.stdin.flush()
        return self._answer() | {"images": self._count * BATCH}

    def close(self) -> None:
        self._process.kill()
        self._process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("it ended")
        answer: dict[str, Any] = json.loads(line)
        return answer


def serve(name: str, work: Work) -> None:
    """In the contender's process: for each line "WARM COUNT" of stdin prints what COUNT batches cost."""
    import psutil
    import torch

    def family() -> list[Any]:
        return [psutil.Process(), *psutil.Process().children(recursive=True)]

    def cpu() -> float:
        return sum(times.user + times.system for times in (process.cpu_times() for process in family()))

    batches = CONTENDERS[name](work)
    first = next(batches)
    print(json.dumps({"shape": list(first.shape) if isinstance(first, torch.Tensor) else None}), flush=True)
    for line in sys.stdin:
        warm, count = map(int, line.split())
        for _ in range(warm):
            next(batches)
        begun, used = time.perf_counter(), cpu()
        for _ in range(count):
            batch = next(batches)
        found = {"seconds": time.perf_counter() - begun, "cpu": cpu() - used}
        found["pss_mib"] = sum(process.memory_full_info().pss for process in family()) / 2**20
        if isinstance(batch, torch.Tensor):
            found |= {"low": float(batch.min()), "high": float(batch.max())}
        print(json.dumps(found), flush=True)


def make_pictures(folder: Path, sizes: list[str], identities: int = 32, images: int = 15) -> None:
    """The same drawn faces as JPEGs (quality 90, with a sensor's noise) of each size, in folders and in shards."""
    import numpy as np
    from PIL import Image

    from data_shards.convert import ConvertConfig, convert
    from data_shards.synthetic import synthesize

    synthesize(folder / "drawn", identities=identities, images_per_identity=images, size=320, seed=3)
    rng = np.random.default_rng(0)
    for size in sizes:
        width, height = map(int, size.split("x"))
        side = max(width, height)
        for path in sorted((folder / "drawn").glob("*/*.jpg")):
            square = np.asarray(Image.open(path).convert("RGB").resize((side, side), Image.Resampling.LANCZOS))
            top, left = (side - height) // 2, (side - width) // 2
            picture = square[top : top + height, left : left + width] + rng.normal(0, 3, (height, width, 3))
            out = folder / size / "pictures" / path.parent.name / path.name
            out.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(out, quality=90)
        convert(
            folder / size / "pictures", folder / size / "shards", ConvertConfig(shard_samples=identities * images // 8)
        )


def best_workers(name: str, work: Work) -> int:
    """Of 0 to 3, by the better of two turns."""
    rates = {}
    for workers in (0, 1, 2, 3):
        contender = Contender(name, Work(work.pictures, work.shards, work.size, workers))
        turns = [contender.turn() for _ in range(2)]
        rates[workers] = max(turn["images"] / turn["seconds"] for turn in turns)
        contender.close()
    return max(rates, key=lambda workers: rates[workers])


def forget(folder: Path) -> None:
    """Asks the kernel to drop these files from the page cache."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            file = os.open(path, os.O_RDONLY)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(file)


def compare(
    folder: Path, size: int, rounds: int, names: list[str], cold: bool, workers: dict[str, int]
) -> dict[str, Any]:
    """All contenders on one set of pictures and one size of output.

    Args:
        workers: of DataLoaders, where that is settled already; what is found is added.
    """
    contenders: dict[str, Contender] = {}
    left_out = {}
    for name in names:
        work = Work(folder / "pictures", folder / "shards", size, 0)
        try:
            if name in HAVE_WORKERS and name not in workers:
                workers[name] = best_workers(name, work)
            chosen = Work(work.pictures, work.shards, size, workers.get(name, 0))
            contenders[name] = Contender(name, chosen)
        except RuntimeError as reason:
            left_out[name] = str(reason)
    check_alike(contenders, size)
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in contenders}
    for number in range(rounds):
        order = list(contenders)
        for name in order[number % len(order) :] + order[: number % len(order)]:
            if cold:
                forget(folder)
            turns[name].append(contenders[name].turn(0 if cold else 8))
    found: dict[str, Any] = {name: told(turns[name], contenders[name].work.workers) for name in contenders}
    for contender in contenders.values():
        contender.close()
    loaders = [name for name in LOADERS if name in contenders]
    if loaders:
        best = max(loaders, key=lambda name: found[name]["images_per_s"]["median"])
        turns["best DataLoader"] = turns[best]
    ratios = {
        name: spread([rate(a) / rate(b) for a, b in zip(turns[ours], turns[theirs], strict=True)])
        for name, (ours, theirs) in RATIOS.items()
        if ours in turns and theirs in turns
    }
    return {"contenders": found, "ratios": ratios, "left_out": left_out}


def check_alike(contenders: dict[str, Contender], size: int) -> None:
    """Shapes, and that float batches span what normalised pictures can."""
    for name, contender in contenders.items():
        if contender.shape is None:
            continue
        channels_last = contender.shape[-1] == 3
        assert contender.shape == ([BATCH, size, size, 3] if channels_last else [BATCH, 3, size, size]), name
        turn = contender.turn()
        if "uint8" not in name:
            assert -2.2 < turn["low"] < -1, (name, turn)
            assert 1 < turn["high"] < 2.7, (name, turn)


def parts(work: Work, batches: int = 60) -> dict[str, float]:
    """CPU microseconds an image of our loader's parts, and their share of all of its CPU time in percent."""
    from benchmarks.loader_peers import facescale_loader

    loader = facescale_loader(work)
    spent = {"plan": 0.0, "bytes": 0.0, "feed": 0.0}
    reader, draws = loader._reader, loader.draws

    def timed(name: str, function: Any) -> Any:
        def run(*args: Any) -> Any:
            begun = time.thread_time()
            try:
                return function(*args)
            finally:
                spent[name] += time.thread_time() - begun

        return run

    reader.read, reader.read_ahead = timed("bytes", reader.read), timed("bytes", reader.read_ahead)
    loader.draws = iter(timed("plan", draws.__next__), None)
    loader._decoder._source = timed("feed", loader._decoder._source)
    for _ in range(8):
        next(loader)
    before, begun = dict(spent), time.process_time()
    for _ in range(batches):
        next(loader)
    whole = time.process_time() - begun
    seconds = {name: value - before[name] for name, value in spent.items()}
    seconds["augmentation"] = seconds.pop("feed") - seconds["plan"] - seconds["bytes"]
    seconds["decode, crop, resize, mirror"] = whole - sum(seconds.values())
    us = {f"{name}, us": round(1e6 * value / batches / BATCH, 2) for name, value in seconds.items()}
    return us | {f"{name}, %": round(100 * value / whole, 2) for name, value in seconds.items()}


def sweep(work: Work, rounds: int) -> dict[str, Any]:
    """Images/s by the number of decoding threads and of batches read ahead, in turns."""
    from benchmarks.loader_peers import facescale_loader

    def pace(loader: Any) -> float:
        for _ in range(6):
            next(loader)
        begun = time.perf_counter()
        for _ in range(20):
            next(loader)
        return 20 * BATCH / (time.perf_counter() - begun)

    def variants(name: str, values: Sequence[int]) -> dict[str, Any]:
        return {f"{name} {value}": facescale_loader(work, **{name: value}) for value in values}

    loaders = variants("threads", (1, 2, 3, 4)) | variants("ahead", (2, 3, 4, 6))
    paces: dict[str, list[float]] = {name: [] for name in loaders}
    for _ in range(rounds):
        for name, loader in loaders.items():
            paces[name].append(pace(loader))
    return {name: spread(values, 0) for name, values in paces.items()}


def rate(turn: dict[str, Any]) -> float:
    return float(turn["images"] / turn["seconds"])


def told(turns: list[dict[str, Any]], workers: int) -> dict[str, Any]:
    return {
        "images_per_s": spread([rate(turn) for turn in turns], 1),
        "cpu_ms_per_image": spread([1000 * turn["cpu"] / turn["images"] for turn in turns]),
        "pss_mib": round(max(turn["pss_mib"] for turn in turns)),
        "workers": workers,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", nargs="*", default=["137x180", "224x224", "500x375"])
    parser.add_argument("--sizes", nargs="*", type=int, default=[112, 224])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", nargs="*", choices=tuple(CONTENDERS), default=list(CONTENDERS))
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--workers", type=int, help="of DataLoaders; without it the best of 0 to 3 on the first set")
    parser.add_argument("--work", type=Path, help="folder where the pictures lie or will lie")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "loader.json")
    parser.add_argument("--serve", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        name, pictures, shards, size, workers = args.serve
        serve(name, Work(Path(pictures), Path(shards), int(size), int(workers)))
        return 0
    workers = dict.fromkeys(HAVE_WORKERS, args.workers) if args.workers is not None else {}
    results: dict[str, Any] = {"machine": machine(*PACKAGES), "rounds": args.rounds, "cold": args.cold, "sets": {}}
    with tempfile.TemporaryDirectory(prefix="facescale-loader-") as temporary:
        folder = args.work or Path(temporary)
        if not (folder / "drawn").is_dir():
            make_pictures(folder, args.pictures)
        for pictures in args.pictures:
            for size in args.sizes:
                name = f"{pictures} -> {size}"
                found = compare(folder / pictures, size, args.rounds, args.only, args.cold, workers)
                ours = Work(folder / pictures / "pictures", folder / pictures / "shards", size, 0)
                found |= {"parts": parts(ours), "sweep": sweep(ours, args.rounds)}
                results["sets"][name] = found
                print(name, json.dumps(found["ratios"], indent=1), flush=True)
                for contender, figures in found["contenders"].items():
                    print(f"  {contender:24s} {figures}", flush=True)
                print(found["left_out"], found["parts"], found["sweep"], flush=True)
                args.out.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
