"""The house rules about imports, read off the source with `ast`; every rule is also tried on a source that breaks it."""

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

LEVELS = {
    "best": 0,
    "config": 0,
    "devices": 0,
    "heartbeats": 0,
    "machine": 0,
    "phases": 0,
    "precision": 0,
    "schema": 1,
    "rank_logs": 2,
    "trackers": 2,
    "preemption": 0,
    "iresnet": 0,
    "backbones": 1,
    "collectives": 1,
    "engine": 1,
    "flags": 1,
    "metric": 1,
    "model": 2,
    "agreement": 2,
    "centres": 2,
    "collapse": 2,
    "gradient_cache": 2,
    "watchdog": 2,
    "checkpoint": 3,
    "export": 3,
    "train_step": 4,
    "evaluation": 4,
    "network_inputs": 0,
    "embedder": 5,
    "photos": 6,
    "telemetry": 5,
    "train": 6,
}
"""Parts of trainer; each imports only parts of a lower level. A part that is not listed is a command: on top."""
COMMAND = 7

NO_IO = ("csv", "io", "json", "os", "pathlib", "pickle", "safetensors", "shutil", "sys", "tempfile", "yaml")


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def names_used(source: str, module: str, package: bool = False) -> set[str]:
    """Dotted names that a module imports, anywhere in it, or reaches as attributes of what it imports.

    `from a import b` counts as both a and a.b, since b may be a module or a name in a.
    """
    found, bound = set(), {}
    tree = ast.parse(source)
    for node in ast.walk(tree):
        for name, alias, whole in _imports_of(node, module, package):
            found |= {name, name.rpartition(".")[0]}
            bound[alias or name.split(".")[0]] = name if alias or whole else name.split(".")[0]
    for node in ast.walk(tree):
        dotted = _dotted(node)
        root, _, rest = dotted.partition(".")
        if rest and root in bound:
            found.add(f"{bound[root]}.{rest}")
        if isinstance(node, ast.Call) and _dotted(node.func).split(".")[-1] in ("import_module", "__import__"):
            found |= {str(argument.value) for argument in node.args if isinstance(argument, ast.Constant)}
        if isinstance(node, ast.Call) and _dotted(node.func) == "open":
            found.add("io.open")
    return found - {""}


def _imports_of(node: ast.AST, module: str, package: bool) -> Iterator[tuple[str, str | None, bool]]:
    """(dotted name, name given with `as`, whether the last part is what gets bound) of an import statement."""
    if isinstance(node, ast.Import):
        for item in node.names:
            yield item.name, item.asname, False
    if isinstance(node, ast.ImportFrom):
        parents = module.split(".") + ["itself"] * package
        base = ".".join(parents[: len(parents) - node.level]) if node.level else ""
        origin = ".".join(part for part in (base, node.module) if part)
        for item in node.names:
            yield f"{origin}.{item.name}", item.asname or item.name, True


def _dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        front = _dotted(node.value)
        return f"{front}.{node.attr}" if front else ""
    return node.id if isinstance(node, ast.Name) else ""


def within(name: str, *modules: str) -> bool:
    return any(name == module or name.startswith(module + ".") for module in modules)


def level(part: str) -> int:
    return LEVELS.get(part, COMMAND)


def shards_know_no_trainer(module: str, name: str) -> bool:
    return within(module, "data_shards") and within(name, "trainer")


def one_place_for_torch_distributed(module: str, name: str) -> bool:
    return within(name, "torch.distributed") and module != "trainer.collectives"


def one_place_for_faiss(module: str, name: str) -> bool:
    return within(name, "faiss") and module != "trainer.evaluation.index"


def one_place_for_dali(module: str, name: str) -> bool:
    return within(name, "nvidia.dali") and module != "data_shards.decode"


def one_place_for_fsspec(module: str, name: str) -> bool:
    return within(name, "fsspec") and module != "data_shards.files"


def one_place_for_ray(module: str, name: str) -> bool:
    return within(name, "ray") and module != "data_shards.executor_ray"


def metric_is_maths(module: str, name: str) -> bool:
    foreign = within(name, "accelerate", "torch.distributed", "data_shards", *NO_IO)
    of_trainer = within(name, "trainer") and not within(name, "trainer.metric") and name != "trainer"
    return within(module, "trainer.metric") and (foreign or of_trainer)


def trainer_imports_downwards(module: str, name: str) -> bool:
    if not (module.startswith("trainer.") and name.startswith("trainer.")):
        return False
    importer, imported = module.split(".")[1], name.split(".")[1]
    both_commands = level(importer) == level(imported) == COMMAND
    return importer != imported and not both_commands and level(imported) >= level(importer)


Rule = Callable[[str, str], bool]
RULES: tuple[Rule, ...] = (
    shards_know_no_trainer,
    one_place_for_torch_distributed,
    one_place_for_faiss,
    one_place_for_dali,
    one_place_for_fsspec,
    one_place_for_ray,
    metric_is_maths,
    trainer_imports_downwards,
)


def violations(rule: Rule, source: str, module: str, package: bool = False) -> list[str]:
    return sorted(name for name in names_used(source, module, package) if rule(module, name))


SOURCES = {module_of(path): path for folder in ("trainer", "data_shards") for path in (ROOT / folder).rglob("*.py")}


def test_the_sources_are_found():
    assert {"trainer", "trainer.train_step", "trainer.metric.losses", "data_shards.decode"} <= SOURCES.keys()
    assert {module.split(".")[1] for module in SOURCES if module.startswith("trainer.")} >= LEVELS.keys()


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_house_keeps_the_rule(rule):
    broken = {
        module: names
        for module, path in SOURCES.items()
        if (names := violations(rule, path.read_text(encoding="utf-8"), module, path.name == "__init__.py"))
    }
    assert broken == {}


@pytest.mark.parametrize(
    ("rule", "module", "source"),
    [
        (shards_know_no_trainer, "data_shards.loader", "from trainer.config import TrainConfig"),
        (shards_know_no_trainer, "data_shards.loader", "import trainer"),
        (
            shards_know_no_trainer,
            "data_shards.loader",
            "def f():\n    import importlib\n    importlib.import_module('trainer')",
        ),
        (shards_know_no_trainer, "data_shards.loader", "from ..trainer import config"),
        (one_place_for_torch_distributed, "trainer.train", "import torch.distributed as dist"),
        (one_place_for_torch_distributed, "trainer.train", "from torch import distributed"),
        (one_place_for_torch_distributed, "trainer.train", "from torch.distributed.nn import functional"),
        (one_place_for_torch_distributed, "trainer.train", "import torch\ntorch.distributed.barrier()"),
        (one_place_for_torch_distributed, "data_shards.plan", "import torch as t\nw = t.distributed.get_world_size()"),
        (one_place_for_faiss, "trainer.metric.identification", "import faiss"),
        (one_place_for_faiss, "trainer.evaluation.measures", "def f():\n    from faiss import IndexFlatL2"),
        (one_place_for_dali, "data_shards.loader", "from nvidia.dali import fn"),
        (one_place_for_dali, "trainer.doctor", "def f():\n    import nvidia.dali.fn as fn"),
        (one_place_for_dali, "data_shards.verify", "from nvidia import dali"),
        (one_place_for_fsspec, "data_shards.sources.folders", "from fsspec.core import url_to_fs"),
        (one_place_for_ray, "data_shards.executors", "def f():\n    import ray"),
        (metric_is_maths, "trainer.metric.losses", "from accelerate import Accelerator"),
        (metric_is_maths, "trainer.metric.losses", "import torch\ntorch.distributed.all_reduce(1)"),
        (metric_is_maths, "trainer.metric.losses", "from pathlib import Path"),
        (metric_is_maths, "trainer.metric.losses", "import json"),
        (metric_is_maths, "trainer.metric.losses", "from os import path"),
        (metric_is_maths, "trainer.metric.losses", "import io"),
        (metric_is_maths, "trainer.metric.losses", "def f(p):\n    return open(p).read()"),
        (metric_is_maths, "trainer.metric.losses", "from trainer.config import LossConfig"),
        (metric_is_maths, "trainer.metric.losses", "from trainer import collectives"),
        (metric_is_maths, "trainer.metric.losses", "from ..model import Embedder"),
        (metric_is_maths, "trainer.metric.losses", "from data_shards.plan import Plan"),
        (trainer_imports_downwards, "trainer.collectives", "from trainer.train_step import train_step"),
        (trainer_imports_downwards, "trainer.collectives", "from trainer.model import Embedder"),
        (trainer_imports_downwards, "trainer.model", "from trainer import evaluation"),
        (trainer_imports_downwards, "trainer.model", "from .train import main"),
        (trainer_imports_downwards, "trainer.metric.losses", "from trainer.evaluation.index import search"),
        (trainer_imports_downwards, "trainer.train_step", "from trainer.evaluation.embed import embed"),
        (trainer_imports_downwards, "trainer.train_step", "from trainer.train import main"),
        (trainer_imports_downwards, "trainer.evaluation.run", "from trainer.train_step import train_step"),
        (trainer_imports_downwards, "trainer.evaluation.run", "import trainer.train"),
        (trainer_imports_downwards, "trainer.evaluation.run", "from trainer.cli import main"),
        (trainer_imports_downwards, "trainer.config", "from trainer.model import Embedder"),
        (trainer_imports_downwards, "trainer.train", "from trainer.cli import main"),
    ],
)
def test_the_rule_finds_a_source_that_breaks_it(rule, module, source):
    assert violations(rule, source, module)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("trainer.collectives", "import torch.distributed as dist\ndist.get_rank()"),
        ("trainer.evaluation.index", "import faiss\nfaiss.IndexFlatL2(2)"),
        ("trainer.evaluation.measures", "from trainer.evaluation.index import search\nfrom .draws import Pairs"),
        ("data_shards.decode", "from nvidia.dali import fn"),
        ("trainer.metric.losses", "from math import sqrt\nfrom trainer.metric.mining import Triplets\nimport torch"),
        ("trainer.train", "from trainer import checkpoint\nfrom trainer.train_step import train_step\nimport os"),
        ("trainer.model", "from trainer.config import ModelConfig\nfrom data_shards.plan import Plan"),
        ("trainer.cli", "from trainer.doctor import examine\nfrom trainer.train import main"),
        ("trainer.telemetry", "# torch.distributed, faiss\ntext = 'import faiss'"),
        ("trainer.train", "class A:\n    faiss = 1\na = A()\na.faiss"),
    ],
)
def test_the_rules_leave_a_lawful_source_alone(module, source):
    assert {rule.__name__: violations(rule, source, module) for rule in RULES} == {rule.__name__: [] for rule in RULES}


def test_relative_imports_of_a_package_start_in_the_package():
    assert names_used("from .index import search", "trainer.evaluation", package=True) == {
        "trainer.evaluation.index",
        "trainer.evaluation.index.search",
    }
    assert "trainer.index.search" in names_used("from .index import search", "trainer.evaluation")
