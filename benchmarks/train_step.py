"""What the step costs beside its network: our loop against a bare one and a naive one, mining, memory, checkpoints, the loader.

    python benchmarks/train_step.py [--only loop exchange memory checkpoint compile loader normalise] [--steps 30]

ResNet-50, 112 px, 64 images a rank, all cores. `loop` runs the real `trainer.train.train` on batches that lie in memory; between
its steps a bare loop (forward, backward, optimiser, the same precision and memory format) and a naive one (float32, contiguous,
optimiser unfused, masked-matrix loss, `loss.item()` every step) take a step each, so that all see the same machine.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks.measure import free_port, machine, memory, reset_peak, spread  # noqa: E402

IMAGES, IMAGES_OF_ONE, SIZE = 64, 4, 112
OPTIONS = f"--data.image-size {SIZE} --plan.images-per-identity {IMAGES_OF_ONE} --run.no-tensorboard"


def settings(images: int, more: str = "") -> Any:
    from trainer.config import parse

    return parse(f"{OPTIONS} --plan.identities-per-batch {images // IMAGES_OF_ONE} {more}".split())


def in_memory_batches(count: int, images: int = IMAGES) -> list[Any]:
    """Pictures of noise, as the loader gives them."""
    import torch

    from data_shards.loader import Batch

    generator = torch.Generator().manual_seed(0)
    shape = (images, 3, SIZE, SIZE)
    return [
        Batch(
            torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8).to(memory_format=torch.channels_last),
            torch.arange(images // IMAGES_OF_ONE).repeat_interleave(IMAGES_OF_ONE),
            torch.arange(images),
        )
        for _ in range(count)
    ]


def other_step(naive: bool) -> Callable[[Any], None]:
    """A step of the bare or the naive loop, with a network and an optimiser of its own."""
    import torch

    from trainer.config import ModelConfig
    from trainer.model import Embedder, parameter_groups
    from trainer.precision import use_bf16

    model = Embedder(ModelConfig(), bf16=not naive and use_bf16("auto", torch.device("cpu")))
    if not naive:
        model = model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.05), lr=1e-3, fused=not naive, foreach=False)
    target = torch.randn(IMAGES, 128)

    def bare(batch: Any) -> None:
        (model(batch.images) * target).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    def simple(batch: Any) -> None:
        embeddings = model(batch.images.contiguous())
        distance = (2 - 2 * embeddings @ embeddings.T).clamp(min=1e-12).sqrt()
        same = batch.identities[:, None] == batch.identities[None]
        positive = distance.masked_fill(~same | torch.eye(IMAGES, dtype=torch.bool), -1).max(1).values
        negative = distance.masked_fill(same, 9).min(1).values
        loss = (positive - negative + 0.2).clamp(min=0).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()

    return simple if naive else bare


def run_loop(steps: int, warm: int = 3) -> dict[str, Any]:
    """Seconds a step of the three loops, medians and ratios over interleaved steps."""
    from trainer import train

    batches = in_memory_batches(4)
    bare, naive = other_step(naive=False), other_step(naive=True)
    seconds: dict[str, list[float]] = {"facescale": [], "bare": [], "naive": []}

    class InMemory:
        """In the loader's place; the other loops take their steps while ours waits for data."""

        def __init__(self) -> None:
            self.given, self.since = 0, 0.0
            self.undecodable: list[str] = []

        def __next__(self) -> Any:
            if self.given:
                seconds["facescale"].append(time.perf_counter() - self.since)
            batch = batches[self.given % len(batches)]
            for name, step in (
                (("bare", bare), ("naive", naive)) if self.given % 2 else (("naive", naive), ("bare", bare))
            ):
                begun = time.perf_counter()
                step(batch)
                seconds[name].append(time.perf_counter() - begun)
            self.given += 1
            self.since = time.perf_counter()
            return batch

        def new_undecodable(self) -> list[str]:
            return []

    with tempfile.TemporaryDirectory(prefix="facescale-step-") as folder:
        shards = _small_shards(Path(folder))
        options = f"{OPTIONS} --plan.identities-per-batch {IMAGES // IMAGES_OF_ONE} --run.steps {steps + warm}"
        train.training_loader = lambda *args, **kwargs: InMemory()  # type: ignore[assignment]
        code = train.main([*options.split(), "--data.shards", str(shards), "--run.folder", str(Path(folder, "run"))])
    assert code == 0, code
    kept = {name: values[warm : warm + steps - 1] for name, values in seconds.items()}
    ours = kept["facescale"]
    return {
        "seconds": {name: spread(values) for name, values in kept.items()},
        "ours_over_bare": spread([mine / other for mine, other in zip(ours, kept["bare"], strict=True)]),
        "naive_over_ours": spread([other / mine for mine, other in zip(ours, kept["naive"], strict=True)]),
    }


def _small_shards(folder: Path, identities: int = 20, size: int = 32) -> Path:
    from data_shards.convert import ConvertConfig, convert
    from data_shards.synthetic import synthesize

    synthesize(folder / "pictures", identities=identities, images_per_identity=8, size=size, seed=0)
    convert(folder / "pictures", folder / "shards", ConvertConfig())
    return folder / "shards"


def run_exchange(repeats: int = 20) -> dict[str, Any]:
    """What gather, mining and loss, forward and backward, take of a whole step: two ranks of 64 images, one core each."""
    command = [sys.executable, __file__, "--one", "exchange", str(repeats)]
    with tempfile.TemporaryDirectory(prefix="facescale-step-") as folder:
        out = str(Path(folder, "found.json"))
        common = os.environ | {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "FOUND": out}
        common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        ranks = [subprocess.Popen(command, env=common | {"RANK": r, "LOCAL_RANK": r}) for r in ("0", "1")]
        assert [rank.wait() for rank in ranks] == [0, 0]
        found: dict[str, Any] = json.loads(Path(out).read_text())
    return found


def exchange_rank(repeats: int) -> None:
    """One rank of `run_exchange`; rank 0 writes what it found to $FOUND."""
    import torch
    from torch.nn.functional import normalize

    from trainer import train
    from trainer.collectives import all_reduce_sum, barrier, gather_labelled, rank, shutdown
    from trainer.train_step import TrainStep, make_pool, objective_of

    torch.set_num_threads(1)
    config = settings(2 * IMAGES)
    accelerator = train.make_accelerator(config.run)
    trained, engine = train._prepare(config, accelerator, IMAGES)
    step, batch = TrainStep(engine, config, trained.memory), in_memory_batches(1)[0]
    objective = objective_of(config)
    embeddings = normalize(torch.randn(IMAGES, config.model.embedding_size)).requires_grad_()

    def exchange() -> None:
        gathered = gather_labelled(embeddings, batch.identities)
        loss = objective(make_pool(embeddings, batch.identities, gathered), IMAGES_OF_ONE)
        sums = all_reduce_sum(torch.stack([loss.divisor.double()] * 4))
        (loss.total / sums[0]).backward()

    whole, parts = [], []
    for _ in range(3):
        step(batch)
        exchange()
    for _ in range(repeats):
        for run, seconds in ((lambda: step(batch), whole), (exchange, parts)):
            barrier()
            begun = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - begun)
    if rank() == 0:
        share = [100 * part / step for part, step in zip(parts, whole, strict=True)]
        found = {"step_s": spread(whole), "exchange_s": spread(parts), "share_percent": spread(share)}
        Path(os.environ["FOUND"]).write_text(json.dumps(found))
    barrier()
    shutdown()


def run_memory() -> list[dict[str, Any]]:
    """Peak memory of a step beyond the network and its optimiser, where the batch grows 16 times in parts of 32 images."""
    found = []
    for images, part in ((32, None), (32, 32), (64, 32), (128, 32), (256, 32), (512, 32), (64, None), (128, None)):
        command = [sys.executable, __file__, "--one", "memory", str(images), str(part or 0)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found.append({"images": images, "micro_batch": part, **json.loads(done.stdout.splitlines()[-1])})
        print(found[-1], flush=True)
    return found


def peak_of_step(images: int, part: int) -> None:
    """Prints the peak of the third step, in MiB beyond what the process held before its batch was made."""
    from trainer import train
    from trainer.train_step import TrainStep

    config = settings(images, f"--run.micro-batch {part}" if part else "")
    trained, engine = train._prepare(config, train.make_accelerator(config.run), images)
    step = TrainStep(engine, config, trained.memory)
    step(in_memory_batches(1, 8)[0])  # the optimiser's moments
    before = memory("VmRSS")
    batch = in_memory_batches(1, images)[0]
    held = memory("VmRSS")
    peaks, seconds = [], []
    for _ in range(2):
        reset_peak()
        begun = time.perf_counter()
        step(batch)
        seconds.append(time.perf_counter() - begun)
        peaks.append(memory("VmHWM"))
    print(
        json.dumps({"batch_mib": held - before, "peak_mib": max(peaks) - held, "images_per_s": images / min(seconds)})
    )


def run_checkpoint(repeats: int = 5) -> dict[str, Any]:
    """Seconds that training stands still for a checkpoint of ResNet-50 and AdamW, written in a thread and waited for."""
    from trainer import train
    from trainer.checkpoint import Writer
    from trainer.train_step import TrainStep

    config = settings(16)
    trained, engine = train._prepare(config, train.make_accelerator(config.run), 16)
    step, batch = TrainStep(engine, config, trained.memory), in_memory_batches(1, 16)[0]
    step(batch)
    seconds: dict[str, list[float]] = {"in a thread": [], "waited for": []}
    with tempfile.TemporaryDirectory(prefix="facescale-step-", dir=ROOT) as folder:
        writer, number = Writer(Path(folder), trained, keep=1, shards="none"), 0
        for _ in range(repeats):
            for name, wait in (("in a thread", False), ("waited for", True)):
                number += 1
                begun = time.perf_counter()
                writer.save(number, wait=wait)
                seconds[name].append(time.perf_counter() - begun)
                for _ in range(3):
                    step(batch)  # the thread writes meanwhile
    return {name: spread(values) for name, values in seconds.items()}


def run_compile(steps: int) -> dict[str, Any]:
    """torch.compile of the network against none: seconds of forward and backward, and of compiling."""
    import torch

    from trainer.config import ModelConfig
    from trainer.model import Embedder
    from trainer.precision import use_bf16

    batch = in_memory_batches(1)[0]
    seconds: dict[str, list[float]] = {"eager": [], "compiled": []}
    models = {}
    for name in seconds:
        model: Any = Embedder(ModelConfig(), use_bf16("auto", torch.device("cpu"))).to(
            memory_format=torch.channels_last
        )
        models[name] = torch.compile(model) if name == "compiled" else model
    begun = time.perf_counter()
    models["compiled"](batch.images).sum().backward()
    compiling = time.perf_counter() - begun
    for _ in range(steps):
        for name, model in models.items():
            begun = time.perf_counter()
            model(batch.images).sum().backward()
            seconds[name].append(time.perf_counter() - begun)
    ratio = [a / b for a, b in zip(seconds["eager"][2:], seconds["compiled"][2:], strict=True)]
    return {
        "first_s": compiling,
        **{name: spread(values[2:]) for name, values in seconds.items()},
        "eager_over_compiled": spread(ratio),
    }


def run_loader(steps: int) -> dict[str, Any]:
    """Share of the time that the real run waits for its data: the loader decodes 160 px JPEGs on the same cores."""
    from trainer import train

    with tempfile.TemporaryDirectory(prefix="facescale-step-") as folder:
        shards = _small_shards(Path(folder), identities=40, size=160)
        options = (
            f"{OPTIONS} --plan.identities-per-batch {IMAGES // IMAGES_OF_ONE} --run.log-every 5 --run.steps {steps}"
        )
        run = Path(folder, "run")
        code = train.main([*options.split(), "--data.shards", str(shards), "--run.folder", str(run)])
        assert code == 0, code
        lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    waits, rates = ([line[name] for line in lines[1:]] for name in ("data_wait_percent", "images_per_s"))
    return {"data_wait_percent": spread(waits), "images_per_s": spread(rates)}


def run_normalise(repeats: int = 40) -> dict[str, Any]:
    """Microseconds an image, on all cores, of the network's first operation by OpenCV, which a CPU takes, and by PyTorch."""
    from unittest import mock

    import torch

    from trainer.model import normalised

    images = in_memory_batches(1)[0].images
    colour = torch.eye(3, 4).repeat(IMAGES, 1, 1) + 0.05 * torch.randn(IMAGES, 3, 4)
    mean, std = (torch.full((3, 1, 1), value) for value in (0.45, 0.22))
    found: dict[str, Any] = {}
    for name, colours in (("as they are", None), ("recoloured", colour)):
        seconds: dict[str, list[float]] = {"opencv": [], "pytorch": []}
        for _ in range(repeats):
            for way, times in seconds.items():
                with mock.patch("torch.compiler.is_compiling", lambda way=way: way == "pytorch"):
                    begun = time.perf_counter()
                    normalised(images, mean, std, colours)
                    times.append((time.perf_counter() - begun) / IMAGES * 1e6)
        found[name] = {way: spread(times, 1) for way, times in seconds.items()}
        pairs = zip(seconds["pytorch"], seconds["opencv"], strict=True)
        found[name]["pytorch_over_opencv"] = spread([torch_s / opencv_s for torch_s, opencv_s in pairs], 2)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("loop", "exchange", "memory", "checkpoint", "compile", "loader", "normalise")
    parser.add_argument("--only", nargs="*", choices=parts, default=parts)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "train_step.json")
    parser.add_argument("--one", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        {"exchange": exchange_rank, "memory": peak_of_step}[args.one[0]](*map(int, args.one[1:]))
        return 0
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    found = json.loads(args.out.read_text()) if args.out.is_file() else {}
    found["machine"] = machine("torch", "torchvision", "nvidia-dali-cuda130")
    runs: dict[str, Callable[[], Any]] = {
        "loop": lambda: run_loop(args.steps),
        "exchange": run_exchange,
        "memory": run_memory,
        "checkpoint": run_checkpoint,
        "compile": lambda: run_compile(max(6, args.steps // 2)),
        "loader": lambda: run_loader(max(15, args.steps)),
        "normalise": run_normalise,
    }
    for name in args.only:
        found[name] = runs[name]()
        print(name, json.dumps(found[name], indent=1), flush=True)
        args.out.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
