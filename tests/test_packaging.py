"""The wheel in clean environments, without CUDA: what a machine that only converts needs, and what it says about the rest.

Needs the package registry; without it, these skip. `FACESCALE_PYTHONS` names further interpreters to try.
"""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from PIL import Image

from trainer.extras import EXTRAS

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PYTHONS = [sys.executable, *os.environ.get("FACESCALE_PYTHONS", "").split()]
CORE = {
    "PIL",
    "aiohttp",
    "cv2",
    "fsspec",
    "imagehash",
    "indexed_gzip",
    "lmdb",
    "matplotlib",
    "numpy",
    "pyarrow",
    "rich",
    "scipy",
}
CORE |= {"simplejpeg", "yaml"}
"""By the names that are imported."""
pytestmark = pytest.mark.timeout(900)


def run(*words: object, **more: object) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    words = [str(word) for word in words]
    return subprocess.run(words, capture_output=True, text=True, env=environment, check=False, timeout=600, **more)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy, so that nothing is left in the repository."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("trainer", "data_shards"):
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, folder / "source")
    words = ("pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, folder / "source")
    done = run(sys.executable, "-m", *words)
    assert done.returncode == 0, done.stderr
    (found,) = folder.glob("facescale-*.whl")
    return found


def test_the_wheel_has_every_file_that_the_packages_need(wheel):
    with zipfile.ZipFile(wheel) as file:
        inside = {name for name in file.namelist() if name.startswith(("trainer/", "data_shards/"))}
    listed = run("git", "ls-files", "trainer", "data_shards", cwd=ROOT).stdout.split("\n")
    wanted = {name for name in listed if name and not name.endswith("README.md")}
    assert wanted - inside == set()
    assert not any(name.startswith(("tests/", "benchmarks/", "docs/")) for name in inside)


@pytest.fixture(scope="module", params=PYTHONS, ids=lambda python: Path(python).name)
def environment(wheel, tmp_path_factory, request) -> Path:
    """A clean virtual environment with the wheel and its core dependencies; its `bin`."""
    folder = tmp_path_factory.mktemp("clean")
    done = run(request.param, "-m", "venv", folder / "venv")
    assert done.returncode == 0, done.stderr
    done = run(folder / "venv" / "bin" / "pip", "install", "--quiet", wheel)
    if done.returncode and re.search(
        r"connection|resolve host|timed out|No matching distribution", done.stderr, re.IGNORECASE
    ):
        pytest.skip(f"the package registry cannot be reached: {done.stderr.splitlines()[-1][:200]}")
    assert done.returncode == 0, done.stderr
    return folder / "venv" / "bin"


def test_it_has_neither_pytorch_nor_cuda(environment):
    installed = run(environment / "pip", "list", "--format", "json")
    names = {package["name"].lower() for package in json.loads(installed.stdout)}
    assert "facescale" in names
    assert not [name for name in names if name.startswith(("torch", "nvidia", "faiss", "deepspeed", "triton"))]
    assert run(environment / "pip", "check").returncode == 0


def test_pictures_become_shards_there(environment, tmp_path):
    """Drawn, converted, verified, counted, exported, forgotten; aligned by the detector that comes along."""
    words = ("synthesize", "faces", "--identities", 6, "--images-per-identity", 4, "--size", 112, "--workers", 1)
    steps = [
        words,
        ("align", "faces", "aligned", "--workers", 1),
        ("shard", "faces", "shards", "--holdout-identities", 2, "--workers", 1),
        ("verify", "shards"),
        ("shards", "stats", "shards", "--plot", "stats.png"),
        ("shards", "export", "shards", "pictures"),
        ("shards", "index", "shards/train/000000.tar"),
        ("doctor", "--json"),
    ]
    for step in steps:
        done = run(environment / "facescale", *step, cwd=tmp_path)
        assert done.returncode == 0, (step, done.stdout, done.stderr)
    checks = json.loads(done.stdout)["checks"]
    assert "conversion alone: training needs pip install 'facescale[gpu]'" in checks[0]["found"]
    assert len(list((tmp_path / "pictures").rglob("*.jpg"))) == 24
    name = json.loads((tmp_path / "shards" / "manifest.json").read_text())["identities"][0]
    done = run(environment / "facescale", "shards", "forget", "shards", name, cwd=tmp_path)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "shards: all as the manifest says")


@pytest.mark.parametrize(
    ("words", "package", "extra"),
    [
        (("train", "--data.shards", "shards"), "torch", "gpu"),
        (("evaluate", "run"), "torch", "gpu"),
        (("search", ".", "one.jpg", "--network", "run"), "torch", "gpu"),
        (("config",), "tyro", "gpu"),
        (("shard", "faces", "shards", "--executor", "ray"), "ray", "ray"),
    ],
)
def test_what_is_missing_is_named_with_the_extra_that_brings_it(environment, tmp_path, words, package, extra):
    for name in ("anna", "ben"):
        (tmp_path / "faces" / name).mkdir(parents=True)
        Image.effect_noise((40, 40), 50).save(tmp_path / "faces" / name / "1.jpg")
    done = run(environment / "facescale", *words, cwd=tmp_path)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert f"pip install 'facescale[{extra}]'" in done.stderr
    assert package in done.stderr


def test_every_extra_is_there_and_dev_has_them_all():
    extras = PROJECT["optional-dependencies"]
    assert {"gpu", "cpu", "ray", "report", "export", "dev"} <= extras.keys()
    assert not [name for name in PROJECT["dependencies"] if re.match("torch|nvidia|faiss|deepspeed", name)]
    whole = next(name for name in extras["dev"] if name.startswith("facescale["))
    assert set(re.search(r"\[(.*)\]", whole)[1].split(",")) == extras.keys() - {"dev", "bench", "cpu", "train"}


def test_the_lock_satisfies_what_the_project_asks_for():
    locked = dict(
        re.split("==", line.strip())
        for line in (ROOT / "requirements.lock").read_text().splitlines()
        if "==" in line and not line.startswith("#")
    )
    locked = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in locked.items()}
    extras = PROJECT["optional-dependencies"]
    asked = PROJECT["dependencies"] + [
        one for name, several in extras.items() if name not in ("bench", "cpu") for one in several
    ]
    for text in asked:
        requirement = Requirement(text)
        if requirement.name == "facescale":
            continue
        version = locked.get(re.sub(r"[-_.]+", "-", requirement.name).lower())
        assert version is not None, f"{requirement.name} is not in requirements.lock"
        assert requirement.specifier.contains(version, prereleases=True), (text, version)


def test_extras_know_every_package_that_the_core_lacks():
    used = set()
    for path in [*(ROOT / "trainer").rglob("*.py"), *(ROOT / "data_shards").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [one.name for one in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []
            used |= {name.split(".")[0] for name in names}
    third = {name for name in used if name not in sys.stdlib_module_names and name not in ("trainer", "data_shards")}
    assert third <= CORE | EXTRAS.keys()
    assert set(EXTRAS.values()) <= PROJECT["optional-dependencies"].keys()
