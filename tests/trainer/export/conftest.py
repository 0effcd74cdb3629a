"""Runs to export: written through `trainer.checkpoint`, with batch statistics that no initialisation gives."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from trainer import config
from trainer.checkpoint import CHECKPOINTS, Trained, Writer
from trainer.model import Embedder


def pictures(count: int, size: int, seed: int = 5) -> Tensor:
    """uint8, shape (count, 3, size, size)."""
    return torch.randint(
        0, 256, (count, 3, size, size), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8
    )


def used(model: nn.Module) -> nn.Module:
    """The network with other batch statistics and biases than at its start, so that none of them can be forgotten unseen."""
    generator = torch.Generator().manual_seed(3)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.running_mean.uniform_(-0.2, 0.2, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
            if module.affine:
                module.weight.data.uniform_(0.5, 1.5, generator=generator)
                module.bias.data.uniform_(-0.2, 0.2, generator=generator)
        elif isinstance(module, nn.Linear) and module.bias is not None:
            module.bias.data.uniform_(-0.2, 0.2, generator=generator)
    return model.eval()


def network(size: int = 32, **settings: object) -> Embedder:
    torch.manual_seed(0)
    settings = {"trunk": "resnet18", "embedding_size": 8} | settings
    model = used(Embedder(config.ModelConfig(**settings), image_size=size))
    assert isinstance(model, Embedder)
    return model


@pytest.fixture
def make_run(tmp_path) -> Callable[..., tuple[Path, Embedder]]:
    """Makes RUN with checkpoints of steps 5 and 7; gives it and the network of step 7."""

    def make(size: int = 32, **settings: object) -> tuple[Path, Embedder]:
        model, run = network(size, **settings), tmp_path / "run"
        run.mkdir()
        data = config.DataConfig(image_size=size)
        optimizer = torch.optim.AdamW(model.parameters())
        config.save(config.TrainConfig(data=data, model=model.config), run / config.CONFIG)
        writer = Writer(run / CHECKPOINTS, Trained(model=model, optimizer=optimizer))
        writer.save(5, wait=True, best=True)
        next(model.parameters()).data *= -1
        writer.save(7, wait=True)
        return run, model

    return make
