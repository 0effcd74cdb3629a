"""Training: wiring, loop, main(). Start it with `accelerate launch -m trainer.train --config FILE`.

Not yet run, for want of a GPU: what reads `cpu` as false below (NCCL, which accelerate chooses; cuDNN's autotuning) and
`model.sync_batchnorm`.
"""

import math
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta

import torch
import torchvision
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import (
    DDPCommunicationHookType,
    DistributedDataParallelKwargs,
    DistributedType,
    KwargsHandler,
    set_seed,
)
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from data_shards.index import ShardSet, Split
from data_shards.loader import training_loader
from data_shards.plan import per_rank
from data_shards.progress import progress
from data_shards.windowed_plan import AnyPlan, plan_of
from trainer import checkpoint, telemetry
from trainer.agreement import check_ranks_agree, comparable
from trainer.backbones import with_sync_batchnorm
from trainer.best import Best
from trainer.centres import Centres
from trainer.checkpoint import Trained
from trainer.collapse import CollapseGuard
from trainer.collectives import barrier, rank, shutdown, time_all_reduce, world_size
from trainer.config import CONFIG, OptimizerConfig, RunConfig, TrainConfig, UsageError, load, parse, save
from trainer.devices import share_cores
from trainer.engine import DeepSpeedEngine, Engine, PlainEngine
from trainer.evaluation.run import check_in_training, evaluate_in_training
from trainer.flags import Flags, Verdict
from trainer.metric.memory import CrossBatchMemory
from trainer.model import Embedder, parameter_groups, size_of
from trainer.phases import next_step, phase, recorder
from trainer.precision import use_bf16
from trainer.preemption import EXIT_PREEMPTED, Asked, Preempted, asked_to_stop
from trainer.rank_logs import logged
from trainer.trackers import Trackers, check_installed
from trainer.train_step import TrainStep, objective_of
from trainer.watchdog import Watchdog


def train(config: TrainConfig, accelerator: Accelerator, watchdog: Watchdog, asked: Asked) -> None:
    """Trains to the last step, from the newest checkpoint where `run.resume` says so.

    Raises:
        ValueError: a setting, the shards or the run folder are not usable, ranks differ, or a loss is not finite.
        Preempted: somebody asked a rank to stop; all have saved the same step.
    """
    shards = ShardSet.open(config.data.shards, config.data.stream)
    split = shards.split("train")
    plan = plan_of(split, config.plan, config.run.seed)
    batch_size = per_rank(config.plan, world_size())
    steps = config.run.steps or config.run.epochs * plan.steps_per_epoch
    held_out = _held_out(shards, config)
    check_folder(config)
    check_installed(config.run)

    set_seed(config.run.seed)
    trained, engine = _prepare(config, accelerator, batch_size)
    trained.centres = _centres(config, split, accelerator.device)
    start = 0
    if resumes(config):
        newest = checkpoint.latest(config.run.folder / checkpoint.CHECKPOINTS)
        newest.check_shards(shards.fingerprint)
        newest.load_training(trained)
        start = newest.step
    check_ranks_agree({**comparable(config), "start": start, "plan": plan.summary(), "shards": shards.fingerprint})
    make_folder(config, start)
    trackers = Trackers(config)

    device = accelerator.device
    loader = training_loader(
        split,
        plan,
        config.data,
        config.augment,
        start=start,
        stop=steps,
        rank=rank(),
        world_size=world_size(),
        device=device,
    )
    report = telemetry.Telemetry(
        config.run.folder,
        config.plan.batch_size,
        trackers,
        config.loss.effective_margin,
        trained.centres.total if trained.centres is not None else 0,
    )
    keep, folder = config.run.keep_checkpoints, config.run.folder / checkpoint.CHECKPOINTS
    writer = checkpoint.Writer(folder, trained, keep=keep, shards=shards.fingerprint)
    guard = CollapseGuard(config.guard, trained.guard)
    train_step = TrainStep(engine, config, trained.memory, trained.centres)
    train_step.objective = guard.objective(train_step.objective)
    judged = trained.ema.module if trained.ema is not None else trained.model
    flags = Flags(device)
    best = Best(config.run.best_metric, config.run.patience)
    best.see_log(config.run.folder / telemetry.EVALUATIONS, start)

    with logged(config.run.folder), progress("train", steps, "steps", enabled=rank() == 0) as advance:
        if rank() == 0:
            print(_headline(split, plan, config, accelerator, start, steps), file=sys.stderr)
            print(_network(config, trained.model), file=sys.stderr)
        advance(start)
        for step in range(start + 1, steps + 1):
            next_step()
            if best.exhausted:
                report.event(best.farewell(), everywhere=False)
                break
            rate = set_learning_rate(trained.optimizer, config.optimizer, step, steps, guard.rate)
            if trained.centres is not None:
                trained.centres.follow(rate / config.optimizer.learning_rate)
            with report.waiting(), phase("wait"), watchdog.at(f"the data of step {step}", alone=True):
                batch = next(loader)
            with watchdog.at(f"step {step}"):
                stats = train_step(batch, step, asked.now)
                with phase("optimizer"):
                    trained.average()
            report.add(stats)
            last = step == steps
            judges = held_out is not None and (last or step % config.run.evaluate_every == 0)
            saves = last or step % config.run.checkpoint_every == 0
            verdicts = flags.add(step, stats.flags) + (flags.settle() if judges or saves else [])
            stopping = _heeded(verdicts, config, report)
            if last or step % config.run.log_every == 0:
                with watchdog.at(f"the log of step {step}"):
                    line = report.log(step, step / plan.steps_per_epoch, rate, len(loader.undecodable))
                if said := guard.see(step, line["embedding_spread"], line["loss"]):
                    train_step.objective = guard.objective(objective_of(config))
                    report.event(said, everywhere=False)
            for key in loader.new_undecodable():
                report.event(f"step {step}: {key} did not decode and was replaced: run `facescale verify`")
            better = False
            if held_out is not None and judges and not stopping:
                with report.paused(), watchdog.at(f"the evaluation at step {step}"):
                    found = evaluate_in_training(judged, held_out, config, device)
                    report.evaluation(step, found)
                    better = best.see(step, found)
            if saves or stopping or better or best.exhausted:
                with report.paused(), watchdog.at(f"the checkpoint of step {step}"):
                    writer.save(step, wait=last or stopping or best.exhausted, best=better)
            advance(1)
            if stopping and not last:
                report.end()
                raise Preempted(step)
    report.end()
    barrier()


def _heeded(verdicts: list[Verdict], config: TrainConfig, report: telemetry.Telemetry) -> bool:
    """Deals with updates that were left out; returns whether a rank was asked to stop.

    Raises:
        ValueError: a loss or gradient is not finite, and `run.non_finite` is stop.
    """
    for verdict in verdicts:
        if verdict.left_out:
            if config.run.non_finite == "stop":
                raise ValueError(f"{verdict.reason()}; all ranks stop with the weights as they were before it")
            report.skipped()
            report.event(f"{verdict.reason()}; the update was left out on all ranks", everywhere=False)
    return any(verdict.stop for verdict in verdicts)


def _held_out(shards: ShardSet, config: TrainConfig) -> Split | None:
    """The split that is evaluated in training, checked to be large enough, or None."""
    if not config.run.evaluate_every:
        return None
    split = shards.split("unseen_identities")
    check_in_training(split, config)
    return split


def check_folder(config: TrainConfig) -> None:
    """Looks at the run folder before any work, and changes nothing.

    Raises:
        ValueError: it holds something already or, to be resumed, does not hold a run of the same settings.
    """
    folder = config.run.folder
    if resumes(config):
        _check_same_settings(config)
    elif config.run.resume_if_begun and (folder / CONFIG).is_file():
        _check_same_settings(config)  # killed before its first checkpoint
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"run folder {folder} exists and is not empty; choose another run.folder or say --run.resume")


def resumes(config: TrainConfig) -> bool:
    """Whether the run goes on from a checkpoint."""
    begun = (config.run.folder / checkpoint.CHECKPOINTS / checkpoint.LATEST).is_file()
    return config.run.resume or (config.run.resume_if_begun and begun)


def make_folder(config: TrainConfig, start: int = 0) -> None:
    """Makes the run folder with its config, once everything that can be wrong at the start was found right.

    A resumed run's log is cut back to the step that it starts from.
    """
    barrier()
    if rank() == 0:
        telemetry.truncate(config.run.folder, start)
        if not (config.run.folder / CONFIG).is_file():
            config.run.folder.mkdir(parents=True, exist_ok=True)
            save(config, config.run.folder / CONFIG)
    barrier()


def _check_same_settings(config: TrainConfig) -> None:
    """What decides the batches, the network and the schedule must be as it was; the rest of `run` may change."""
    if not (config.run.folder / CONFIG).is_file():
        raise ValueError(f"cannot resume {config.run.folder}: there is no run, it has no {CONFIG}")
    earlier = load(config.run.folder / CONFIG)
    for section in ("plan", "augment", "model", "loss", "softmax", "optimizer"):
        was, now = getattr(earlier, section), getattr(config, section)
        if was != now:
            raise ValueError(f"cannot resume {config.run.folder}: it was trained with {was}, now {now} is asked for")
    pairs = [
        (f"run.{name}", getattr(earlier.run, name), getattr(config.run, name)) for name in ("seed", "steps", "epochs")
    ]
    for name, was, now in [*pairs, ("data.image_size", earlier.data.image_size, config.data.image_size)]:
        if was != now:
            raise ValueError(f"cannot resume {config.run.folder}: {name} was {was}, now {now} is asked for")


def _prepare(config: TrainConfig, accelerator: Accelerator, batch_size: int) -> tuple[Trained, Engine]:
    """What is trained, and the engine that trains it, as accelerate wraps them."""
    module: nn.Module = Embedder(
        config.model,
        use_bf16(config.run.precision, accelerator.device),
        config.data.image_size,
        with_norms=config.softmax.kind == "adaface",
    )
    if config.model.sync_batchnorm:
        if accelerator.device.type != "cuda":
            raise ValueError("model.sync_batchnorm is True; PyTorch has it on GPUs only")
        module = with_sync_batchnorm(module, config.model.trunk)
    deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
    if not deepspeed:  # its broadcast wants contiguous parameters; the images are channels-last all the same
        module = module.to(memory_format=torch.channels_last)
    else:
        settings = accelerator.state.deepspeed_plugin.deepspeed_config
        settings["train_micro_batch_size_per_gpu"] = batch_size
        if settings.get("gradient_clipping", "auto") == "auto":  # accelerate would silently clip to norm 1, unlike DDP
            settings["gradient_clipping"] = 0.0
    if config.run.compile:
        module.compile()
    with warnings.catch_warnings():  # accelerate has no word yet for what broadcast_buffers is called in this torch
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        model, optimizer = accelerator.prepare(module, make_optimizer(module, config.optimizer))
    if recorder() is not None:
        time_all_reduce(model, config.run.gradient_compression)
    bare = accelerator.unwrap_model(model)
    decay = config.optimizer.ema_decay
    ema = AveragedModel(bare, multi_avg_fn=get_ema_multi_avg_fn(decay)) if decay else None
    trained = Trained(model=bare, optimizer=optimizer, engine=model if deepspeed else None, ema=ema)
    trained.memory = CrossBatchMemory(config.loss.memory)
    if deepspeed:
        return trained, DeepSpeedEngine(model)
    return trained, PlainEngine(model, optimizer.optimizer, config.optimizer.clip_norm)


def _centres(config: TrainConfig, split: Split, device: torch.device) -> Centres | None:
    """Of the identities that training draws: those with two pictures or more."""
    if config.softmax.kind == "none":
        return None
    identities = split.identities[split.counts >= 2]
    return Centres(config.softmax, identities, config.model.embedding_size, seed=config.run.seed, device=device)


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> Optimizer:
    groups = parameter_groups(model, config.weight_decay)
    if config.kind == "adamw":
        return AdamW(groups, lr=config.learning_rate, betas=(config.momentum, 0.999), fused=True)
    return SGD(groups, lr=config.learning_rate, momentum=config.momentum, nesterov=config.momentum > 0, fused=True)


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """Of step 1, 2, … `steps`: linear warm-up, then half a cosine down towards 0, which step
    `steps` + 1 would reach. Source: Loshchilov, Hutter 2017."""
    if step <= config.warmup_steps:
        return config.learning_rate * step / config.warmup_steps
    done = (step - config.warmup_steps - 1) / max(1, steps - config.warmup_steps)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def set_learning_rate(
    optimizer: Optimizer, config: OptimizerConfig, step: int, steps: int, factor: float = 1.0
) -> float:
    rate = factor * learning_rate(config, step, steps)
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate


def make_accelerator(config: RunConfig) -> Accelerator:
    """One for the launcher's ranks. Without a GPU the process group is gloo, also under DeepSpeed."""
    cpu = config.device == "cpu" or not torch.cuda.is_available()
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    if deepspeed and config.gradient_compression != "none":
        raise ValueError(
            f"run.gradient_compression is {config.gradient_compression}; under DeepSpeed it must be none, and its JSON file's "
            "communication_data_type says how gradients travel"
        )
    # evaluation takes rank 0's buffers and training uses none; the graph changes where the batch goes in parts
    ddp = DistributedDataParallelKwargs(
        gradient_as_bucket_view=True,
        broadcast_buffers=False,
        static_graph=config.micro_batch is None,
        comm_hook=DDPCommunicationHookType.BF16
        if config.gradient_compression == "bf16"
        else DDPCommunicationHookType.NO,
    )
    handlers: list[KwargsHandler] = [ddp]
    if "LOCAL_RANK" in os.environ:  # started by hand, accelerate makes no group and stumbles over a named backend
        limit = timedelta(seconds=config.stall_s + 60)  # the watchdog is to speak first
        handlers.append(InitProcessGroupKwargs(backend="gloo" if cpu else "nccl", timeout=limit))
    if cpu:
        share_cores()
    accelerator = Accelerator(
        cpu=cpu and not deepspeed,  # accelerate takes cpu=True for "not DeepSpeed"
        mixed_precision="no",  # the model's own autocast is what run.precision sets
        kwargs_handlers=handlers,
    )
    if not cpu:
        torch.backends.cudnn.benchmark = True
    return accelerator


def _headline(
    split: Split, plan: AnyPlan, config: TrainConfig, accelerator: Accelerator, start: int, steps: int
) -> str:
    told, asked = plan.summary(), config.plan
    precision = "bf16" if use_bf16(config.run.precision, accelerator.device) else "fp32"
    return (
        f"facescale: {len(split):,} images of {told.identities:,} identities ({told.single_image_identities:,} more have one "
        f"image and are left out); P x K = {asked.identities_per_batch} x {asked.images_per_identity} over {world_size()} "
        f"rank(s); {told.steps_per_epoch:,} steps an epoch repeat {told.groups_repeated:,} and leave out "
        f"{told.groups_left_out:,} of {told.groups:,} groups; step {start:,} to {steps:,}; {accelerator.device}, {precision}; "
        f"torch {torch.__version__}, torchvision {torchvision.__version__}"
    )


def _network(config: TrainConfig, model: nn.Module) -> str:
    assert isinstance(model, Embedder)
    size = size_of(model)
    return (
        f"facescale: {config.model.trunk}, head {config.model.head_kind}, {config.model.embedding_size} dimensions: "
        f"{size.parameters:,} parameters; {size.multiply_adds / 1e9:.3g} x 10^9 multiply-adds (twice as many FLOPs) forward for "
        f"one picture of {config.data.image_size} px"
    )


Work = Callable[[TrainConfig, Accelerator, Watchdog, Asked], None]


def main(argv: Sequence[str] | None = None, prog: str = "python -m trainer.train", work: Work = train) -> int:
    """Exit code 0, 1 (failed), 2 (usage), 70 (a rank hangs or is dead) or 75 (asked to stop: saved, start it again with
    --run.resume). One rank of each machine says what is wrong.

    Args:
        work: what is done with these settings and ranks.
    """
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    watchdog = None
    try:
        config = parse(sys.argv[1:] if argv is None else argv, prog)
        with asked_to_stop() as asked:
            accelerator = make_accelerator(config.run)
            watchdog = Watchdog(config.run.stall_s)
            work(config, accelerator, watchdog, asked)
            watchdog.end()
    except Preempted as stop:
        assert watchdog is not None
        watchdog.end()
        if first:
            print(f"facescale: {stop}", file=sys.stderr)
        return EXIT_PREEMPTED
    except (ValueError, OSError) as error:
        if os.environ.get("FACESCALE_TRACEBACK"):
            raise
        said, code = " ".join(str(error).split()), 2 if isinstance(error, UsageError) else 1
        if first:
            print(f"facescale: {said}", file=sys.stderr)
        if watchdog is not None:
            watchdog.fail(said, code)
        return code
    except RuntimeError as error:  # of a collective whose other end is gone, above all
        verdict = watchdog.explain() if watchdog is not None else None
        if watchdog is None or verdict is None or os.environ.get("FACESCALE_TRACEBACK"):
            raise
        watchdog.give_up(verdict, str(error).splitlines()[0])  # leaving the process group would wait for the others
    except SystemExit as stop:  # --help
        return int(stop.code or 0)
    except KeyboardInterrupt:
        if first:
            print(
                "facescale: interrupted; --run.resume goes on from the newest checkpoint, if there is one",
                file=sys.stderr,
            )
        if watchdog is not None:
            watchdog.fail("it was interrupted", 1)
        return 1
    finally:
        shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
