"""Ranks that are killed, stopped, asked to stop, or see what is not finite: real processes, real signals."""

import json
import os
import random
import re
import shutil
import signal
import time
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from data_shards.convert import ConvertConfig, convert
from data_shards.index import ShardSet
from data_shards.synthetic import synthesize
from tests.distributed.launching import log
from tests.distributed.ranks import Job, steps_logged
from trainer import checkpoint
from trainer.heartbeats import BEAT_S, EXIT_STALLED
from trainer.preemption import EXIT_PREEMPTED

STEPS = 24
DEEPSPEED = {
    "ACCELERATE_USE_CPU": "false",
    "ACCELERATE_USE_DEEPSPEED": "true",
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("synthetic")
    synthesize(folder / "pictures", identities=14, images_per_identity=6, size=40, seed=5)
    convert(folder / "pictures", folder / "shards", ConvertConfig(images_per_group=2))
    return folder / "shards"


def options(shards: Path, run: Path, **more: object) -> list[str]:
    """P x K = 12 x 4, BatchNorm over 8 pictures at a time on any number of ranks, dropout-free, SGD, fp32."""
    settings = {
        "data.shards": shards,
        "data.image_size": 32,
        "plan.identities_per_batch": 12,
        "plan.images_per_identity": 4,
        "model.trunk": "resnet18",
        "model.embedding_size": 16,
        "optimizer.kind": "sgd",
        "optimizer.learning_rate": 0.005,
        "optimizer.warmup_steps": 2,
        "run.folder": run,
        "run.steps": STEPS,
        "run.micro_batch": 8,
        "run.log_every": 1,
        "run.checkpoint_every": 3,
        "run.precision": "fp32",
        "run.device": "cpu",
    } | {name.replace("__", "."): value for name, value in more.items()}
    given = [part for name, value in settings.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    return [*given, "--run.no-tensorboard", "--run.resume-if-begun"]


@pytest.fixture(scope="module")
def undisturbed(shards, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    job = Job(folder, 2, *options(shards, folder / "run"), prepare=_Notes(folder / "batches"))
    assert job.wait() == [0, 0], job.said()
    return folder / "run"


class _Notes:
    """Writes down which samples every rank gets."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __call__(self, rank: int) -> None:
        from data_shards.loader import Loader

        inner = Loader.__next__

        def noted(loader: Loader):
            batch = inner(loader)
            with self.file.with_suffix(f".{rank}").open("a") as out:
                out.write(json.dumps(batch.samples.tolist()) + "\n")
            return batch

        Loader.__next__ = noted

    def batches(self, ranks: int) -> list[list[int]]:
        """The global batch of each step."""
        parts = [self.file.with_suffix(f".{rank}").read_text().splitlines() for rank in range(ranks)]
        return [[sample for part in step for sample in json.loads(part)] for step in zip(*parts, strict=True)]


def weights(run: Path, step: int = STEPS) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"step-{step:08d}" / "model.safetensors")


def assert_same_run(ours: Path, theirs: Path) -> None:
    """The same parameters bit for bit, and the same losses at the same steps. (Also rank 0's running statistics.)"""
    first, second = weights(ours), weights(theirs)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert [(line["step"], line["loss"]) for line in log(ours)] == [
        (line["step"], line["loss"]) for line in log(theirs)
    ]


def writing(run: Path) -> bool:
    """Whether a checkpoint is half written."""
    return any((run / "checkpoints").glob(".step-*.partial"))


class _WritesSlowly:
    """As over a network: so that there is time to kill in the middle."""

    def __call__(self, rank: int) -> None:
        inner = checkpoint._flush

        def slow(path: Path) -> None:
            time.sleep(0.02)
            inner(path)

        checkpoint._flush = slow


@pytest.mark.timeout(900)
def test_killed_at_twenty_random_moments_it_ends_bit_identical(shards, undisturbed, tmp_path):
    """Both ranks at once, wherever they are: in the start, a step, and every fourth time in a checkpoint's write."""
    draw = random.Random(7)
    run, moments, in_writes = tmp_path / "run", set(), 0
    for kill in range(20):
        job = Job(tmp_path, 2, *options(shards, run), prepare=_WritesSlowly())
        if kill % 4 == 1:
            job.until(lambda: writing(run) or steps_logged(run) == STEPS)
        else:
            wanted = min(steps_logged(run) + draw.choice([0, 0, 1, 2]), STEPS - 1)
            job.until(lambda wanted=wanted: steps_logged(run) >= wanted)
            time.sleep(draw.random() * 0.5)
        moments.add(steps_logged(run))
        job.kill()
        in_writes += writing(run)
        assert "Traceback" not in job.said()
        if (run / "checkpoints" / "latest").is_file():
            assert checkpoint.latest(run / "checkpoints").step % 3 == 0
    assert Job(tmp_path, 2, *options(shards, run)).wait() == [0, 0]
    assert_same_run(run, undisturbed)
    assert len(moments) >= 3, "the kills were not all at one step"
    assert in_writes >= 3, "some were in the middle of a write"


@pytest.mark.parametrize("ranks", [1, 3])
def test_on_another_number_of_ranks_it_goes_on_with_the_same_batches_and_losses(shards, undisturbed, tmp_path, ranks):
    """Both go from 2 ranks; parts of 8 pictures are the same on 1, 2 and 3 ranks, and with them BatchNorm. The newest checkpoint
    is half written: they fall back to the one before."""
    run = Path(shutil.copytree(undisturbed, tmp_path / "run"))
    damaged = run / "checkpoints" / f"step-{STEPS:08d}"
    os.truncate(damaged / "model.safetensors", 1000)
    notes = _Notes(tmp_path / "batches")
    job = Job(tmp_path, ranks, *options(shards, run), prepare=notes)
    assert job.wait() == [0] * ranks, job.said()
    (told,) = (line for line in job.lines() if str(damaged) in line)
    assert told.endswith(f"(its SHA-256 differs from state.json); taking step {STEPS - 3} instead")
    whole = _Notes(undisturbed.parent / "batches").batches(2)
    assert notes.batches(ranks) == whole[STEPS - 3 :]
    for ours, theirs in zip(log(run), log(undisturbed), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-5)
    ours, theirs = weights(run), weights(undisturbed)
    parameters = [name for name in ours if "running" not in name and "num_batches" not in name]
    assert all(torch.allclose(ours[name], theirs[name], rtol=1e-3, atol=1e-5) for name in parameters)


@pytest.mark.parametrize(("rank", "number"), [(0, signal.SIGUSR1), (1, signal.SIGTERM)])
def test_one_rank_asked_to_stop_stops_all_at_the_same_step(shards, undisturbed, tmp_path, rank, number):
    run = tmp_path / "run"
    job = Job(tmp_path, 2, *options(shards, run, run__checkpoint_every=1000))
    job.until(lambda: steps_logged(run) >= 4)
    job.signal(rank, number)
    assert job.wait(30) == [EXIT_PREEMPTED] * 2, job.said()
    step = checkpoint.latest(run / "checkpoints").step
    assert 4 <= step < STEPS
    assert job.lines()[-1] == f"asked to stop: step {step} is saved, --run.resume goes on from it"
    assert Job(tmp_path, 2, *options(shards, run)).wait() == [0, 0]
    assert_same_run(run, undisturbed)


def named(job: Job, rank: int) -> str:
    """The one line, of any rank, that says why the job ended; it names this rank."""
    lines = [line for line in job.lines() if " was at " in line]
    assert len(lines) == 1, job.said()
    assert f"rank {rank} (process {job.processes[rank].pid} on " in lines[0] or (
        rank == 0 and "rank 0, which keeps" in lines[0]
    )
    return lines[0]


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_rank_that_dies_ends_the_job_and_is_named(shards, tmp_path, rank):
    """At once, however long a rank may take for a step: within what the launcher's README calls some seconds."""
    run = tmp_path / "run"
    job = Job(tmp_path, 3, *options(shards, run, run__stall_s=600, run__steps=3000))
    job.until(lambda: steps_logged(run) >= 2)
    job.signal(rank, signal.SIGKILL)
    codes = job.wait(20)
    assert codes == [-signal.SIGKILL if number == rank else EXIT_STALLED for number in range(3)]
    assert "is dead; it was at " in named(job, rank) or rank == 0


STALL_S = 12
"""Far more than any step or start takes on two busy cores."""


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_stalls_ends_the_job_and_is_named(shards, tmp_path, rank):
    """Rank 0 keeps the heartbeats: stopped, it does not even answer."""
    run = tmp_path / "run"
    job = Job(tmp_path, 3, *options(shards, run, run__stall_s=STALL_S, run__steps=3000))
    job.until(lambda: steps_logged(run) >= 2)
    time.sleep(3 * BEAT_S)  # one that is stopped before its first heartbeat was read cannot be killed by the others
    job.signal(rank, signal.SIGSTOP)
    stopped = time.monotonic()
    codes = job.wait(STALL_S + 10)
    assert time.monotonic() - stopped > STALL_S - 2
    assert codes == [-signal.SIGKILL if number == rank else EXIT_STALLED for number in range(3)]
    said = named(job, rank)
    assert " stopped or cut off; it was at " in said
    assert re.match(rf"rank {1 if rank == 0 else 0} of 3 was at (the log of )?step ", said)


class _Fails:
    """A rank's data cannot be read from its fourth batch on."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def __call__(self, rank: int) -> None:
        from data_shards.loader import Loader

        inner, count = Loader.__next__, [0]

        def failing(loader: Loader):
            count[0] += 1
            if rank == self.rank and count[0] == 4:
                raise OSError(5, "Input/output error", "train-000003.tar")
            return inner(loader)

        Loader.__next__ = failing


@pytest.mark.parametrize("rank", [0, 1])
def test_what_fails_on_one_rank_is_told_and_ends_all_with_its_code(shards, tmp_path, rank):
    job = Job(tmp_path, 2, *options(shards, tmp_path / "run", run__steps=3000), prepare=_Fails(rank))
    assert job.wait(60) == [1, 1], job.said()
    said = named(job, rank)
    assert said.startswith(f"rank {1 - rank} of 2 was at step 4; rank {rank} (process ")
    assert " failed at the data of step 4: [Errno 5] Input/output error: 'train-000003.tar'" in said


class _Slow:
    """Rank 1's data takes for ever from its fourth batch on."""

    def __call__(self, rank: int) -> None:
        from data_shards.loader import Loader

        inner, count = Loader.__next__, [0]

        def slow(loader: Loader):
            count[0] += 1
            if rank == 1 and count[0] == 4:
                time.sleep(1000)
            return inner(loader)

        Loader.__next__ = slow


def test_a_rank_that_waits_for_its_data_is_named(shards, tmp_path):
    run = tmp_path / "run"
    job = Job(tmp_path, 2, *options(shards, run, run__stall_s=STALL_S), prepare=_Slow())
    job.until(lambda: steps_logged(run) == 3)
    assert job.wait(STALL_S + 10) == [EXIT_STALLED] * 2, job.said()
    assert "has been at the data of step 4 for" in named(job, 1)


class _Spoils:
    """One rank's embeddings, or gradients, are not finite at its fourth step; the batch passes the network 6 times a step."""

    def __init__(self, rank: int, what: str) -> None:
        self.rank, self.what = rank, what

    def __call__(self, rank: int) -> None:
        from trainer.model import Embedder

        inner, calls = Embedder.forward, [0]

        def spoiled(model, *inputs):
            found = inner(model, *inputs)
            calls[0] += torch.is_grad_enabled()
            at = (calls[0] - 1) // 3 == 3 if torch.is_grad_enabled() else calls[0] == 9
            if rank == self.rank and at:
                if self.what == "embeddings":
                    return found * float("nan")
                if found.requires_grad:
                    found.register_hook(lambda gradient: gradient * float("inf"))
            return found

        Embedder.forward = spoiled


@pytest.mark.parametrize("what", ["embeddings", "gradients"])
def test_what_is_not_finite_on_one_rank_stops_all_before_the_update(shards, tmp_path, what):
    run = tmp_path / "run"
    job = Job(tmp_path, 2, *options(shards, run, run__checkpoint_every=1), prepare=_Spoils(1, what))
    assert job.wait() == [1, 1], job.said()
    named = "embeddings or loss of rank 1 are not finite" if what == "embeddings" else "a gradient is not finite"
    assert job.lines()[-1].startswith(f"step 4: {named}")
    assert checkpoint.latest(run / "checkpoints").step == 3
    assert all(value.isfinite().all() for value in weights(run, 3).values())


def test_what_is_not_finite_is_skipped_where_that_is_asked_for(shards, tmp_path):
    run = tmp_path / "run"
    spoils = _Spoils(1, "embeddings")
    more = {"run__non_finite": "skip", "run__steps": 6, "run__checkpoint_every": 1, "run__keep_checkpoints": 9}
    job = Job(tmp_path, 2, *options(shards, run, **more), prepare=spoils)
    assert job.wait() == [0, 0], job.said()
    third, fourth, fifth = (weights(run, step) for step in (3, 4, 5))
    assert all(torch.equal(third[name], fourth[name]) for name in third if "num_batches" not in name)
    assert not all(torch.equal(fourth[name], fifth[name]) for name in fourth)
    assert [line["updates_left_out"] for line in log(run)] == [0, 0, 0, 1, 1, 1]
    (event,) = log(run, "events.jsonl")
    assert event["event"].startswith("step 4: embeddings or loss of rank 1")


def test_a_picture_that_does_not_decode_is_replaced_counted_and_named(shards, tmp_path):
    """Zeros from its middle on, since the conversion: decoders notice, and another of its identity takes its place."""
    copy = Path(shutil.copytree(shards, tmp_path / "shards"))
    split = ShardSet.open(copy).split("train")
    row = split.samples[7]
    (tar,) = (copy / "train").glob("*.tar")
    content = bytearray(tar.read_bytes())
    content[int(row["offset"]) : int(row["offset"]) + int(row["size"])] = bytes(int(row["size"]))
    tar.write_bytes(bytes(content))
    run = tmp_path / "run"
    job = Job(tmp_path, 2, *options(copy, run, run__steps=6), prepare=_Notes(tmp_path / "batches"))
    assert job.wait() == [0, 0], job.said()
    seen = {sample for batch in _Notes(tmp_path / "batches").batches(2) for sample in batch}
    assert 7 not in seen
    assert len(seen) > 60
    assert log(run)[-1]["pictures_replaced"] in (1, 2), "by each rank that met it"
    events = [line["event"] for line in log(run, "events.jsonl")]
    assert all(f": {split.key(7)} did not decode and was replaced" in event for event in events)
    assert len(events) == log(run)[-1]["pictures_replaced"]


class _Older:
    """Rank 1 has another torch."""

    def __call__(self, rank: int) -> None:
        from trainer import agreement

        inner = agreement.version
        agreement.version = lambda name: "1.0" if rank == 1 and name == "torch" else inner(name)


def test_a_collapse_is_seen_and_mended(shards, tmp_path):
    """Plain hard margin at a hot learning rate, without what keeps it from collapsing; beside it the same with the guard."""
    hot = {
        "loss__kind": "margin",
        "optimizer__kind": "adamw",
        "optimizer__learning_rate": 0.01,
        "optimizer__warmup_steps": 1,
    }
    hot |= {"run__steps": 60, "run__micro_batch": 48, "run__log_every": 3, "run__checkpoint_every": 60}
    jobs = {}
    for core, action in enumerate(("warn", "smooth")):
        (tmp_path / action).mkdir()
        given = options(shards, tmp_path / action / "run", **hot, guard__action=action)
        jobs[action] = Job(tmp_path / action, 1, *given, "--model.no-head-batchnorm", prepare=_Pinned(core))
    for job in jobs.values():
        assert job.wait(200) == [0], job.said()
    warned, mended = (log(tmp_path / action / "run") for action in jobs)
    events = {action: [line["event"] for line in log(tmp_path / action / "run", "events.jsonl")] for action in jobs}
    assert "the embeddings have collapsed (spread 0.0" in events["warn"][0]
    assert "going on with smooth" in events["smooth"][0]
    at = int(events["smooth"][0].split(":")[0].removeprefix("step "))
    before = [line for line in mended if line["step"] <= at]
    assert before == [{**line, **_timing(there)} for line, there in zip(warned, before, strict=False)], (
        "the same run until then"
    )
    assert before[-1]["embedding_spread"] < 0.1
    assert before[-1]["loss_over_margin"] == pytest.approx(1, abs=0.2)
    assert warned[-1]["embedding_spread"] < 0.02, "it does not mend itself"
    assert mended[-1]["embedding_spread"] > 0.1
    assert any("the embeddings spread again" in event for event in events["smooth"])


class _Pinned:
    """Leaves the other cores to the other job."""

    def __init__(self, core: int) -> None:
        self.core = core

    def __call__(self, rank: int) -> None:
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[self.core % len(cores)]})


def _timing(line: dict[str, float]) -> dict[str, float]:
    """What a clock says, which no two runs share."""
    return {name: value for name, value in line.items() if name in ("images_per_s", "data_wait_percent")}


def test_gradients_may_travel_as_bf16(shards, undisturbed, tmp_path):
    job = Job(tmp_path, 2, *options(shards, tmp_path / "run", run__gradient_compression="bf16"))
    assert job.wait() == [0, 0], job.said()
    ours, theirs = ([line["loss"] for line in log(folder)] for folder in (tmp_path / "run", undisturbed))
    assert ours[0] == theirs[0], "before the first update"
    assert ours != theirs, "rounding must show"
    assert ours[:2] == pytest.approx(theirs[:2], rel=0.01)
    assert ours[2] == pytest.approx(theirs[2], rel=0.05)
    assert ours == pytest.approx(theirs, rel=0.1)


def test_a_compiled_network_trains_alike(shards, undisturbed, tmp_path):
    job = Job(tmp_path, 2, *options(shards, tmp_path / "run"), "--run.compile", prepare=_Stops(2))
    assert job.wait(250) == [EXIT_PREEMPTED] * 2, job.said()
    ours, theirs = ([line["loss"] for line in log(folder)] for folder in (tmp_path / "run", undisturbed))
    assert ours == pytest.approx(theirs[:2], rel=1e-3), "before and after an update; later, rounding grows"
    assert ours[1] != pytest.approx(ours[0], rel=0.01)


class _Stops:
    """Asks to stop, and says whether the network was compiled, at a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def __call__(self, rank: int) -> None:
        from trainer.train_step import TrainStep

        inner = TrainStep.__call__

        def asked(self_, batch, step=1, asked_to_stop=False):
            assert self_._engine.model.module._compiled_call_impl is not None
            return inner(self_, batch, step, asked_to_stop or step == self.step)

        TrainStep.__call__ = asked


def test_deepspeed_has_its_own_setting_for_how_gradients_travel(shards, tmp_path):
    zero = DEEPSPEED | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": "launch/deepspeed/zero1.json"}
    job = Job(tmp_path, 2, *options(shards, tmp_path / "run", run__gradient_compression="bf16"), **zero)
    assert job.wait() == [1, 1]
    assert job.lines() == [
        "run.gradient_compression is bf16; under DeepSpeed it must be none, and its JSON file's communication_data_type "
        "says how gradients travel"
    ]


def test_ranks_that_differ_are_named_before_the_first_step(shards, tmp_path):
    job = Job(tmp_path, 3, *options(shards, tmp_path / "run"), prepare=_Older())
    assert job.wait() == [1, 1, 1], job.said()
    mine = version("torch")
    assert job.lines() == [f"ranks differ in version of torch: 1.0 on rank 1, {mine} on the other 2"]
    assert not (tmp_path / "run").exists()


@pytest.mark.timeout(900)
@pytest.mark.parametrize("stage", [1, 2])
def test_deepspeed_is_killed_and_goes_on_bit_identical(shards, tmp_path, stage):
    """ZeRO-1 and -2: killed in a start, in steps and in writes, asked to stop, its newest checkpoint damaged."""
    zero = DEEPSPEED | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": f"launch/deepspeed/zero{stage}.json"}
    small = {"run__steps": 14, "run__micro_batch": 24, "run__checkpoint_every": 2}
    whole, run, draw = tmp_path / "whole", tmp_path / "run", random.Random(stage)
    assert Job(tmp_path, 2, *options(shards, whole, **small), **zero).wait() == [0, 0]

    def started(name: str, ranks: int = 2) -> Job:
        (tmp_path / name).mkdir()
        return Job(tmp_path / name, ranks, *options(shards, run, **small), prepare=_WritesSlowly(), **zero)

    in_writes = 0
    for kill in range(6):
        job = started(f"kill {kill}")
        if kill % 2:
            job.until(lambda: writing(run))
        else:
            job.until(lambda kill=kill: steps_logged(run) >= kill)
            time.sleep(draw.random() * 0.3)
        job.kill()
        in_writes += writing(run)
    assert in_writes >= 2
    at = checkpoint.latest(run / "checkpoints").step
    assert 2 <= at <= 10

    job = started("asked to stop")
    job.until(lambda: "P x K" in job.said())
    job.signal(1, signal.SIGTERM)
    assert job.wait(30) == [EXIT_PREEMPTED] * 2, job.said()
    saved = checkpoint.latest(run / "checkpoints")
    assert at < saved.step < 14

    job = started("on another number of ranks", ranks=3)
    assert job.wait() == [1, 1, 1], job.said()
    assert job.lines() == [f"checkpoint {saved.folder} was written by 2 DeepSpeed ranks; this run has 3"]

    os.truncate(next(saved.folder.rglob("*optim_states.pt")), 100)
    job = started("damaged")
    assert job.wait() == [0, 0], job.said()
    assert any(f"{saved.folder}: deepspeed/" in line and " instead" in line for line in job.lines())
    first, second = weights(run, 14), weights(whole, 14)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert [line["loss"] for line in log(run)] == [line["loss"] for line in log(whole)]
