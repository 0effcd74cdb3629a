"""Rates of the conversion beside `tar cf` and a `webdataset.ShardWriter` loop, its memory, and the index beside `wds2idx`.

    python benchmarks/convert.py [--pictures 20000] [--rounds 5] [--memory] [--out benchmarks/results/convert.json]

Every round runs each contender once, in another order, as a process of its own with everything that belongs to it: its start,
the listing, the fsync. The pictures are in the page cache; every output is deleted before the next.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.measure import machine

SHARD_WRITER = """
import pathlib, sys, webdataset
source, out = map(pathlib.Path, sys.argv[1:])
out.mkdir()
with webdataset.ShardWriter(str(out / "%06d.tar"), maxsize=2**28, verbose=0) as writer:
    for label, folder in enumerate(sorted(source.iterdir())):
        for path in sorted(folder.iterdir()):
            writer.write({"__key__": f"{folder.name}/{path.stem}", "jpg": path.read_bytes(), "cls": label})
"""


def draw(folder: Path, pictures: int, side: int, per_identity: int = 20) -> int:
    """JPEGs of some 15 KB at 200 pixels; returns their bytes."""
    import numpy as np
    from PIL import Image

    total = 0
    for identity in range(-(-pictures // per_identity)):
        (folder / f"n{identity:06d}").mkdir(parents=True)
        random = np.random.default_rng(identity)
        small = Image.fromarray(random.integers(0, 255, (24, 24, 3), dtype=np.uint8))
        base = np.asarray(small.resize((side, side), Image.Resampling.BICUBIC)).astype(np.int16)
        for number in range(min(per_identity, pictures - identity * per_identity)):
            noise = random.integers(-9, 10, (side, side, 1), dtype=np.int16)
            path = folder / f"n{identity:06d}" / f"{number:04d}.jpg"
            Image.fromarray((base + noise).clip(0, 255).astype(np.uint8)).save(path, quality=85)
            total += path.stat().st_size
    return total


def seconds_of(command: list[str], out: Path) -> float:
    os.sync()  # what the contender before has left to write or to discard is not this one's
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - started
    shutil.rmtree(out) if out.is_dir() else out.unlink(missing_ok=True)
    return seconds


def measure_rates(source: Path, scratch: Path, pictures: int, rounds: int) -> dict[str, dict[str, float]]:
    """Median images/s of each contender, and its quartiles."""
    out = scratch / "out"
    tar = f"tar cf {out} -C {source.parent} {source.name}"
    facescale = [sys.executable, "-m", "trainer.cli", "shard", str(source), str(out)]
    contenders = {
        "tar cf": ["sh", "-c", tar],
        "tar cf, then sync of that file": ["sh", "-c", f"{tar} && sync {out}"],
        "facescale shard --check header": [*facescale, "--check", "header"],
        "facescale shard --check header --workers 1": [*facescale, "--check", "header", "--workers", "1"],
        "facescale shard (decodes every picture)": facescale,
        "webdataset.ShardWriter loop": [sys.executable, "-c", SHARD_WRITER, str(source), str(out)],
    }
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        names = list(contenders)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            seconds = seconds_of(contenders[name], out)
            if number:  # the first round warms up
                taken[name].append(pictures / seconds)
    return {name: _spread(rates) for name, rates in taken.items()}


def measure_index(source: Path, scratch: Path, pictures: int, rounds: int) -> dict[str, dict[str, float]]:
    """Images/s of writing the index of one tar that is there already."""
    from data_shards.convert import ConvertConfig, convert

    convert(source, scratch / "shards", ConvertConfig(check="header", shard_bytes=2**40))
    (tar,) = (scratch / "shards" / "train").glob("*.tar")
    stock = scratch / "stock.idx"
    ours = "import sys; from data_shards.tar_index import write_tar_index; write_tar_index(sys.argv[1])"
    contenders = {
        "facescale shards index": [sys.executable, "-c", ours, str(tar)],
        "wds2idx": [sys.executable, f"{sys.prefix}/bin/wds2idx", str(tar), str(stock)],
    }
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, command in contenders.items():
            started = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            taken[name].append(pictures / (time.perf_counter() - started))
    assert stock.read_bytes() == tar.with_suffix(".idx").read_bytes(), "the offsets are not equal"
    shutil.rmtree(scratch / "shards")
    return {name: _spread(rates) for name, rates in taken.items()}


def measure_memory(scratch: Path, counts: tuple[int, ...] = (10_000, 200_000)) -> dict[str, float]:
    """Largest sum of the anonymous memory of all processes of a conversion, in MiB, by the number of pictures."""
    found = {}
    for count in counts:
        source, out = scratch / f"small{count}", scratch / "out"
        draw(source, count, side=16)
        command = [sys.executable, "-m", "trainer.cli", "shard", str(source), str(out), "--shard-mib", "16"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        peak = [0.0]
        watcher = threading.Thread(target=_watch, args=(process, peak))
        watcher.start()
        assert process.wait() == 0
        watcher.join()
        found[f"{count:,} pictures"] = round(peak[0], 1)
        shutil.rmtree(out)
        shutil.rmtree(source)
    return found


def _watch(process: subprocess.Popen[bytes], peak: list[float]) -> None:
    while process.poll() is None:
        peak[0] = max(peak[0], sum(map(_anonymous, [process.pid, *_children(process.pid)])))
        time.sleep(0.01)


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def _anonymous(pid: int) -> float:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon")), 0.0)


def _spread(rates: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(rates, n=4, method="inclusive") if len(rates) > 1 else (rates[0],) * 3
    return {"images_per_s": round(middle), "lower_quartile": round(low), "upper_quartile": round(high)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--memory", action="store_true", help="measure memory at 10,000 and 200,000 small pictures, too"
    )
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="facescale-bench-") as folder:
        scratch = Path(folder)
        source = scratch / "pictures"
        size = draw(source, args.pictures, side=200)
        rates = measure_rates(source, scratch, args.pictures, args.rounds)
        result = {
            "machine": machine("numpy", "pillow", "webdataset"),
            "pictures": args.pictures,
            "mean_bytes": round(size / args.pictures),
            "rounds": args.rounds,
            "rates": rates,
            "ratio_to_tar": {
                name: round(rate["images_per_s"] / rates["tar cf"]["images_per_s"], 2) for name, rate in rates.items()
            },
            "index": measure_index(source, scratch, args.pictures, args.rounds),
        }
        shutil.rmtree(source)
        if args.memory:
            result["peak_anonymous_mib"] = measure_memory(scratch)
    text = json.dumps(result, indent=1)
    print(text)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
