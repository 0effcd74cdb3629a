"""Every setting of training, once, and how settings come from a YAML file and the command line."""

import contextlib
import dataclasses
import difflib
import io
import itertools
import math
import sys
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import tyro
import yaml

from data_shards.augment import AugmentConfig
from data_shards.loader import LoaderConfig
from data_shards.plan import PlanConfig
from data_shards.stream_config import StreamConfig

CONFIG = "config.yaml"
"""Name of a run's settings in its folder."""
TRUNKS = ("resnet18", "resnet34", "resnet50", "resnet101", "iresnet18", "iresnet50", "iresnet100")
TIMM = "timm:"
"""Before the name of any model of timm."""


@dataclass(kw_only=True, frozen=True)
class DataConfig(LoaderConfig):
    shards: str = "shards"
    """Folder written by `facescale shard`, or its URL: s3://, gs://, az://, hf://, https://, http://."""
    stream: StreamConfig = field(default_factory=StreamConfig)
    """How shards at a URL are read and cached."""


@dataclass(kw_only=True, frozen=True)
class ModelConfig:
    trunk: str = "resnet50"
    """The network up to its head: torchvision's resnet18, resnet34, resnet50 or resnet101; InsightFace's iresnet18, iresnet50 or
    iresnet100; timm:NAME, any model of timm. Pictures are normalised as it wants them."""
    head: Literal["auto", "linear", "facenet", "arcface"] = "auto"
    """From the trunk to the embedding, before its L2 norm. linear: pooling, linear layer, `head_batchnorm`; facenet: pooling,
    dropout, linear layer without bias, batch norm; arcface: batch norm, dropout, linear layer on all places of the convolutional
    map, batch norm; auto: arcface for iresnets, linear for the others."""
    dropout: float | None = None
    """Share of the head's inputs that training puts to 0, in [0, 1); None: 0.6 for facenet, as there, 0 for the others."""
    embedding_size: int = 128
    """d: dimensions of the embedding."""
    head_batchnorm: bool = True
    """Batch-normalise the embedding before its L2 norm, as face networks do: a batch then cannot collapse to one point. Heads
    facenet and arcface always do."""
    weights: Path | None = None
    """Local file (.pth or .safetensors) with the trunk's published weights: torchvision's, timm's, or InsightFace's backbone.pth,
    with its head where that is arcface; or model.safetensors of an export or a checkpoint, with its head where that fits. None
    starts at random."""
    sync_batchnorm: bool = False
    """Batch statistics over all ranks instead of each rank's own (GPU only)."""

    def __post_init__(self) -> None:
        if not 2 <= self.embedding_size <= 4096:
            raise ValueError(f"model.embedding_size is {self.embedding_size}; allowed is 2 to 4096")
        if said := unknown_trunk(self.trunk):
            raise ValueError(f"model.trunk is {said}")
        if self.dropout is not None and not 0 <= self.dropout < 1:
            raise ValueError(f"model.dropout is {self.dropout}; allowed is [0, 1), or None")
        if not self.head_batchnorm and self.head_kind != "linear":
            raise ValueError(
                f"model.head_batchnorm is False; head {self.head_kind} has a batch norm of its own: set model.head to linear"
            )

    @property
    def head_kind(self) -> Literal["linear", "facenet", "arcface"]:
        """The head, or that which auto stands for."""
        if self.head == "auto":
            return "arcface" if self.trunk.startswith("iresnet") else "linear"
        return self.head

    @property
    def effective_dropout(self) -> float:
        """The share, or that which None stands for."""
        if self.dropout is None:
            return 0.6 if self.head_kind == "facenet" else 0.0
        return self.dropout


def unknown_trunk(name: str) -> str | None:
    """What is wrong with a trunk's name, in words, or None; which models timm has is found out where one is made."""
    if name in TRUNKS or (name.startswith(TIMM) and name != TIMM):
        return None
    near = difflib.get_close_matches(name, TRUNKS)
    meant = f"did you mean {' or '.join(near)}? " if near else ""
    return f"{name!r}; {meant}allowed are {', '.join(TRUNKS)}, and {TIMM}NAME for any model of timm"


@dataclass(kw_only=True, frozen=True)
class LossConfig:
    kind: Literal["smooth", "soft_margin", "margin", "contrastive"] = "smooth"
    """Triplets with soft_margin: log(1 + exp(d_ap - d_an)), or with margin: max(0, d_ap - d_an + margin), both chosen by
    `mining`; smooth: log(1 + sum exp(sharpness (d_ap - d_an + margin))) / sharpness over all triplets of an anchor, which trains
    from random weights; contrastive: over all pairs."""
    mining: Literal["batch_hard", "batch_all", "semi_hard", "hardest_semi_hard", "distance_weighted", "random"] = (
        "batch_hard"
    )
    """Which triplets the kinds margin and soft_margin take; random is there to be compared with."""
    margin: float = 0.2
    """Margin in the distance's own unit, above 0; not read for kind soft_margin."""
    sharpness: float = 10.0
    """In 1 / distance, above 0; read for kind smooth alone, which becomes batch_hard with a margin as it grows."""
    distance: Literal["root", "squared"] = "root"
    """L2 distance of unit vectors in [0, 2], or squared in [0, 4]."""
    average: Literal["active", "valid"] = "active"
    """Kind margin averages over the triplets with a positive loss, or over all valid ones."""
    candidates: Literal["all_ranks", "own_rank"] = "all_ranks"
    """With whose embeddings anchors are compared; own_rank is there to be compared with."""
    memory: int = 0
    """Cross-batch memory: so many embeddings of past batches are candidates, too, without gradient; 0 keeps none."""
    memory_start: int = 1000
    """Step from which the memory is used: before, embeddings change too fast."""

    def __post_init__(self) -> None:
        if not 0 < self.margin <= 4:
            raise ValueError(f"loss.margin is {self.margin}; allowed is above 0 and at most 4")
        if not 0 < self.sharpness <= 1000:
            raise ValueError(f"loss.sharpness is {self.sharpness}; allowed is above 0 and at most 1000")
        for name in ("memory", "memory_start"):
            if getattr(self, name) < 0:
                raise ValueError(f"loss.{name} is {getattr(self, name)}; it must be at least 0")
        if self.memory and self.kind in ("margin", "soft_margin") and self.mining in ("distance_weighted", "random"):
            raise ValueError(
                f"loss.memory is {self.memory}; loss.mining {self.mining} draws from the batch alone: set it to 0"
            )
        if self.memory and self.candidates == "own_rank":
            raise ValueError(
                "loss.memory holds the embeddings of all ranks; it does not go with loss.candidates own_rank"
            )

    @property
    def effective_margin(self) -> float | None:
        """The margin, or None for the soft margin."""
        return None if self.kind == "soft_margin" else self.margin

    @property
    def squared(self) -> bool:
        return self.distance == "squared"


@dataclass(kw_only=True, frozen=True)
class SoftmaxConfig:
    kind: Literal["none", "arcface", "cosface", "adaface"] = "none"
    """Margin softmax over the training identities, alone, before or beside the triplets, its class centres spread over the ranks;
    none: triplets alone."""
    weight: float = 1.0
    """Of the softmax in the sum with the triplets; 0: triplets alone after `warmup_steps`."""
    triplet_weight: float = 1.0
    """Of the triplets in that sum; 0: softmax alone, and the triplets' figures in the log are there to be read only."""
    warmup_steps: int = 0
    """The first so many steps train with the softmax alone, at weight 1."""
    margin: float | None = None
    """Radians (arcface), or of the cosine (cosface, adaface), in [0, 1.5]; None: 0.5, 0.35 and 0.4."""
    scale: float = 64.0
    """s: what cosines are multiplied by, above 0."""
    sample_rate: float = 1.0
    """Share of the centres that take part in a step, in (0, 1], drawn anew each time, besides those of the batch's own identities
    (PartialFC). Below 1 each step waits for the device."""
    learning_rate: float = 0.1
    """Of the centres, highest; follows the schedule of `optimizer.learning_rate`, whatever `weight` is."""
    momentum: float = 0.9
    """Of the centres' SGD, in [0, 1)."""
    weight_decay: float = 5e-4
    """L2, of the centres that take part."""
    quality_h: float = 0.333
    """adaface: how fast the margin changes with an embedding's norm, in (0, 1]."""
    quality_memory: float = 0.01
    """adaface: weight of a new batch in the moving mean and deviation of the norms, in (0, 1]."""

    def __post_init__(self) -> None:
        if self.margin is not None and not 0 <= self.margin <= 1.5:
            raise ValueError(f"softmax.margin is {self.margin}; allowed is [0, 1.5], or None")
        for name in ("scale", "learning_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"softmax.{name} is {getattr(self, name)}; it must be above 0 and finite")
        for name in ("weight", "triplet_weight", "warmup_steps", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"softmax.{name} is {getattr(self, name)}; it must be at least 0 and finite")
        for name in ("sample_rate", "quality_h", "quality_memory"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"softmax.{name} is {getattr(self, name)}; allowed is above 0 and at most 1")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"softmax.momentum is {self.momentum}; allowed is [0, 1)")
        if not self.weight and not (self.triplet_weight and (self.kind == "none" or self.warmup_steps)):
            raise ValueError(
                f"softmax.weight is 0 with softmax.triplet_weight {self.triplet_weight} and softmax.warmup_steps "
                f"{self.warmup_steps}; nothing would be trained, or no softmax: choose a weight or a warm-up above 0"
            )

    def weights(self, step: int) -> tuple[float, float]:
        """Of the triplets and of the softmax in a step, counted from 1."""
        if self.kind == "none":
            return 1.0, 0.0
        return (0.0, 1.0) if step <= self.warmup_steps else (self.triplet_weight, self.weight)


@dataclass(kw_only=True, frozen=True)
class GuardConfig:
    action: Literal["warn", "lower_rate", "smooth", "soft_margin", "semi_hard", "hardest_semi_hard"] = "smooth"
    """What to do when the embeddings have collapsed to a point: say so alone, train at a tenth of the learning rate, or go on
    with another loss or mining. smooth and semi_hard were seen to spread them again; soft_margin and lower_rate were not, once
    the collapse was complete."""
    spread: float = 0.1
    """Root mean square distance of the embeddings from their mean (1: all over the sphere) below which they have collapsed."""
    patience: int = 3
    """Lines of the log in a row that must show it."""

    def __post_init__(self) -> None:
        if not 0 < self.spread < 1:
            raise ValueError(f"guard.spread is {self.spread}; allowed is above 0 and below 1")
        if self.patience < 1:
            raise ValueError(f"guard.patience is {self.patience}; it must be at least 1")


@dataclass(kw_only=True, frozen=True)
class OptimizerConfig:
    kind: Literal["adamw", "sgd"] = "adamw"
    """AdamW, or SGD with Nesterov momentum."""
    learning_rate: float = 1e-3
    """Highest learning rate, reached after the warm-up; falls to 0 along a cosine."""
    warmup_steps: int = 100
    """Steps of linear warm-up."""
    weight_decay: float = 0.05
    """Decoupled (adamw) or L2 (sgd); of matrices and filters only."""
    clip_norm: float = 0.0
    """Gradients of a larger norm are scaled down to it; 0 never. Under DeepSpeed its JSON file says this instead."""
    ema_decay: float = 0.0
    """Evaluate and keep an average of the weights that forgets with this factor a step, in [0, 1); 0 keeps none."""
    momentum: float = 0.9
    """SGD's momentum, or AdamW's first beta, in [0, 1)."""

    def __post_init__(self) -> None:
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"optimizer.learning_rate is {self.learning_rate}; it must be above 0 and finite")
        for name in ("warmup_steps", "weight_decay", "clip_norm"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"optimizer.{name} is {getattr(self, name)}; it must be at least 0 and finite")
        for name in ("momentum", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"optimizer.{name} is {getattr(self, name)}; allowed is [0, 1)")


@dataclass(kw_only=True, frozen=True)
class RunConfig:
    folder: Path = Path("runs/facescale")
    """Run folder: config, logs, checkpoints, evaluation, report. Must not exist, or hold a run to `--run.resume`."""
    steps: int | None = None
    """Optimiser updates; None takes `run.epochs`."""
    epochs: int = 20
    """Passes of the plan; read where `run.steps` is None."""
    seed: int = 0
    """Chooses initial weights, order and augmentation."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Of forward and backward; auto is bf16 where the device has instructions for it."""
    device: Literal["auto", "cpu"] = "auto"
    """auto takes the GPU where there is one."""
    log_every: int = 10
    """Steps between two lines of the log; only these wait for the device."""
    evaluate_every: int = 0
    """Steps between two evaluations on held-out identities; 0 evaluates never."""
    evaluate_images: int = 5000
    """Images of held-out identities that an evaluation in training takes, at most."""
    best_metric: Literal["none", "rank1", "rank5", "knn", "verification_accuracy", "triplet_loss"] = "none"
    """Keep the checkpoint whose evaluation in training was best in this (triplet_loss: lowest), whatever else goes."""
    patience: int = 0
    """Evaluations in a row without a better `run.best_metric` after which training ends; 0: it goes on to its last step."""
    checkpoint_every: int = 500
    """Steps between two checkpoints; the last step always writes one."""
    keep_checkpoints: int = 2
    """Newest checkpoints that stay."""
    resume: bool = False
    """Go on from the newest checkpoint in the run folder."""
    resume_if_begun: bool = False
    """As resume where the run folder has a checkpoint, else begin: for scripts that are started again and again."""
    micro_batch: int | None = None
    """Images of each rank that go through the network at once: the batch can be larger than memory, for a second forward.
    Gradients stay those of the whole batch, with BatchNorm's statistics of each part. None: all at once."""
    compile: bool = False
    """torch.compile the network: a minute at the start (needs a C++ compiler) for some 4 % less time a step on a CPU."""
    gradient_compression: Literal["none", "bf16"] = "none"
    """Ranks exchange gradients as they are, or rounded to bf16, which halves the traffic; not with DeepSpeed, whose JSON file has
    communication_data_type."""
    non_finite: Literal["stop", "skip"] = "stop"
    """What to do when a loss or gradient is not finite. The weights stay as they are either way; skip goes on with the next
    batch."""
    stall_s: float = 600.0
    """Seconds that a rank may take for one thing (a step, its data, a checkpoint) before the job is ended and the rank named."""
    tensorboard: bool = True
    """Write TensorBoard events to the run folder."""
    trackers: tuple[Literal["wandb", "mlflow", "trackio"], ...] = ()
    """Who else gets the figures: Weights & Biases, MLflow, Trackio. They write below the run folder unless their own variables
    say where to send them: WANDB_MODE=online, MLFLOW_TRACKING_URI, TRACKIO_SPACE_ID."""
    tracker_project: str = "facescale"
    """What the trackers call the project, or experiment, that the run belongs to."""

    def __post_init__(self) -> None:
        for name in ("epochs", "log_every", "evaluate_images", "checkpoint_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ValueError(f"run.{name} is {getattr(self, name)}; it must be at least 1")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"run.steps is {self.steps}; it must be at least 1, or None")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"run.seed is {self.seed}; allowed is 0 to {2**32 - 1}")
        if self.micro_batch is not None and self.micro_batch < 1:
            raise ValueError(f"run.micro_batch is {self.micro_batch}; it must be at least 1, or None")
        if not 5 <= self.stall_s < math.inf:
            raise ValueError(f"run.stall_s is {self.stall_s}; allowed is 5 seconds and more")
        for name in ("evaluate_every", "patience"):
            if getattr(self, name) < 0:
                raise ValueError(f"run.{name} is {getattr(self, name)}; it must be at least 0")
        if len(set(self.trackers)) < len(self.trackers):
            raise ValueError(f"run.trackers is {' '.join(self.trackers)}; each may be named once")
        if not self.tracker_project.strip():
            raise ValueError("run.tracker_project is empty; the trackers need a name")
        if self.best_metric != "none" and not self.evaluate_every:
            raise ValueError(
                f"run.best_metric is {self.best_metric}, but run.evaluate_every is 0; evaluate every so many steps"
            )
        if self.patience and self.best_metric == "none":
            raise ValueError(
                f"run.patience is {self.patience}, but run.best_metric is none; choose what is to get better"
            )


@dataclass(kw_only=True, frozen=True)
class TrainConfig:
    """Train an embedding network on shards, data-parallel over all ranks."""

    data: DataConfig = field(default_factory=DataConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    softmax: SoftmaxConfig = field(default_factory=SoftmaxConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        if self.softmax.kind != "none" and self.loss.candidates == "own_rank":
            raise ValueError(
                f"softmax.kind is {self.softmax.kind}, whose centres meet the embeddings of all ranks; it does not go with "
                "loss.candidates own_rank"
            )


class UsageError(ValueError):
    """The command line or the config file does not say what is allowed; exit code 2."""


def parse(args: Sequence[str], prog: str = "python -m trainer.train") -> TrainConfig:
    """Settings from `--config FILE`, if given, then overridden by `--section.key value` (`--help` lists them all).

    Raises:
        UsageError: one line that names the setting, what was found and what is allowed.
    """
    args = [part for arg in args for part in (arg.split("=", 1) if arg.startswith("--config=") else (arg,))]
    default = TrainConfig()
    if "--config" in args:
        at = args.index("--config")
        if at + 1 == len(args):
            raise UsageError("--config needs a file")
        default = load(Path(args[at + 1]))
        del args[at : at + 2]
    return _parse_overrides(args, default, prog)


def _parse_overrides(args: list[str], default: TrainConfig, prog: str) -> TrainConfig:
    description = (
        "Train an embedding network. --config FILE reads settings from YAML first; the options below override it."
    )
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(TrainConfig, default=default, args=args, prog=prog, description=description)
    except SystemExit as stop:
        if stop.code:
            raise UsageError(_first_paragraph(said.getvalue())) from None
        sys.exit(0)


def _first_paragraph(box: str) -> str:
    """tyro's message without its frame, which is of ASCII where stdout is not UTF-8, and without what follows it."""
    lines = [line.strip("│ ") for line in box.splitlines()]
    top = next((number for number, line in enumerate(lines) if line.startswith(("╭─", "---"))), -1)
    inside = itertools.takewhile(lambda line: line and not line.startswith(("─", "╰─", "---")), lines[top + 1 :])
    return " ".join(inside)


def load(path: Path) -> TrainConfig:
    """Settings from a YAML file of sections.

    Raises:
        UsageError: the file is missing, is no YAML mapping, or has an unknown key or a value that is not allowed.
    """
    if not path.is_file():
        raise UsageError(f"config file {path} does not exist")
    try:
        found = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UsageError(f"config file {path} is not YAML: {' '.join(str(error).split())}") from None
    try:
        return _build(TrainConfig, {} if found is None else found, "")
    except ValueError as error:
        raise UsageError(f"config file {path}: {error}") from None


def save(config: TrainConfig, path: Path) -> None:
    """Writes all settings as YAML that `load` reads back equal; the file is whole or not there."""
    aside = path.with_name(f".{path.name}.partial")
    aside.write_text(dumped(config))
    aside.rename(path)


def dumped(config: TrainConfig | dict[str, Any]) -> str:
    """Settings as YAML that `load` reads back equal."""
    found = dataclasses.asdict(config) if isinstance(config, TrainConfig) else config
    return yaml.safe_dump(_plain(found), sort_keys=False)


def changed(config: Any, usual: Any = None) -> dict[str, Any]:
    """Sections with the settings alone that are not the default; empty where none is."""
    usual = type(config)() if usual is None else usual
    found = {}
    for name in vars(config):
        value, default = getattr(config, name), getattr(usual, name)
        if value != default:
            found[name] = changed(value, default) if dataclasses.is_dataclass(value) else value
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _build(kind: Any, found: Any, where: str) -> Any:
    """Makes a dataclass out of a mapping; `where` is its dotted name for messages."""
    if not isinstance(found, dict):
        raise ValueError(f"{where or 'the file'} is {found!r}; a mapping of settings is needed")
    hints = typing.get_type_hints(kind)
    unknown = [key for key in found if key not in hints]
    if unknown:
        raise ValueError(f"unknown key {_dotted(where, unknown[0])!r}; allowed are {', '.join(hints)}")
    return kind(**{key: _convert(hints[key], value, _dotted(where, key)) for key, value in found.items()})


def _dotted(where: str, key: object) -> str:
    return f"{where}.{key}" if where else str(key)


def _convert(kind: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return _build(kind, value, where)
    origin, members = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:
        return None if value is None else _convert(members[0], value, where)
    if origin is Literal and value in members:
        return value
    if origin is tuple and isinstance(value, list):
        if members[1:] == (...,):
            return tuple(_convert(members[0], item, where) for item in value)
        if len(value) == len(members):
            return tuple(_convert(member, item, where) for member, item in zip(members, value, strict=True))
    if kind is Path and isinstance(value, str):
        return Path(value)
    if kind is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        with contextlib.suppress(ValueError, OverflowError):
            return float(value)  # YAML reads 1e-3 as a string
    if kind in (int, bool, str) and type(value) is kind:
        return value
    allowed = " or ".join(map(str, members)) if origin is Literal else getattr(kind, "__name__", str(kind))
    if origin is tuple:
        allowed = "a list" if members[1:] == (...,) else f"a list of {len(members)} numbers"
    raise ValueError(f"{where} is {value!r}; allowed is {allowed}")
