"""Evaluates a run: embeds its held-out splits once with the trained network and once with raw pixels, and judges both."""

import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from data_shards.index import ShardSet, Split
from data_shards.loader import LoaderConfig
from data_shards.progress import progress
from trainer import checkpoint
from trainer.collectives import broadcast_buffers, gather_objects, rank
from trainer.config import CONFIG, DataConfig, LossConfig, TrainConfig, load
from trainer.evaluation.draws import draw_identities
from trainer.evaluation.embed import PIXEL_SIZE, Function, embed, mirrored, raw_pixels
from trainer.evaluation.embedding_store import (
    DTYPES,
    MANIFEST,
    Encoder,
    Stored,
    embed_to,
    folder_name,
    is_whole,
    read_embeddings,
)
from trainer.evaluation.index import engine_line
from trainer.evaluation.protocols import ProtocolConfig, SetResult, check_open_set, closed_set, open_set
from trainer.evaluation.results import (
    EVALUATION,
    FACESCALE,
    RAW_PIXELS,
    UNSEEN_IDENTITIES,
    UNSEEN_IMAGES,
    ResultRow,
    save_results,
)
from trainer.evaluation.search.finder import EXACT, SPLIT
from trainer.evaluation.sets.judge import SetsConfig, judge_sets
from trainer.evaluation.sets.prepared import Embed
from trainer.export.huggingface import is_exported, read_exported, weights_sha256
from trainer.model import Embedder
from trainer.precision import use_bf16

SETS = {"unseen_identities": UNSEEN_IDENTITIES, "unseen_images": UNSEEN_IMAGES}
EMBEDDINGS = "embeddings"
"""Name of the folder of stored embeddings in a run's folder."""
BASELINE_IMAGES = 5_000
"""Images of a set up to which raw pixels are judged, too: they take 48 KiB an image."""

SHOWN_IMAGES = 20_000
"""Images among which the report looks for examples; of a larger set, whole identities are drawn up to this."""

IN_TRAINING = ProtocolConfig(
    ranks=(1, 5), knn=(5,), fars=(), fpirs=(), roc_samples=0, retrieval_queries=0, cluster_samples=0, band_draws=0
)
"""Only what `SetResult.headline` has."""


@dataclass(kw_only=True, frozen=True)
class EmbedOptions:
    """With what, and how, a run's pictures are embedded."""

    checkpoint: str = "latest"
    """latest, best (of `run.best_metric`), or the number of a step."""
    mirror: bool = False
    """Average each picture's embedding with that of its mirror image."""
    dtype: str = "fp32"
    """fp32 or fp16, in which embeddings are stored."""

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}; allowed are {', '.join(DTYPES)}")


def load_run(run: Path, device: str = "cpu", which: str = "latest") -> tuple[TrainConfig, Embedder]:
    """Config of a run and the network of a checkpoint, in evaluation mode on `device`.

    Args:
        run: run folder, or a folder of `facescale export --format huggingface`, which has no checkpoints to choose from.
        which: see `checkpoint.chosen`.
    Raises:
        ValueError: no run there, no such checkpoint, a damaged one or one of another architecture.
    """
    config, model, _ = _load(run, device, which)
    return config, model


def _load(run: Path, device: str, which: str) -> tuple[TrainConfig, Embedder, dict[str, Any]]:
    """The last is what `encoder_of` tells of the weights: step and SHA-256."""
    if is_exported(run) and not (run / CONFIG).is_file():
        config, model, about = _load_exported(run, which)
    else:
        config, model, about = _load_checkpoint(run, device, which)
    return config, model.to(memory_format=torch.channels_last).to(device).eval(), about


def _load_checkpoint(run: Path, device: str, which: str) -> tuple[TrainConfig, Embedder, dict[str, Any]]:
    if not (run / CONFIG).is_file():
        raise ValueError(f"{run} is no run folder: it has no {CONFIG}")
    config = load(run / CONFIG)
    network = replace(config.model, weights=None)  # the checkpoint has them; the file may be gone
    model = Embedder(network, use_bf16(config.run.precision, device), config.data.image_size)
    found = checkpoint.chosen(run / checkpoint.CHECKPOINTS, which)
    found.load_model(model)
    return config, model, {"step": found.step, "weights": found.weights_sha256}


def _load_exported(folder: Path, which: str) -> tuple[TrainConfig, Embedder, dict[str, Any]]:
    if which != checkpoint.LATEST:
        raise ValueError(f"{folder} is an exported network and has no checkpoints; leave --checkpoint out")
    model, found = read_exported(folder)
    data, loss = DataConfig(image_size=found.image_size), LossConfig(distance=found.distance)
    config = TrainConfig(data=data, model=found.model, loss=loss)
    return config, model, {"step": found.step, "weights": weights_sha256(folder)}


def _open(run: Path, shards: Path | str | None, config: TrainConfig) -> ShardSet:
    if shards is None and not (run / CONFIG).is_file():
        raise ValueError(f"{run} is an exported network, which has no shards of its own: give --shards")
    return ShardSet.open(shards or config.data.shards, config.data.stream)


def encoder_of(run: Path, options: EmbedOptions, device: str) -> tuple[TrainConfig, Encoder]:
    """A run's config and the network of one of its checkpoints as an encoder.

    Raises:
        ValueError: see `load_run`.
    """
    config, model, found = _load(run, device, options.checkpoint)
    about = {
        "embedder": FACESCALE,
        **found,
        "precision": "bf16" if model.bf16 else "fp32",
        "mirror": options.mirror,
    }
    function: Function = mirrored(model) if options.mirror else model
    return config, Encoder(function, config.model.embedding_size, config.data, about)


def evaluate(
    run: Path,
    *,
    shards: Path | str | None = None,
    protocol: ProtocolConfig | None = None,
    sets: SetsConfig | None = None,
    options: EmbedOptions | None = None,
    device: str = "cpu",
) -> list[ResultRow]:
    """Judges a checkpoint on what its shards hold out and on further sets, raw pixels beside it; writes RUN/evaluation.

    Every rank calls it. Each picture is embedded once: the embeddings stay in RUN/embeddings, where the next evaluation of the
    same checkpoint finds them. Memory of each rank: three times the embeddings of one set, 12 n d bytes.

    Raises:
        ValueError: see `load_run`, `sets.judge_sets`; or the shards hold nothing out, or a held-out split is too small.
    """
    protocol, sets, options = protocol or ProtocolConfig(), sets or SetsConfig(), options or EmbedOptions()
    config, encoder = encoder_of(run, options, device)
    source = _open(run, shards, config)
    held_out = [name for name in SETS if name in source.splits]
    if not held_out and not (sets.pairs or sets.bins or sets.ijb or sets.distractors):
        raise ValueError(f"{source.location} holds nothing out: shard with --holdout-identities or --holdout-images")
    if "unseen_identities" in held_out:
        identities = source.split("unseen_identities").samples["identity"]
        check_open_set(torch.from_numpy(identities.astype(np.int64)), protocol)
    kept = _Kept(run / EMBEDDINGS, encoder, options.dtype, device)
    pixels = _baseline(config, device)
    loss: dict[str, Any] = {"margin": config.loss.effective_margin, "squared": config.loss.squared}
    asked = {**loss, "config": protocol, "device": device}
    further = judge_sets(  # first: a mistake in a list is told before the held-out pictures are embedded
        sets,
        source,
        [(FACESCALE, kept)],
        work=run / "sets",
        image_size=config.data.image_size,
        device=device,
        **loss,
    )
    rows, first = _judge_held_out([source.split(name) for name in held_out], source, kept, pixels, asked)
    if rank() == 0:
        _save(run, rows + further, first, source)
        kept.prune()
    return rows + further


Points = tuple[Split, Tensor, Tensor]


def _judge_held_out(
    splits: Sequence[Split], source: ShardSet, kept: Embed, pixels: Embed, asked: dict[str, Any]
) -> tuple[list[ResultRow], Points | None]:
    """Results of each split by the network and by raw pixels, and the network's embeddings of the first split."""
    rows: list[ResultRow] = []
    first: Points | None = None
    # an index of pixels, or their clusters, cost more than they tell
    exactly = asked | {"config": replace(asked["config"], search=EXACT, cluster_samples=0)}
    with progress("evaluate", len(splits), "sets", enabled=rank() == 0) as advance:
        for split in splits:
            judge = _judge_open if split.name == "unseen_identities" else _judge_closed
            points, result = judge(source, kept, **asked)
            rows.append(ResultRow(SETS[split.name], FACESCALE, result))
            if len(split) <= BASELINE_IMAGES:
                rows.append(ResultRow(SETS[split.name], RAW_PIXELS, judge(source, pixels, **exactly)[1]))
            if first is None:
                first = (split, *points)
                _tell(_searched(points[0], asked["config"], asked["device"]))
            advance(1)
    return rows, first


def _searched(gallery: Tensor, config: ProtocolConfig, device: str) -> str:
    if config.search in (EXACT, SPLIT):
        return engine_line(gallery, config.knn[-1], device)
    return f"approximate search: {config.search}; the results have its recall"


def _save(run: Path, rows: Sequence[ResultRow], first: Points | None, source: ShardSet) -> None:
    if first is None:
        save_results(run / EVALUATION, rows, None, None)
        return
    split, embeddings, identities = first
    samples = torch.arange(len(identities))
    if len(samples) > SHOWN_IMAGES:
        samples = draw_identities(identities, SHOWN_IMAGES, seed=0)
    shown: dict[str, Any] = {"split": split, "samples": samples.numpy(), "names": source.identity_names}
    save_results(run / EVALUATION, rows, embeddings[samples], identities[samples], **shown)


class _Kept:
    """Embeds a split, or finds it in the folder of stored embeddings."""

    def __init__(self, folder: Path, encoder: Encoder, dtype: str, device: str) -> None:
        self._folder, self._encoder, self._dtype, self._device = folder, encoder, dtype, device
        self._told: set[str] = set()

    def __call__(self, split: Split, samples: np.ndarray | None) -> tuple[Tensor, Tensor]:
        pictures = split.fingerprint
        whole = self._folder / folder_name(self._encoder, split, pictures, None, self._dtype)
        if samples is not None and is_whole(whole):
            found = read_embeddings(whole)
            rows = torch.from_numpy(samples)
            return found.embeddings[rows], found.identities[rows]
        name = folder_name(self._encoder, split, pictures, samples, self._dtype)
        found = embed_to(
            self._folder / name,
            self._encoder,
            split,
            fingerprint=pictures,
            samples=samples,
            dtype=self._dtype,
            device=self._device,
        )
        if name not in self._told:
            tell_pace(found, split.name)
        self._told.add(name)
        return found.embeddings, found.identities

    def prune(self) -> None:
        """Deletes embeddings by other weights than these."""
        for manifest in self._folder.glob(f"*/{MANIFEST}"):
            if json.loads(manifest.read_text()).get("weights") != self._encoder.about["weights"]:
                shutil.rmtree(manifest.parent)


def tell_pace(found: Stored, name: str) -> None:
    """Says on rank 0 how fast a set was embedded."""
    pace = f"{found.manifest['images_per_s']:,.0f} images/s, data wait {found.manifest['data_wait_percent']:.1f} %"
    _tell(f"{len(found.embeddings):,} images of {name} embedded at {pace}")


def _tell(text: str) -> None:
    if rank() == 0:
        print(f"facescale: {text}", file=sys.stderr)


def _baseline(config: TrainConfig, device: str) -> Embed:
    loader = LoaderConfig(image_size=PIXEL_SIZE, decode_threads=config.data.decode_threads)
    return lambda split, samples: embed(raw_pixels, split, loader, samples=samples, device=device)


Judged = tuple[tuple[Tensor, Tensor], SetResult]


def _judge_open(source: ShardSet, embedded: Embed, **asked: Any) -> Judged:
    points = embedded(source.split("unseen_identities"), None)
    return points, open_set(*points, **asked)


def _judge_closed(source: ShardSet, embedded: Embed, **asked: Any) -> Judged:
    """Unseen images against the first `closed_gallery_images` training images of the identities that have unseen ones."""
    train, unseen = source.split("train"), source.split("unseen_images")
    nth = np.arange(len(train)) - np.repeat(train.starts[:-1], train.counts)
    enrolled = np.isin(train.samples["identity"], unseen.identities)
    gallery = np.flatnonzero((nth < asked["config"].closed_gallery_images) & enrolled)
    points = embedded(unseen, None)
    return points, closed_set(*embedded(train, gallery), *points, **asked)


def check_in_training(held_out: Split, config: TrainConfig) -> None:
    """Refuses, before training, held-out identities that `evaluate_in_training` could not judge.

    Raises:
        ValueError: see `check_open_set`.
    """
    labels = held_out.samples["identity"][_in_training(held_out, config)]
    check_open_set(torch.from_numpy(labels.astype(np.int64)), IN_TRAINING)


def _in_training(held_out: Split, config: TrainConfig) -> np.ndarray:
    return np.arange(min(len(held_out), config.run.evaluate_images))


def evaluate_in_training(
    model: nn.Module, held_out: Split, config: TrainConfig, device: torch.device
) -> dict[str, float]:
    """Headline figures on the first `run.evaluate_images` images of held-out identities; every rank calls it and has rank 0's."""
    broadcast_buffers(model)
    samples = _in_training(held_out, config)
    embeddings, identities = embed(model, held_out, config.data, samples=samples, device=device)
    result = open_set(
        embeddings,
        identities,
        margin=config.loss.effective_margin,
        squared=config.loss.squared,
        config=IN_TRAINING,
        device=str(device),
    )
    found: dict[str, float] = gather_objects(result.headline())[0]
    return found


def write_embeddings(
    run: Path,
    out: Path,
    *,
    shards: Path | str | None = None,
    split: str = "unseen_identities",
    options: EmbedOptions | None = None,
    device: str = "cpu",
) -> Stored:
    """Embeds a split into OUT (`embedding_store` has the files); every rank calls it. Interrupted, the same call goes on.

    Raises:
        ValueError: see `load_run`; or `out` holds something else, or the shards have no such split.
    """
    options = options or EmbedOptions()
    config, encoder = encoder_of(run, options, device)
    opened = _open(run, shards, config).split(split)
    return embed_to(out, encoder, opened, fingerprint=opened.fingerprint, dtype=options.dtype, device=device)
