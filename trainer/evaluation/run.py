"""Evaluates a run: embeds its held-out splits once with the trained network and once with raw pixels, and judges both."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from data_shards.index import ShardSet, Split
from data_shards.loader import LoaderConfig
from data_shards.progress import progress
from trainer import checkpoint
from trainer.collectives import broadcast_buffers
from trainer.config import CONFIG, TrainConfig, load
from trainer.evaluation.embed import PIXEL_SIZE, embed, raw_pixels
from trainer.evaluation.protocols import ProtocolConfig, SetResult, check_open_set, closed_set, open_set
from trainer.evaluation.results import (
    EVALUATION,
    FACESCALE,
    RAW_PIXELS,
    UNSEEN_IDENTITIES,
    UNSEEN_IMAGES,
    ResultRow,
    replaced_folder,
    save_results,
)
from trainer.model import Embedder
from trainer.precision import use_bf16

SETS = {"unseen_identities": UNSEEN_IDENTITIES, "unseen_images": UNSEEN_IMAGES}

IN_TRAINING = ProtocolConfig(ranks=(1, 5), knn=(5,), fars=())

Embed = Callable[[Split, np.ndarray | None], tuple[Tensor, Tensor]]


def load_run(run: Path, device: str = "cpu") -> tuple[TrainConfig, Embedder]:
    """Config of a run and the network of its newest checkpoint, in evaluation mode on `device`.

    Raises:
        ValueError: no run there, no checkpoint, a damaged one or one of another architecture.
    """
    if not (run / CONFIG).is_file():
        raise ValueError(f"{run} is no run folder: it has no {CONFIG}")
    config = load(run / CONFIG)
    model = Embedder(config.model, use_bf16(config.run.precision, device))
    checkpoint.latest(run / checkpoint.CHECKPOINTS).load_model(model)
    return config, model.to(memory_format=torch.channels_last).to(device).eval()


def evaluate(
    run: Path, *, shards: Path | None = None, protocol: ProtocolConfig | None = None, device: str = "cpu"
) -> list[ResultRow]:
    """Judges the newest checkpoint on what its shards hold out, raw pixels beside it; writes RUN/evaluation.

    Raises:
        ValueError: see `load_run`; or the shards hold nothing out, or a held-out split is too small.
    """
    protocol = protocol or ProtocolConfig()
    config, model = load_run(run, device)
    source = ShardSet.open(shards or config.data.shards)
    held_out = [name for name in SETS if name in source.splits]
    if not held_out:
        raise ValueError(f"{source.path} holds nothing out: shard with --holdout-identities or --holdout-images")
    if "unseen_identities" in held_out:
        identities = source.split("unseen_identities").samples["identity"]
        check_open_set(torch.from_numpy(identities.astype(np.int64)), protocol)
    rows: list[ResultRow] = []
    judged: dict[str, tuple[Tensor, Tensor]] = {}
    with progress("evaluate", 2 * len(held_out), "results") as advance:
        for split in held_out:
            for embedder, embedded in _embedders(config, model, device):
                judge = _judge_open if split == "unseen_identities" else _judge_closed
                found, result = judge(source, embedded, **_judged(config, protocol, device))
                judged.setdefault(embedder, found)
                rows.append(ResultRow(SETS[split], embedder, result))
                advance(1)
    save_results(run / EVALUATION, rows, *judged[FACESCALE])
    return rows


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
    """Headline figures on the first `run.evaluate_images` images of held-out identities; every rank calls it."""
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
    return result.headline()


def _embedders(config: TrainConfig, model: Embedder, device: str) -> list[tuple[str, Embed]]:
    pixels = LoaderConfig(image_size=PIXEL_SIZE, decode_threads=config.data.decode_threads)

    def network(split: Split, samples: np.ndarray | None) -> tuple[Tensor, Tensor]:
        return embed(model, split, config.data, samples=samples, device=device)

    def baseline(split: Split, samples: np.ndarray | None) -> tuple[Tensor, Tensor]:
        return embed(raw_pixels, split, pixels, samples=samples, device=device)

    return [(FACESCALE, network), (RAW_PIXELS, baseline)]


def _judged(config: TrainConfig, protocol: ProtocolConfig, device: str) -> dict[str, Any]:
    return {
        "margin": config.loss.effective_margin,
        "squared": config.loss.squared,
        "config": protocol,
        "device": device,
    }


Judged = tuple[tuple[Tensor, Tensor], SetResult]


def _judge_open(source: ShardSet, embedded: Embed, **judged: Any) -> Judged:
    points = embedded(source.split("unseen_identities"), None)
    return points, open_set(*points, **judged)


def _judge_closed(source: ShardSet, embedded: Embed, **judged: Any) -> Judged:
    """Unseen images against the first `closed_gallery_images` training images of the identities that have unseen ones."""
    train, unseen = source.split("train"), source.split("unseen_images")
    nth = np.arange(len(train)) - np.repeat(train.starts[:-1], train.counts)
    enrolled = np.isin(train.samples["identity"], unseen.identities)
    gallery = np.flatnonzero((nth < judged["config"].closed_gallery_images) & enrolled)
    points = embedded(unseen, None)
    return points, closed_set(*embedded(train, gallery), *points, **judged)


def write_embeddings(
    run: Path, out: Path, *, shards: Path | None = None, split: str = "unseen_identities", device: str = "cpu"
) -> tuple[int, int]:
    """Writes OUT/embeddings.npy (n, d) float32, identities.npy (n,) int64 and keys.txt, n lines, in the split's order.

    Returns:
        n and d.
    Raises:
        ValueError: see `load_run`; or `out` exists and is not empty, or the shards have no such split.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not empty; choose another folder")
    config, model = load_run(run, device)
    opened = ShardSet.open(shards or config.data.shards).split(split)
    embeddings, identities = embed(model, opened, config.data, device=device)
    with replaced_folder(out) as folder:
        np.save(folder / "embeddings.npy", embeddings.numpy())
        np.save(folder / "identities.npy", identities.numpy())
        (folder / "keys.txt").write_text("".join(f"{opened.key(sample)}\n" for sample in range(len(opened))))
    return embeddings.shape[0], embeddings.shape[1]
