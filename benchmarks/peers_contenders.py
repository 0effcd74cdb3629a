"""The training loops that `peers_loop.py` compares; each runs in a process of its own and takes a turn when it is told to.

All train the same network, ours (`trainer.model.Embedder`: torchvision's ResNet-50, linear, batch norm, L2 norm, 128
dimensions), from the same random weights, with AdamW and the same rate at the same share of the time, at 112 px.

- `facescale`: `trainer.train.train` itself, its default loss; bf16 where the CPU has it, or fp32.
- `original's way`, **rebuilt from a description, not its code**: random triplets, DataLoader, scikit-image, fp32, two forward
  passes. Assumed, each time the cheaper way for it: the first pass keeps no graph; triplets are drawn where they are read, at no
  cost; pictures are read with `skimage.io.imread` and scaled with `skimage.transform.resize` without further augmentation. As in
  public code of this kind (tbmoon/facenet and what came of it), anchors, positives and negatives go through the network
  separately, triplets within the margin go through it again, and the loss is read out in every step. Fewer than two violating
  triplets leave a step out (batch norm needs two). Images count as seen once, however often they go through.
- `pytorch-metric-learning`: its documented loop (optimizer.zero_grad, embeddings, miner, loss, backward, step) with ImageFolder,
  MPerClassSampler and torchvision's RandomResizedCrop, flip, ToTensor and Normalize; in fp32, and with bf16 autocast and
  channels-last memory, which its documentation does not ask for.
"""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.utils.data import DataLoader, Dataset

from benchmarks.peers_turns import PEAK_RATE, SIZE, Turns
from trainer.config import ModelConfig, OptimizerConfig
from trainer.model import Embedder
from trainer.phases import Enough, recording
from trainer.precision import cpu_has_bf16

MARGIN = 0.2
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FACESCALE, ORIGINAL = "facescale", "original's way"
CONTENDERS: dict[str, dict[str, Any]] = {
    FACESCALE: {"bf16": True},
    "facescale, fp32": {"bf16": False},
    ORIGINAL: {"bf16": False},
    "pytorch-metric-learning, semi-hard, fp32": {"bf16": False, "miner": "semihard"},
    "pytorch-metric-learning, semi-hard, bf16": {"bf16": True, "miner": "semihard"},
    "pytorch-metric-learning, batch-hard, bf16": {"bf16": True, "miner": "batch_hard"},
}


def run(name: str, folder: Path, p: int, k: int, workers: int, total_s: float | None) -> None:
    """One contender, until its standard input ends."""
    turns, settings = Turns(total_s), CONTENDERS[name]
    if name.startswith(FACESCALE):
        _facescale(turns, folder, p, k, settings["bf16"])
        return
    from trainer.devices import resolve, share_cores

    share_cores()
    device = torch.device(resolve("auto"))
    torch.manual_seed(0)
    model = Embedder(ModelConfig(), bf16=settings["bf16"] and (device.type == "cuda" or cpu_has_bf16())).to(device)
    if settings["bf16"]:
        model = model.to(memory_format=torch.channels_last)
    turns.model = model
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, weight_decay=OptimizerConfig().weight_decay)
    if name == ORIGINAL:
        loop = _original(turns, model, optimizer, folder, p * k // 3, workers)
    else:
        loop = _metric_learning(turns, model, optimizer, folder, p, k, workers, settings["miner"])
    try:
        for _ in loop:
            pass
    except Enough:
        pass


def _facescale(turns: Turns, folder: Path, p: int, k: int, bf16: bool) -> None:
    from trainer import train

    prepare = train._prepare

    def keeping(*args: Any) -> Any:
        trained, engine = prepare(*args)
        turns.model = trained.model
        return trained, engine

    def work(*args: Any) -> None:
        with recording(turns):  # type: ignore[arg-type]
            train.train(*args)

    train._prepare = keeping
    train.learning_rate = lambda config, step, steps: turns.rate()
    options = f"--plan.identities-per-batch {p} --plan.images-per-identity {k} --data.image-size {SIZE}"
    options += f" --run.steps 1000000 --run.checkpoint-every 1000000 --run.precision {'auto' if bf16 else 'fp32'}"
    where = ["--data.shards", str(folder / "shards"), "--run.folder", str(folder / f"run-{time.time_ns()}")]
    code = train.main([*options.split(), *where, "--run.no-tensorboard"], work=work)
    assert code == 0, code


def _step(turns: Turns, optimizer: torch.optim.Optimizer) -> None:
    turns.next_step()
    for group in optimizer.param_groups:
        group["lr"] = turns.rate()


def _embed(model: Embedder, pixels: Tensor) -> Tensor:
    """Unit embeddings (b, d) of pictures that were normalised by their transforms."""
    with torch.autocast(pixels.device.type, torch.bfloat16, enabled=model.bf16):
        embeddings = model.head_norm(model.head(model.trunk(pixels)))
    return normalize(embeddings.float())


class RandomTriplets(Dataset[tuple[Tensor, Tensor, Tensor]]):
    """Anchor, positive and negative, drawn at random."""

    def __init__(self, pictures: Path) -> None:
        self._paths = [sorted(map(str, folder.iterdir())) for folder in sorted(pictures.iterdir())]

    def __len__(self) -> int:
        return 10_000_000

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        import numpy as np

        random = np.random.default_rng(index)
        same, other = random.choice(len(self._paths), 2, replace=False)
        anchor, positive = random.choice(len(self._paths[same]), 2, replace=False)
        negative = random.integers(len(self._paths[other]))
        chosen = (self._paths[same][anchor], self._paths[same][positive], self._paths[other][negative])
        first, second, third = (self._read(path) for path in chosen)
        return first, second, third

    @staticmethod
    def _read(path: str) -> Tensor:
        """Normalised pixels (3, H, W)."""
        import numpy as np
        from skimage.io import imread
        from skimage.transform import resize

        pixels = resize(imread(path), (SIZE, SIZE), anti_aliasing=True)  # (H, W, 3), float64 in [0, 1]
        return torch.from_numpy(((pixels - MEAN) / STD).astype(np.float32)).permute(2, 0, 1)


def _original(
    turns: Turns, model: Embedder, optimizer: torch.optim.Optimizer, folder: Path, triplets: int, workers: int
) -> Iterator[None]:
    device = model.mean.device
    kept = 0.0
    for number, batch in enumerate(_prefetched(turns, optimizer, RandomTriplets(folder / "train"), workers, triplets)):
        pixels = [part.to(device) for part in batch]
        with torch.no_grad():
            anchors, positives, negatives = (_embed(model, part) for part in pixels)
        violates = _distance(anchors, negatives) - _distance(anchors, positives) < MARGIN  # (t,)
        kept += float(violates.double().mean())
        turns.details["violating"] = kept / (number + 1)
        if violates.sum() >= 2:
            anchors, positives, negatives = (_embed(model, part[violates]) for part in pixels)
            loss = (_distance(anchors, positives) - _distance(anchors, negatives) + MARGIN).clamp(min=0).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss.item()
        yield


def _distance(a: Tensor, b: Tensor) -> Tensor:
    return nn.functional.pairwise_distance(a, b)


def _prefetched(
    turns: Turns, optimizer: torch.optim.Optimizer, dataset: Any, workers: int, size: int, sampler: Any = None
) -> Iterator[Any]:
    """Batches for ever; a step begins where one is asked for."""
    loader = DataLoader(dataset, size, sampler=sampler, num_workers=workers, drop_last=True)
    batches = iter(loader)
    while True:
        _step(turns, optimizer)
        batch = next(batches, None)
        if batch is None:
            batches = iter(loader)
            batch = next(batches)
        yield batch


def _metric_learning(
    turns: Turns,
    model: Embedder,
    optimizer: torch.optim.Optimizer,
    folder: Path,
    p: int,
    k: int,
    workers: int,
    miner: str,
) -> Iterator[None]:
    from pytorch_metric_learning import losses, miners, samplers
    from torchvision import datasets, transforms

    seen = [transforms.RandomResizedCrop(SIZE, scale=(0.7, 1.0), ratio=(1.0, 1.0)), transforms.RandomHorizontalFlip()]
    seen += [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    dataset = datasets.ImageFolder(folder / "train", transforms.Compose(seen))
    sampler = samplers.MPerClassSampler(dataset.targets, m=k, batch_size=p * k)
    choose: Callable[..., Any] = (
        miners.BatchHardMiner() if miner == "batch_hard" else miners.TripletMarginMiner(MARGIN, "semihard")
    )
    criterion = losses.TripletMarginLoss(margin=MARGIN)
    layout = torch.channels_last if model.bf16 else torch.contiguous_format
    for images, labels in _prefetched(turns, optimizer, dataset, workers, p * k, sampler):
        pixels, labels = images.to(model.mean.device, memory_format=layout), labels.to(model.mean.device)
        optimizer.zero_grad()
        embeddings = _embed(model, pixels)
        loss = criterion(embeddings, labels, choose(embeddings, labels))
        loss.backward()
        optimizer.step()
        yield
