"""Identification among distractors: unseen identities' probes when strangers, up to millions, join their gallery.

Distractors are embedded and searched some at a time: memory is that of the unseen identities' embeddings and `NUMBERS` more,
whatever the number of distractors.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_shards.index import ShardSet, Split
from data_shards.reader import open_reader
from trainer.evaluation.measures import Scalars
from trainer.evaluation.protocols import SetResult
from trainer.evaluation.search.rank_search import search
from trainer.evaluation.sets.prepared import Embed, Part, Report, embed_parts
from trainer.metric.identification import mated_ranks, split_gallery

RANKS = (1, 5)
NUMBERS = 1 << 26
"""Numbers of distractors' embeddings held at once: 256 MiB."""
UNSEEN = "unseen_identities"


@dataclass(frozen=True)
class DistractorSet:
    """Probes and gallery of unseen identities, and who joins the gallery; see `Prepared`."""

    name: str
    unseen: Split
    splits: list[Split]
    """Of the distractors' shards, n samples in all."""
    order: NDArray[np.int64]
    """In which distractors join, numbered through all splits; without those that are unseen images themselves, shape (n,)."""
    left_out: int

    def judge(self, embedded: Embed, report: Report) -> SetResult:
        samples = np.arange(len(self.unseen))
        embeddings = embed_parts(embedded, [(self.unseen, samples)], self.unseen.name)
        identities = torch.from_numpy(self.unseen.samples["identity"].astype(np.int64))
        gallery, probes = split_gallery(identities, 1)
        ranks, mates = _among_enrolled(embeddings, identities, gallery, probes, report.device)
        above = torch.zeros_like(ranks)
        rows = [_row(0, ranks)]
        for split in self.splits:
            embedded(split, None)  # the whole set at once; an embedder that keeps it takes the stretches from there
        most = max(1024, NUMBERS // embeddings.shape[1])
        for count, parts in _stretches(self.splits, self.order, most):
            joined = embed_parts(embedded, parts, self.name)
            best, _ = search(joined, embeddings[probes], min(RANKS[-1], len(joined)), report.device)
            above += (best > mates[:, None]).sum(1)  # at least RANKS[-1] where the mate is beyond every rank
            if count is not None:
                rows.append(_row(count, torch.where(ranks > 0, ranks + above, 0)))
        about = report.about(len(samples), {"distractors_left_out": self.left_out}, {"ranks": list(RANKS)})
        people = {"identities": len(identities.unique()), "gallery_identities": len(gallery)}
        sizes = people | {"gallery": len(gallery) + len(self.order), "probes": len(probes)}
        last = {name: value for name, value in rows[-1].items() if name != "count"}
        return SetResult(about | sizes | last | {"distractors": rows})


def distractor_set(name: str, source: ShardSet, joining: ShardSet, seed: int) -> DistractorSet:
    """Finds probes, gallery and distractors, and draws the order in which these join.

    Args:
        source: the run's shards, with unseen identities.
        joining: all of its images are distractors, but for those that are, byte for byte, unseen images.
        seed: of the order in which they join.
    Raises:
        ValueError: there are no unseen identities, too few to rank, or no distractors.
    Source: Kemelmacher-Shlizerman et al. 2016, "The MegaFace Benchmark": Rank-k against 10, 100, … 10^6 distractors.
    """
    if UNSEEN not in source.splits:
        raise ValueError(
            f"{source.path} holds no identities out for distractors to join: shard with --holdout-identities"
        )
    unseen = source.split(UNSEEN)
    if len(unseen.identities) < RANKS[-1] or unseen.counts.max() < 2:
        found = f"{len(unseen.identities)} unseen identities, the largest of {unseen.counts.max()} images"
        raise ValueError(f"{source.path} has {found}; distractors need {RANKS[-1]} identities, one of them of 2 images")
    splits = [joining.split(split) for split in joining.splits]
    strangers = np.flatnonzero(~np.concatenate([_repeats(split, unseen) for split in splits]))
    total = sum(map(len, splits))
    if not len(strangers):
        raise ValueError(f"distractors {joining.path} hold nothing but images of the unseen identities themselves")
    order = np.random.Generator(np.random.PCG64(seed)).permutation(strangers)
    return DistractorSet(f"unseen identities among {name}", unseen, splits, order, total - len(order))


def _repeats(split: Split, unseen: Split) -> NDArray[np.bool_]:
    """Which images of a split are unseen images byte for byte, shape (n,); only those of equal checksums are read.

    Equal checksums are not enough: the CRC-32 of a PNG depends on little but the lengths of its parts.
    """
    theirs, ours = _checksums(split), _checksums(unseen)
    found = np.isin(theirs, ours)
    alike = np.flatnonzero(np.isin(ours, theirs[found]))
    known = {sha256(data.tobytes()).digest() for data in open_reader(unseen).read(alike)}
    candidates = np.flatnonzero(found)
    found[candidates] = [sha256(data.tobytes()).digest() in known for data in open_reader(split).read(candidates)]
    return found


def _checksums(split: Split) -> NDArray[np.uint64]:
    """Size and CRC-32 of each image in one number."""
    return split.samples["size"].astype(np.uint64) << np.uint64(32) | split.samples["crc32"].astype(np.uint64)


def _among_enrolled(
    embeddings: Tensor, identities: Tensor, gallery: Tensor, probes: Tensor, device: str
) -> tuple[Tensor, Tensor]:
    """Rank of each probe's mate among the enrolled identities, 0 beyond `RANKS`, and its similarity, shape (p,) each."""
    similarities, positions = search(embeddings[gallery], embeddings[probes], RANKS[-1], device)
    neighbours = identities[gallery][positions]  # (p, k)
    ranks = mated_ranks(neighbours, identities[probes])
    return ranks, similarities.gather(1, (ranks - 1).clamp(min=0)[:, None])[:, 0]


def _stretches(splits: list[Split], order: NDArray[np.int64], most: int) -> Iterator[tuple[int | None, list[Part]]]:
    """The distractors, at most so many at a time; with each last part before 10, 100, … and all of them, that number."""
    powers = [10**power for power in range(1, 19) if 10**power < len(order)]
    for begin, end in pairwise([0, *powers, len(order)]):
        for first in range(begin, end, most):
            last = min(first + most, end)
            yield (end if last == end else None), _parts(splits, np.sort(order[first:last]))


def _parts(splits: list[Split], numbers: NDArray[np.int64]) -> list[Part]:
    """Samples of each split, from ascending numbers that count through all of them."""
    ends = np.cumsum([len(split) for split in splits])
    cuts = np.searchsorted(numbers, [0, *ends])
    return [
        (split, numbers[low:high] - (end - len(split)))
        for split, end, (low, high) in zip(splits, ends.tolist(), pairwise(cuts.tolist()), strict=True)
    ]


def _row(count: int, ranks: Tensor) -> Scalars:
    """Shares of probes whose mate is at each rank or better; rank 0 is a miss."""
    hits = {f"rank{k}": float(((ranks > 0) & (ranks <= k)).double().mean()) for k in RANKS}
    return {"count": count} | hits
