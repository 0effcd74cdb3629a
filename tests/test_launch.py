"""The templates in launch/ are valid by the rules of what reads them."""

import json
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

from trainer.config import load

LAUNCH = Path(__file__).parents[1] / "launch"


@pytest.mark.parametrize("path", sorted((LAUNCH / "recipes").glob("*.yaml")), ids=lambda path: path.name)
def test_recipes_load(path):
    config = load(path)
    assert config.plan.batch_size % 8 == 0, "a recipe should run on 1, 2, 4 and 8 processes"


@pytest.mark.parametrize("path", sorted((LAUNCH / "accelerate").glob("*.yaml")), ids=lambda path: path.name)
def test_accelerate_reads_its_configs(path):
    config = load_config_from_file(str(path))
    assert config.num_machines == 1
    assert config.num_processes >= 2
    if config.distributed_type == "DEEPSPEED":
        named = LAUNCH.parent / config.deepspeed_config["deepspeed_config_file"]
        assert json.loads(named.read_text())["zero_optimization"]["stage"] == 1


def test_every_template_is_in_the_readme():
    text = (LAUNCH / "README.md").read_text()
    for path in (*LAUNCH.glob("*/*.yaml"), *LAUNCH.glob("*/*.json")):
        assert str(path.relative_to(LAUNCH)) in text, path
