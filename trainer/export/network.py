"""What is exported: float32 pictures in, unit-norm embeddings out; and the check that a file does the same."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import rmtree

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from trainer.model import Embedder

TOLERANCE = 1e-4
"""Largest difference of an embedding's component between a file and the network that it was made of."""
BATCHES = (1, 2, 5)
"""Numbers of pictures with which every file is tried."""
INPUT, OUTPUT = "images", "embeddings"
"""Names of the input and the output."""


class Exported(nn.Module):
    """The network in evaluation mode, in plain operations that every format knows.

    Source: `Embedder.forward`, without recolouring, dropout and bf16.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, model: Embedder) -> None:
        super().__init__()
        self.trunk, self.head, self.head_norm = model.trunk, model.head, model.head_norm
        self.register_buffer("scale", 1 / (255 * model.std))
        self.register_buffer("shift", -model.mean / model.std)
        self.float().to(memory_format=torch.contiguous_format).eval()

    def forward(self, images: Tensor) -> Tensor:
        """Unit-norm embeddings, float32, shape (b, d).

        Args:
            images: RGB in [0, 255], float32, shape (b, 3, H, W).
        """
        pixels = images * self.scale + self.shift
        embeddings: Tensor = self.head_norm(self.head(self.trunk(pixels)))
        return normalize(embeddings)


def float32(model: Embedder) -> Embedder:
    """The same network, on the CPU, computing in float32, in evaluation mode; changed in place."""
    model.bf16 = False
    return model.float().cpu().to(memory_format=torch.contiguous_format).eval()


def check(name: str, run: Callable[[Tensor], Tensor], model: Embedder) -> float:
    """The largest difference between what a file and the network make of the same pictures, in several batch sizes.

    Args:
        name: of the file, for the message.
        run: the file's function: float32 pictures in [0, 255], shape (b, 3, H, W), to embeddings, shape (b, d).
    Raises:
        ValueError: it is above `TOLERANCE`.
    """
    generator, worst = torch.Generator().manual_seed(0), 0.0
    for batch in BATCHES:
        shape = (batch, 3, model.image_size, model.image_size)
        images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        with torch.no_grad():
            expected, found = model(images), run(images.float())
        if not expected.isfinite().all():
            raise ValueError(f"the network's embeddings of {batch} pictures are not finite; not exported")
        if found.shape != expected.shape:
            raise ValueError(
                f"{name} gives shape {tuple(found.shape)}, the network {tuple(expected.shape)}; not exported"
            )
        difference = float((found - expected).abs().max())
        if not difference <= TOLERANCE:
            raise ValueError(
                f"{name} differs from the network by {difference:.1e} of {batch} pictures; "
                f"allowed is {TOLERANCE:.0e}; not exported"
            )
        worst = max(worst, difference)
    return worst


def check_out(out: Path) -> None:
    """Raises ValueError unless `out` does not exist or is an empty folder."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not empty; choose another folder")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `out` when the block ends without an error; else nothing is left.

    Raises:
        ValueError: see `check_out`.
    """
    check_out(out)
    out = out.absolute()
    partial = out.with_name(f".{out.name}.partial")
    rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(out)  # onto an empty folder, too
    finally:
        rmtree(partial, ignore_errors=True)
