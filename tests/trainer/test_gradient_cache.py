"""A batch in parts gives the embeddings and gradients of the whole, with a colour of its own for each picture."""

import pytest
import torch

from trainer.config import ModelConfig
from trainer.engine import PlainEngine
from trainer.gradient_cache import GradientCache
from trainer.model import Embedder


@pytest.mark.parametrize("part", [1, 3, 4, 7])
def test_parts_keep_each_pictures_colour(part):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (7, 3, 32, 32), generator=generator, dtype=torch.uint8)
    colour = torch.randn(7, 3, 4, generator=generator)
    weights = torch.randn(7, 4, generator=generator, dtype=torch.float64)
    torch.manual_seed(1)
    model = Embedder(ModelConfig(trunk="resnet18", embedding_size=4)).double().eval()

    def gradients(size):
        model.zero_grad()
        cache = GradientCache(PlainEngine(model, torch.optim.SGD(model.parameters(), lr=0.1), None), size)
        embeddings = cache.forward(images, colour)
        cache.backward((embeddings * weights).sum())
        return [embeddings.detach(), *(parameter.grad.clone() for parameter in model.parameters())]

    whole, plain = gradients(None), model(images).detach()
    assert not torch.allclose(whole[0], plain, atol=1e-3)
    for found, wanted in zip(gradients(part), whole, strict=True):
        assert torch.allclose(found, wanted, rtol=1e-9, atol=1e-12)
