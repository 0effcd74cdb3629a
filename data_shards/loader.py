"""Plan -> bytes -> decode -> Batch. Its position is the number of batches taken; a new loader starts at any of them."""

import os
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, Self, get_args

import numpy as np
import torch
from torch import Tensor

from data_shards.augment import Augmentation, AugmentConfig, augment, central_square, colour_matrices
from data_shards.cpu_decode import CpuDecoder
from data_shards.decode import HARDWARE_LOAD, DecodeError, Decoder, Encoded
from data_shards.index import Split
from data_shards.plan import Draws, contiguous_slice, per_rank
from data_shards.reader import open_reader
from data_shards.windowed_plan import AnyPlan

_DECODERS = Literal["auto", "dali", "libjpeg"]


@dataclass(frozen=True)
class Batch:
    images: Tensor
    """uint8 in [0, 255], shape (b, 3, H, W), channels-last in memory; the model recolours and normalises."""
    identities: Tensor
    """Labels, int64, shape (b,), on the images' device."""
    samples: Tensor
    """Sample ids, int64, shape (b,), on the CPU."""
    colour: Tensor | None = None
    """`augment.colour_matrices`, float32, shape (b, 3, 4), on the images' device; None leaves colours as they are."""


@dataclass(kw_only=True, frozen=True)
class LoaderConfig:
    image_size: int = 112
    """Width and height of the network's input, in pixels."""
    decode_threads: int = 0
    """CPU threads that decode for each rank; 0 shares the CPU cores among the ranks of this machine."""
    decoder: _DECODERS = "auto"
    """dali: on the device. libjpeg: libjpeg-turbo on CPU cores, the same pictures. auto: dali on a GPU, libjpeg without one."""
    hardware_load: float = HARDWARE_LOAD
    """On a GPU: share of the JPEGs that its hardware decoder takes, in [0, 1], where it has one."""

    def __post_init__(self) -> None:
        if not 16 <= self.image_size <= 1024:
            raise ValueError(f"data.image_size is {self.image_size}; allowed is 16 to 1024 pixels")
        if self.decode_threads < 0:
            raise ValueError(f"data.decode_threads is {self.decode_threads}; allowed is 0 (automatic) or more")
        if self.decoder not in get_args(_DECODERS):
            raise ValueError(f"data.decoder is {self.decoder!r}; allowed are {', '.join(get_args(_DECODERS))}")
        if not 0 <= self.hardware_load <= 1:
            raise ValueError(f"data.hardware_load is {self.hardware_load}; allowed is 0 to 1")

    @property
    def threads(self) -> int:
        local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        return self.decode_threads or max(1, len(os.sched_getaffinity(0)) // local_ranks)


@dataclass
class Loader:
    """Batches of one rank, decoded ahead of their use.

    Iterating ends with the draws. A picture that does not decode (it did at conversion: the shard has been damaged since) is
    replaced by the next one of its identity, and its key is added to `undecodable`.

    Args:
        split: where the bytes lie.
        draws: what to load, a batch at a time.
        batch_size: most samples in a batch.
        augmentation: settings and seed; None takes the central square as it is.
    """

    split: Split
    draws: Iterator[Draws]
    batch_size: int
    config: LoaderConfig
    augmentation: tuple[AugmentConfig, int] | None = None
    device: torch.device | str = "cpu"
    undecodable: dict[int, str] = field(default_factory=dict)
    """Key of each sample that was replaced, by sample id."""

    def __post_init__(self) -> None:
        self._reader = open_reader(self.split)
        self._fed: deque[Draws] = deque()
        self._colours: deque[np.ndarray] = deque()
        self._again: deque[Draws] = deque()
        self._coming: deque[Draws] = deque()
        self._told = 0
        self._decoder = self._make_decoder()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        while True:
            try:
                images = self._decoder.next()
                break
            except DecodeError as error:
                self._replace_undecodable(error)
        draws = self._fed.popleft()
        identities = self.split.samples["identity"][draws.samples].astype(np.int64)
        colour = torch.from_numpy(self._colours.popleft()) if self.augmentation is not None else None
        return Batch(
            images,
            torch.from_numpy(identities).to(images.device, non_blocking=True),
            torch.from_numpy(draws.samples),
            None if colour is None else colour.to(images.device, non_blocking=True),
        )

    def new_undecodable(self) -> list[str]:
        """Keys that were added to `undecodable` since the last call."""
        keys = list(self.undecodable.values())
        new, self._told = keys[self._told :], len(keys)
        return new

    def _make_decoder(self) -> Decoder | CpuDecoder:
        config, gpu = self.config, torch.device(self.device).type == "cuda"
        if config.decoder == "libjpeg" or (config.decoder == "auto" and not gpu):
            spare = int(
                not config.decode_threads
            )  # one waits for the interpreter's lock now and then (benchmarks/README.md)
            return CpuDecoder(self._feed, config.image_size, self.device, config.threads + spare)
        columns = (self.split.samples[name] for name in ("width", "height") if gpu)
        width, height = (int(column.max()) for column in columns) if gpu else (0, 0)
        return Decoder(
            self._feed,
            self.batch_size,
            config.image_size,
            self.device,
            config.threads,
            hardware_load=config.hardware_load,
            largest=(width, height),
        )

    def _next_draws(self) -> Draws:
        """The next draws, after asking for the bytes of those some batches further on."""
        while len(self._coming) <= self._reader.read_ahead_batches and (draws := next(self.draws, None)) is not None:
            if draws.shards:
                self._reader.hold(draws.shards)
            self._reader.read_ahead(draws.samples)
            self._coming.append(draws)
        if not self._coming:
            raise StopIteration
        return self._with_replacements(self._coming.popleft())

    def _feed(self) -> tuple[Encoded, Augmentation]:
        draws = self._again.popleft() if self._again else self._next_draws()
        self._fed.append(draws)
        rows = self.split.samples[draws.samples]
        width, height = rows["width"].astype(np.int64), rows["height"].astype(np.int64)
        if self.augmentation is None:
            parameters = central_square(width, height)
        else:
            parameters = augment(self.augmentation[0], self.augmentation[1], draws, width, height)
            self._colours.append(colour_matrices(parameters))
        return self._reader.read(draws.samples), parameters

    def _replace_undecodable(self, error: DecodeError) -> None:
        """Finds the pictures that killed the pipeline and builds it anew at the same position without them."""
        found = 0
        for sample in np.unique(np.concatenate([draws.samples for draws in self._fed])).tolist():
            if not self._decoder.decodes(self._reader.read(np.array([sample]))[0]):
                self.undecodable[sample] = self.split.key(sample)
                found += 1
        if not found:
            raise error
        self._again = deque(self._with_replacements(draws) for draws in (*self._fed, *self._again))
        self._fed.clear()
        self._colours.clear()
        self._decoder = self._make_decoder()

    def _with_replacements(self, draws: Draws) -> Draws:
        if not self.undecodable:
            return draws
        samples = np.array([self._replacement(sample) for sample in draws.samples.tolist()], np.int64)
        return draws._replace(samples=samples)

    def _replacement(self, sample: int) -> int:
        """The sample itself or, where it does not decode, the next of its identity that does."""
        row = int(np.searchsorted(self.split.starts, sample, side="right")) - 1
        begin, end = int(self.split.starts[row]), int(self.split.starts[row + 1])
        for step in range(end - begin):
            candidate = begin + (sample - begin + step) % (end - begin)
            if candidate not in self.undecodable:
                return candidate
        raise ValueError(f"no image of {self.split.key(sample)}'s identity decodes: run `facescale verify --decode`")


def training_loader(
    split: Split,
    plan: AnyPlan,
    config: LoaderConfig,
    augmentation: AugmentConfig,
    *,
    start: int = 0,
    stop: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
) -> Loader:
    """Rank's slices of the plan's global batches from step `start` up to `stop`, augmented with the plan's seed."""
    draws = plan.batches(start, rank, world_size, stop)
    return Loader(split, draws, per_rank(plan.config, world_size), config, (augmentation, plan.seed), device)


def evaluation_loader(
    split: Split,
    config: LoaderConfig,
    *,
    batch_size: int,
    samples: np.ndarray | None = None,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
) -> Loader:
    """Every sample of the split (or of `samples`, shape (n,)) once over all ranks, in order, without augmentation."""
    ids = np.arange(len(split)) if samples is None else np.asarray(samples, np.int64)
    mine = ids[contiguous_slice(len(ids), rank, world_size)]
    parts = (mine[i : i + batch_size] for i in range(0, len(mine), batch_size))
    draws = (Draws(0, part, np.zeros_like(part)) for part in parts)
    return Loader(split, draws, batch_size, config, device=device)
