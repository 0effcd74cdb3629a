"""What the tests of training and of the command share: a tiny shard set, and no accelerate state left behind."""

from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState

from data_shards.convert import ConvertConfig, convert
from tests.data_shards.collections_on_disk import draw_collection


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """Twelve identities of six pictures of 24 x 16 pixels each, and one of a single picture."""
    counts = {f"n{number:02d}": 6 for number in range(12)} | {"single": 1}
    return draw_collection(tmp_path_factory.mktemp("pictures") / "collection", counts)


@pytest.fixture(scope="session")
def shards(pictures, tmp_path_factory) -> Path:
    """`pictures` with five identities held out and one image of each other; read only."""
    out = tmp_path_factory.mktemp("shards") / "shards"
    names = ("n01", "n04", "n07", "n10", "n11")
    convert(pictures, out, ConvertConfig(holdout_identities=names, holdout_images=1, images_per_group=2, workers=1))
    return out


@pytest.fixture
def fresh_accelerate(monkeypatch):
    """accelerate keeps its settings for the process; a second `Accelerator` with others would be refused."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "ACCELERATE_USE_DEEPSPEED"):
        monkeypatch.delenv(name, raising=False)
    threads = torch.get_num_threads()
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    torch.set_num_threads(threads)
