"""Every picture of a split once, over all ranks, through the loader that training uses."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from data_shards.index import Split
from data_shards.loader import LoaderConfig, evaluation_loader
from data_shards.progress import progress
from trainer.collectives import all_reduce_sum, gather_rows, rank, world_size

PIXEL_SIZE = 64
"""Width and height at which raw pixels are compared."""


def raw_pixels(images: Tensor) -> Tensor:
    """The baseline beside every result: the pixels themselves as a unit vector. (b, 3, H, W) -> (b, 3*H*W)."""
    return normalize(images.reshape(len(images), -1).float())


@torch.inference_mode()
def embed(
    embedder: Callable[[Tensor], Tensor],
    split: Split,
    config: LoaderConfig,
    *,
    samples: np.ndarray | None = None,
    batch_size: int = 128,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    """Embeddings of a split (or of `samples`, shape (n,)) in the order of its samples, the same on every rank.

    A module is put into evaluation mode for it and back afterwards. The result is whole on every rank: n * d * 4 bytes.

    Raises:
        ValueError: pictures do not decode any more; a result with others in their place would be another set's.
    Returns:
        embeddings: float32, unit norm, shape (n, d), on the CPU.
        identities: labels, int64, shape (n,), on the CPU.
    """
    module = embedder if isinstance(embedder, nn.Module) else None
    training = module is not None and module.training
    if module is not None:
        module.eval()
    loader = evaluation_loader(
        split,
        config,
        batch_size=batch_size,
        samples=samples,
        rank=rank(),
        world_size=world_size(),
        device=device,
    )
    parts: list[Tensor] = []
    total = len(split) if samples is None else len(samples)
    with progress(f"embed {split.name}", total, enabled=rank() == 0) as advance:
        for batch in loader:
            parts.append(embedder(batch.images).float())  # (b, d)
            advance(len(batch.images) * world_size())
    if module is not None:
        module.train(training)
    damaged = all_reduce_sum(torch.tensor(len(loader.undecodable), device=device))
    if damaged:
        mine_damaged = ", ".join(loader.undecodable.values()) or "on another rank"
        raise ValueError(
            f"{int(damaged)} pictures of split {split.name} do not decode ({mine_damaged}): run `facescale verify`"
        )
    width = gather_rows(torch.tensor([part.shape[1] for part in parts[:1]], dtype=torch.int64, device=device))
    mine = torch.cat(parts) if parts else torch.empty((0, int(width[0])), device=device)
    identities = split.samples["identity"] if samples is None else split.samples["identity"][samples]
    return gather_rows(mine).cpu(), torch.from_numpy(identities.astype(np.int64))
