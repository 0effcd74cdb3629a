"""torch.export: one file that PyTorch runs without facescale, any batch size."""

from pathlib import Path

import torch

from trainer.export.config import ExportedConfig
from trainer.export.network import INPUT, Exported, check, new_folder
from trainer.model import Embedder

FILE = "model.pt2"
ABOUT = "facescale.json"
"""Name of the config among the file's extra files."""


def write(model: Embedder, config: ExportedConfig, out: Path) -> float:
    """Writes OUT/model.pt2: float32 pictures, shape (b, 3, H, W), in [0, 255], to unit-norm embeddings, (b, d), on the CPU.

    `torch.export.load(path).module()` is the function; extra file `facescale.json` has the config.

    Returns:
        the largest difference from the network, of an embedding's component.
    Raises:
        ValueError: `out` exists and is not empty, the network cannot be traced with a batch of any size, or the file does not
            give what the network gives.
    """
    example = torch.zeros(2, 3, model.image_size, model.image_size)
    with new_folder(out) as folder:
        batch = torch.export.Dim("batch", min=1)
        try:
            with torch.no_grad():
                program = torch.export.export(Exported(model), (example,), dynamic_shapes={INPUT: {0: batch}})
        except (RuntimeError, torch._dynamo.exc.UserError) as error:
            said = str(error).strip().splitlines()[0][:300]
            raise ValueError(f"export: {config.model.trunk} cannot be written by torch.export: {said}") from None
        torch.export.save(program, folder / FILE, extra_files={ABOUT: config.json()})
        return check(FILE, torch.export.load(folder / FILE).module(), model)
