"""Templates: several images of a person as one vector; 1:1 over a list of template pairs, 1:N against galleries.

Images are embedded some at a time and averaged at once, so that memory is that of the templates' vectors, of `IMAGES` embeddings
and 90 bytes a pair (1.4 GB for lists as long as IJB-C's, 15.7 million pairs), on each rank, whatever the number of images.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_shards.index import Split
from trainer.collectives import all_reduce_sum, rank, world_size
from trainer.evaluation.measures import Curves, Scalars, open_set_point
from trainer.evaluation.protocols import SetResult
from trainer.evaluation.search.rank_search import search
from trainer.evaluation.sets.pair_sets import judge_scores
from trainer.evaluation.sets.prepared import Embed, Report, embed_parts
from trainer.metric.identification import cumulative_match, mated_ranks
from trainer.metric.templates import template_means

IMAGES = 4096
"""Embeddings held at once, but for a template that has more images."""
LONGEST_RANK = 50
"""Where the CMC ends."""
_FIRSTS = 256
"""Templates that are compared with others at once."""
_NUMBERS = 1 << 24
"""Of the others' vectors, held as float64: 128 MiB."""


class Gallery(NamedTuple):
    """Templates of subjects: a gallery, or probes."""

    name: str
    templates: NDArray[np.int64]
    """Row of each template, -1 where it is left out, shape (g,)."""
    subjects: NDArray[np.int64]
    """Whose it is, shape (g,)."""

    def there(self) -> "Gallery":
        """Without those that are left out."""
        there = self.templates >= 0
        return Gallery(self.name, self.templates[there], self.subjects[there])


@dataclass(kw_only=True, frozen=True)
class TemplateSet:
    """Images of t templates that are found; see `Prepared`."""

    name: str
    split: Split
    samples: NDArray[np.int64]
    """Shape (n,)."""
    templates: NDArray[np.int64]
    """Template of each, 0 to t - 1."""
    media: NDArray[np.int64]
    scores: NDArray[np.float64]
    """Of the detector."""
    pairs: NDArray[Any]
    """Shape (p, 2)."""
    genuine: NDArray[np.bool_]
    galleries: list[Gallery]
    probes: Gallery
    left_out: dict[str, int]
    detector_scores: bool = False
    ranks: tuple[int, ...] = (1,)
    fars: tuple[float, ...] = ()
    fpirs: tuple[float, ...] = ()

    def checked(
        self, detector_scores: bool, ranks: tuple[int, ...], fars: tuple[float, ...], fpirs: tuple[float, ...]
    ) -> Self:
        """The set with settings that it fits.

        Raises:
            ValueError: pairs are all genuine or all impostors, a gallery has fewer subjects than ranks, or none of the probes'.
        """
        genuine = int(self.genuine.sum())
        if genuine in (0, len(self.genuine)):
            counts = f"{genuine} genuine and {len(self.genuine) - genuine} impostor pairs"
            raise ValueError(f"{self.name} has {counts}; at least one of each is needed")
        for gallery in map(Gallery.there, self.galleries):
            subjects = len(np.unique(gallery.subjects))
            called = f"{self.name}, gallery {gallery.name}"
            if subjects < ranks[-1]:
                raise ValueError(f"{called} has {subjects} subjects, but ranks go up to {ranks[-1]}; lower them")
            if not np.isin(self.probes.there().subjects, gallery.subjects).any():
                raise ValueError(f"{called}: no probe is of one of its {subjects} subjects; nobody is to be found")
        return replace(self, detector_scores=detector_scores, ranks=ranks, fars=fars, fpirs=fpirs)

    def judge(self, embedded: Embed, report: Report) -> SetResult:
        vectors = self._vectors(embedded)
        scores = template_scores(vectors, self.pairs, report.device)
        genuine = torch.from_numpy(self.genuine)
        protocol = {"ranks": list(self.ranks), "fars": list(self.fars), "fpirs": list(self.fpirs)}
        protocol |= {"detector_scores": self.detector_scores, "pairs": len(scores)}
        scalars = report.about(len(self.samples), self.left_out, protocol) | {"templates": len(vectors)}
        measured, curves = judge_scores(scores[genuine], scores[~genuine], self.fars)
        scalars |= measured | {"verification_pairs": len(scores), "roc_pairs_are": "all pairs of the list"}
        if not self.galleries:
            reason = "the distribution has no lists of galleries"
            scalars["refusals"] |= dict.fromkeys([f"rank{k}" for k in self.ranks], reason)
            return SetResult(scalars, curves)
        identified, cmc = self._identify(vectors, report.device)
        return SetResult(scalars | identified, curves | cmc)

    def _vectors(self, embedded: Embed) -> Tensor:
        """The unit vector of each template, float32, shape (t, d)."""
        embedded(self.split, None)  # the whole set at once; an embedder that keeps it takes the parts from there
        order = np.argsort(self.templates, kind="stable")
        parts = []
        for rows in _whole_templates(self.templates[order], order):
            embeddings = embed_parts(embedded, [(self.split, self.samples[rows])], self.name)
            templates, media = (torch.from_numpy(labels[rows]) for labels in (self.templates, self.media))
            weights = torch.from_numpy(self.scores[rows]) if self.detector_scores else None
            parts.append(template_means(embeddings, templates - templates[0], media, weights))
        return torch.cat(parts)

    def _identify(self, vectors: Tensor, device: str) -> tuple[Scalars, Curves]:
        """1:N against each gallery, and Rank-k against all of them together, as insightface reports it."""
        probes, galleries = self.probes.there(), [gallery.there() for gallery in self.galleries]
        found: list[Scalars] = []
        for listed, gallery in zip(self.galleries, galleries, strict=True):
            scalars, best, right, _ = _ranked(vectors, gallery, probes, self.ranks, device)
            mated = torch.from_numpy(np.isin(probes.subjects, gallery.subjects))
            others = torch.from_numpy(~np.isin(probes.subjects, listed.subjects))  # not those whose mate is left out
            points = [open_set_point(best[mated], right[mated], best[others], fpir) for fpir in self.fpirs]
            found.append({"gallery": gallery.name, **scalars, "nonmated": int(others.sum()), "tpir_at_fpir": points})
        union = Gallery("all", *(np.concatenate(part) for part in zip(*(one[1:] for one in galleries), strict=True)))
        scalars, _, _, curve = _ranked(vectors, union, probes, self.ranks, device)
        rates = {name: value for name, value in scalars.items() if name.startswith("rank")}
        sizes = {"gallery": len(union.templates), "gallery_identities": scalars["subjects"], "probes": scalars["mated"]}
        points = [_mean_point([one["tpir_at_fpir"][number] for one in found]) for number in range(len(self.fpirs))]
        all_of_them = {"identification": [*found, {"gallery": "all", **scalars}], "tpir_at_fpir": points}
        return {**rates, **sizes, **all_of_them}, {"cmc": curve.numpy()}


def template_scores(vectors: Tensor, pairs: NDArray[Any], device: str = "cpu") -> Tensor:
    """Similarity of pairs of rows: the float64 inner product rounded to float32, shape (p,), on the CPU.

    Blocks of rows are multiplied and the pairs picked out, which suits lists that compare few templates with many. The ranks
    share the blocks, and every rank has the whole result.
    """
    order = np.argsort(pairs[:, 0], kind="stable")
    firsts = np.unique(pairs[:, 0])
    cuts = np.searchsorted(pairs[order, 0], firsts[_FIRSTS::_FIRSTS])
    scores = torch.zeros(len(pairs))
    vectors = vectors.to(device)
    width = max(1, _NUMBERS // vectors.shape[1])
    for rows in np.split(order, cuts)[rank() :: world_size()]:
        first, row = np.unique(pairs[rows, 0], return_inverse=True)
        second, column = np.unique(pairs[rows, 1], return_inverse=True)
        ours = vectors[torch.from_numpy(first).long()].double()  # (f, d)
        for begin in range(0, len(second), width):
            theirs = vectors[torch.from_numpy(second[begin : begin + width]).long()].double()  # (s, d)
            block = (ours @ theirs.T).float().cpu().numpy()
            within = (column >= begin) & (column < begin + width)
            scores[torch.from_numpy(rows[within])] = torch.from_numpy(block[row[within], column[within] - begin])
    return all_reduce_sum(scores.to(device)).cpu()


def _whole_templates(ascending: NDArray[np.int64], order: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    """Rows, some `IMAGES` at a time, never a part of a template."""
    ends = np.append(np.flatnonzero(np.diff(ascending)) + 1, len(ascending))
    begin = 0
    while begin < len(order):
        fits = ends[np.searchsorted(ends, begin + IMAGES, side="right") - 1]
        end = int(fits if fits > begin else ends[np.searchsorted(ends, begin, side="right")])
        yield order[begin:end]
        begin = end


class _Ranked(NamedTuple):
    scalars: Scalars
    best: Tensor
    """Similarity to each probe's nearest gallery template, shape (q,)."""
    right: Tensor
    """Whether that is of the probe's subject, bool, shape (q,)."""
    cmc: Tensor


def _ranked(vectors: Tensor, gallery: Gallery, probes: Gallery, ranks: tuple[int, ...], device: str) -> _Ranked:
    """Rank-k of the probes whose subject is enrolled; a rank counts subjects."""
    subjects, counts = np.unique(gallery.subjects, return_counts=True)
    longest = min(len(subjects), max(LONGEST_RANK, ranks[-1]))
    reach = min(len(gallery.subjects), longest * int(counts.max()))
    enrolled, searched = (vectors[torch.from_numpy(part.templates)] for part in (gallery, probes))
    similarities, positions = search(enrolled, searched, reach, device)
    neighbours, own = torch.from_numpy(gallery.subjects)[positions], torch.from_numpy(probes.subjects)
    mated = torch.from_numpy(np.isin(probes.subjects, subjects))
    curve = cumulative_match(mated_ranks(neighbours[mated], own[mated]), longest)
    scalars: dict[str, Any] = {f"rank{k}": float(curve[k - 1]) for k in ranks}
    scalars |= {"templates": len(gallery.subjects), "subjects": len(subjects), "mated": int(mated.sum())}
    return _Ranked(scalars, similarities[:, 0], neighbours[:, 0] == own, curve[:LONGEST_RANK])


def _mean_point(points: list[Scalars]) -> Scalars:
    """Mean over the galleries, as IJB-B and IJB-C report it; refused where one of them is. No interval: they share probes."""
    refused = [point["refused"] for point in points if point["refused"]]
    means = {name: None if refused else float(np.mean([point[name] for point in points])) for name in ("fpir", "tpir")}
    return {"target": points[0]["target"], **means, "low": None, "refused": refused[0] if refused else None}
