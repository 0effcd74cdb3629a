"""`facescale profile`: some steps of the real training loop, and what each of them spent its time on.

The loop is `trainer.train.train` itself, which a `Recorder` ends after enough steps: before any checkpoint, and its folder is
removed. Then the loader runs alone, on all ranks at once as in training, which gives what reading and decoding cost: they run
ahead of the step on other threads, so their time lies beside the step's, not in it, and what of it the step had to wait for is
the phase `wait`.

On a GPU (not yet run): the loader's decoding is the CPU's part of it alone, and waiting for the GPU can count as CPU time there.
"""

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DDPCommunicationHookType, DistributedType

import data_shards.decode
from data_shards.index import ShardSet
from data_shards.loader import training_loader
from data_shards.plan import Plan, per_rank
from trainer.collectives import barrier, gather_objects, rank, world_size
from trainer.config import RunConfig, TrainConfig
from trainer.machine import machine, memory, reset_peak, spread
from trainer.phases import OTHER, PHASES, Recorder, Step, phase, recording
from trainer.precision import use_bf16
from trainer.preemption import Asked
from trainer.profile_output import write
from trainer.train import train
from trainer.watchdog import Watchdog

PACKAGES = ("torch", "torchvision", "nvidia-dali-cuda130", "accelerate")
FOLDER = ".run"
"""Of the run that is profiled, below OUT; it goes when it is done."""
_AHEAD = 8
"""Steps that the loader still has before it when the last one is taken: it is as busy as in the middle of a run."""
_LOADER_WARMUP = 4
_LOADER_IMAGES = 4000
"""That the loader alone decodes, at most."""


@dataclass(frozen=True)
class RankProfile:
    """What one rank saw."""

    steps: list[Step]
    started_at: float
    """Of its timeline, in seconds of the system's clock."""
    loader: dict[str, Any]
    peak_memory_bytes: int

    def seconds(self) -> list[dict[str, float]]:
        return [step.seconds() for step in self.steps]

    def own_seconds(self) -> float:
        """Median seconds a step outside of what ranks do together: the slowest rank has most."""
        return median(step.whole.seconds - exchange(step.seconds()) for step in self.steps)


@dataclass(frozen=True)
class Profile:
    """What `trainer.train.main` is to do in training's place.

    Args:
        steps: that count, at least 2. warmup: before them, at least 1: DDP averages its first gradients after the backward.
        out: folder for what is found.
    Raises:
        ValueError: there are fewer.
    """

    steps: int
    warmup: int
    out: Path

    def __post_init__(self) -> None:
        for name, value, least in (("--steps", self.steps, 2), ("--warmup", self.warmup, 1)):
            if value < least:
                raise ValueError(f"{name} is {value}; it must be at least {least}")

    def __call__(self, config: TrainConfig, accelerator: Accelerator, watchdog: Watchdog, asked: Asked) -> None:
        """
        Raises:
            ValueError: the launcher is DeepSpeed, or training says so.
        """
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            raise ValueError(
                "profile under DeepSpeed: its all-reduce cannot be told from its backward; allowed are DDP and one process"
            )
        if accelerator.ddp_handler is not None:
            accelerator.ddp_handler.comm_hook = DDPCommunicationHookType.NO  # `time_all_reduce` compresses as asked
        config = replace(config, run=self._run_config(config.run))
        self._remove_run(config)
        try:
            mine = self._recorded(config, accelerator.device, lambda: train(config, accelerator, watchdog, asked))
        finally:
            self._remove_run(config)
        everyone = gather_objects(mine)
        if rank() == 0:
            write(self.out, summary(everyone, config, accelerator.device), everyone)
        barrier()

    def _recorded(self, config: TrainConfig, device: torch.device, loop: Callable[[], None]) -> RankProfile:
        _reset_peak(device)
        with copies(lambda: phase("copy")), recording(Recorder(self.steps, self.warmup, device)) as recorder:
            loop()
        peak = _peak(device)
        batches = max(self.steps, _LOADER_IMAGES // config.plan.batch_size)
        return RankProfile(recorder.steps(), recorder.started_at, loader_alone(config, device, batches), peak)

    def _run_config(self, run: RunConfig) -> RunConfig:
        """Without anything that is kept, and without end."""
        return replace(
            run,
            folder=self.out / FOLDER,
            steps=self.warmup + self.steps + _AHEAD,
            evaluate_every=0,
            best_metric="none",
            patience=0,
            checkpoint_every=self.warmup + self.steps + _AHEAD,
            resume=False,
            resume_if_begun=False,
            tensorboard=False,
        )

    def _remove_run(self, config: TrainConfig) -> None:
        if rank() == 0:
            shutil.rmtree(config.run.folder, ignore_errors=True)


def exchange(seconds: dict[str, float]) -> float:
    """Of a step: what the ranks do together, waiting for each other."""
    return seconds["gather_mining_loss"] + seconds["all_reduce"]


def typical(steps: Sequence[dict[str, float]]) -> dict[str, float]:
    """Each phase's median, all brought by one factor to the sum that the median step has: medians alone do not add up."""
    middle = {name: median(step[name] for step in steps) for name in (*PHASES, OTHER)}
    factor = median(sum(step.values()) for step in steps) / sum(middle.values())
    return {name: factor * value for name, value in middle.items()}


def summary(everyone: Sequence[RankProfile], config: TrainConfig, device: torch.device) -> dict[str, Any]:
    """What profile.json says. `critical_path_s` is that of the slowest rank, which the others wait for; `critical_path_mean_s`
    is the mean over ranks. Each sums to the median step."""
    number = max(range(len(everyone)), key=lambda each: everyone[each].own_seconds())
    slowest, ranks = everyone[number], len(everyone)
    paths = [typical(each.seconds()) for each in everyone]
    lengths = [step.whole.seconds for step in slowest.steps]
    cuda = device.type == "cuda"
    return {
        "machine": machine(*PACKAGES),
        "device": torch.cuda.get_device_name(device) if cuda else "cpu",
        "ranks": ranks,
        "image_size": config.data.image_size,
        "images_per_rank": per_rank(config.plan, ranks),
        "p": config.plan.identities_per_batch,
        "k": config.plan.images_per_identity,
        "embedding_size": config.model.embedding_size,
        "trunk": config.model.trunk,
        "precision": "bf16" if use_bf16(config.run.precision, device) else "fp32",
        "steps": len(slowest.steps),
        "step_s": spread(lengths, digits=7),
        "images_per_s": config.plan.batch_size / median(lengths),
        "slowest_rank": number,
        "critical_path_s": _named(paths[number]),
        "critical_path_mean_s": _named({name: mean(path[name] for path in paths) for name in paths[0]}),
        "all_reduce_total_s": median(step.all_reduce_total() for step in slowest.steps),
        "loader": slowest.loader,
        "peak_memory_bytes": max(each.peak_memory_bytes for each in everyone),
    }


def _named(path: dict[str, float]) -> dict[str, float]:
    """As profile.json says it."""
    return {"all_reduce_exposed" if name == "all_reduce" else name: value for name, value in path.items()}


def loader_alone(config: TrainConfig, device: torch.device, batches: int) -> dict[str, Any]:
    """What the training loader costs, in CPU seconds an image, and gives where nothing else runs but other ranks' loaders.

    `plan_and_bytes` is the time of the thread that feeds the decoder (plan, augmentation parameters, where the bytes lie; DALI
    takes them over there, too) and `decode` that of all other threads of the process, which with `data.decoder libjpeg` are the
    first to touch the mapped bytes. The copy out of DALI is in neither.
    """
    split = ShardSet.open(config.data.shards).split("train")
    plan, stop = Plan(split.starts, config.plan, config.run.seed), _LOADER_WARMUP + batches + _AHEAD
    place: dict[str, Any] = {"rank": rank(), "world_size": world_size(), "device": device}
    loader = training_loader(split, plan, config.data, config.augment, stop=stop, **place)
    copied = _ThreadTime()
    with copies(lambda: copied):
        for _ in range(_LOADER_WARMUP):
            next(loader)
        barrier()
        copied.seconds, fed, used, begun = 0.0, time.thread_time(), time.process_time(), time.perf_counter()
        samples = torch.cat([next(loader).samples for _ in range(batches)]).numpy()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        wall = time.perf_counter() - begun
        fed, used = time.thread_time() - fed, time.process_time() - used
    rows = split.samples[samples]
    return {
        "cpu_s_per_image": {
            "plan_and_bytes": (fed - copied.seconds) / len(rows),
            "decode": max(0.0, used - fed) / len(rows),
        },
        "images_per_s": len(rows) / wall,
        "threads": config.data.threads,
        "mean_picture_bytes": float(rows["size"].mean()),
        "mean_picture_pixels": float((rows["width"].astype(float) * rows["height"]).mean()),
    }


class _ThreadTime:
    """Adds up the CPU time of this thread in what runs inside."""

    seconds = 0.0

    def __enter__(self) -> None:
        self._begun = time.thread_time()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.thread_time() - self._begun


@contextmanager
def copies(around: Callable[[], AbstractContextManager[Any]]) -> Iterator[None]:
    """Has `around` around every copy of a batch out of DALI, which data_shards, knowing no trainer, cannot tell by itself."""
    plain = data_shards.decode.feed_ndarray

    def told(*args: Any, **options: Any) -> Any:
        with around():
            return plain(*args, **options)

    data_shards.decode.feed_ndarray = told
    try:
        yield
    finally:
        data_shards.decode.feed_ndarray = plain


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        reset_peak()


def _peak(device: torch.device) -> int:
    """Bytes: of the GPU's memory that tensors took, or of the process where it computes on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return int(memory("VmHWM") * 2**20)
