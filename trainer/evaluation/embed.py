"""Every picture of a split once, over all ranks, through the loader that training uses; `embedding_store` keeps them on disk."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from data_shards.index import Split
from data_shards.loader import Loader, LoaderConfig, evaluation_loader
from data_shards.progress import Advance, progress
from trainer.collectives import all_reduce_sum, gather_objects, gather_rows, rank, world_size

PIXEL_SIZE = 64
"""Width and height at which raw pixels are compared."""
BATCH = 128
"""Images that go through the network at once."""

Function = Callable[[Tensor], Tensor]
"""(b, 3, H, W) uint8 -> (b, d) unit norm."""


def raw_pixels(images: Tensor) -> Tensor:
    """The baseline beside every result: the pixels themselves as a unit vector. (b, 3, H, W) -> (b, 3*H*W)."""
    return normalize(images.reshape(len(images), -1).float())


def mirrored(function: Function) -> Function:
    """Test-time averaging: the unit-length mean of a picture's embedding and of its mirror image's.

    Source: Deng et al. 2019, "ArcFace", whose evaluation adds the two likewise.
    """
    return lambda images: normalize(function(images).float() + function(images.flip(-1)).float())


@dataclass
class Pace:
    """How fast a rank embeds."""

    images: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    """Seconds of them spent waiting for pictures."""

    def of_all_ranks(self) -> tuple[float, float]:
        """Images/s of all ranks together, and the percentage of the time that they waited for data; every rank calls it."""
        ranks: list[Pace] = gather_objects(self)
        images, waited = sum(pace.images for pace in ranks), sum(pace.waited for pace in ranks)
        slowest, together = max(pace.seconds for pace in ranks), sum(pace.seconds for pace in ranks)
        return images / max(slowest, 1e-9), 100 * waited / max(together, 1e-9)


@torch.inference_mode()
def embeddings_of(function: Function, loader: Loader, pace: Pace, advance: Advance) -> Iterator[Tensor]:
    """Embeddings of each batch of a loader, float32, shape (b, d), on the loader's device."""
    begun = time.perf_counter()
    while True:
        waits = time.perf_counter()
        batch = next(loader, None)
        pace.waited += time.perf_counter() - waits
        if batch is None:
            return
        found = function(batch.images).float()  # (b, d)
        pace.images += len(found)
        pace.seconds = time.perf_counter() - begun
        advance(len(found) * world_size())
        yield found


@contextmanager
def evaluating(function: Function) -> Iterator[None]:
    """Puts a module into evaluation mode, and back afterwards."""
    module = function if isinstance(function, nn.Module) else None
    training = module is not None and module.training
    if module is not None:
        module.eval()
    try:
        yield
    finally:
        if module is not None:
            module.train(training)


def check_decoded(loader: Loader, split: Split) -> None:
    """Every rank calls it.

    Raises:
        ValueError: on all ranks, where a rank has met pictures that do not decode any more; a result with others in their place
            would be another set's.
    """
    damaged = int(all_reduce_sum(torch.tensor(len(loader.undecodable), device=loader.device)))
    if damaged:
        mine = ", ".join(loader.undecodable.values()) or "on another rank"
        raise ValueError(f"{damaged} pictures of split {split.name} do not decode ({mine}): run `facescale verify`")


def embed(
    function: Function,
    split: Split,
    config: LoaderConfig,
    *,
    samples: np.ndarray | None = None,
    batch_size: int = BATCH,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    """Embeddings of a split (or of `samples`, shape (n,)) in the order of its samples, the same on every rank.

    A module is put into evaluation mode for it and back afterwards. The result is whole on every rank: n * d * 4 bytes.

    Raises:
        ValueError: see `check_decoded`.
    Returns:
        embeddings: float32, unit norm, shape (n, d), on the CPU.
        identities: labels, int64, shape (n,), on the CPU.
    """
    ranks = {"rank": rank(), "world_size": world_size()}
    loader = evaluation_loader(split, config, batch_size=batch_size, samples=samples, device=device, **ranks)
    total = len(split) if samples is None else len(samples)
    with evaluating(function), progress(f"embed {split.name}", total, enabled=rank() == 0) as advance:
        parts = list(embeddings_of(function, loader, Pace(), advance))
    check_decoded(loader, split)
    width = gather_rows(torch.tensor([part.shape[1] for part in parts[:1]], dtype=torch.int64, device=device))
    mine = torch.cat(parts) if parts else torch.empty((0, int(width[0])), device=device)
    return gather_rows(mine).cpu(), labels(split, samples)


def labels(split: Split, samples: np.ndarray | None) -> Tensor:
    """Of a split, or of some of its samples, int64, shape (n,)."""
    identities = split.samples["identity"] if samples is None else split.samples["identity"][samples]
    return torch.from_numpy(identities.astype(np.int64))
