"""What pages, READMEs and recipes say: their commands, settings and paths, as (place, text)."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/pages/**/*.md"), *ROOT.glob("launch/**/*.md")])
PAGES += sorted([*ROOT.glob("trainer/**/*.md"), *ROOT.glob("data_shards/**/*.md"), *ROOT.glob("benchmarks/*.md")])
RECIPES = sorted(ROOT.glob("launch/recipes/*.yaml"))

_FENCE = re.compile(r"^```.*?\n(.*?)^```", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
_LAUNCHED = re.compile(r"^accelerate launch .*?-m trainer\.(train|cli)\b")
_SETTING = re.compile(
    r"(?<![\w./-])(?:--)?((?:data|plan|augment|model|loss|softmax|guard|optimizer|run)\.[a-z][\w.-]*\w)"
)
_TOPS = "benchmarks|data_shards|docs|launch|tests|trainer"


class Command(NamedTuple):
    """A command line of facescale."""

    place: str
    line: str
    whole: bool
    """Whether it is there to be run: in a block, not in passing."""

    @property
    def words(self) -> list[str]:
        """From the subcommand on, whoever launches it."""
        line = _LAUNCHED.sub(lambda found: "facescale train" if found[1] == "train" else "facescale", self.line)
        return shlex.split(line.split(" > ")[0].replace("\\|", "|"))[1:]


def commands() -> list[Command]:
    """All of them, those of one text in its order."""
    found = []
    for path in PAGES:
        text = path.read_text()
        found += [Command(_place(path), line, True) for line in _block_lines(text) if _is_ours(line)]
        found += [Command(_place(path), line, False) for line in _INLINE.findall(text) if _is_ours(line)]
    for path in RECIPES:
        head = [line[1:].strip() for line in path.read_text().splitlines() if line.startswith("#")]
        found += [Command(_place(path), _bare(line), True) for line in head if _is_ours(line)]
    return found


def _block_lines(text: str) -> Iterator[str]:
    """Lines of code blocks, continued ones joined, without prompts and comments."""
    indented = "\n".join(line[4:] for line in text.splitlines() if line.startswith("    "))
    for block in (*_FENCE.findall(text), indented):
        for line in block.replace("\\\n", " ").splitlines():
            yield _bare(line)


def _bare(line: str) -> str:
    line = re.sub(r"^(\$ |[A-Z_]+=\S+ )", "", line.strip())
    return re.split(r"\s+#|\s{2,}\(", line)[0].strip()


def _is_ours(line: str) -> bool:
    bare = _bare(line)
    return bool(re.match(r"facescale [a-z]+( |$)", bare) or _LAUNCHED.match(bare))


def settings() -> set[tuple[str, str]]:
    """(place, dotted name) of every setting that a text names, as in YAML."""
    found = set()
    for path in (*PAGES, *RECIPES):
        text = path.read_text()
        parts = text.splitlines() if path.suffix == ".yaml" else [*_INLINE.findall(text), *_block_lines(text)]
        for part in parts:
            found |= {(_place(path), name.replace("-", "_")) for name in _SETTING.findall(part) if not _is_file(name)}
    return found


def _is_file(name: str) -> bool:
    """Or Python."""
    return name.rpartition(".")[2] in (
        "md",
        "py",
        "json",
        "yaml",
        "npy",
        "csv",
        "pt",
        "pt2",
        "onnx",
        "safetensors",
        "item",
    )


def paths() -> set[tuple[str, str]]:
    """(place, path) of every file or folder of the repository that a text names from its root, or links."""
    found = set()
    for path in (*PAGES, *RECIPES):
        text = path.read_text()
        named = re.findall(rf"(?<![\w./])((?:{_TOPS})/[\w./*-]*\w/?)", text)
        found |= {(_place(path), name) for name in named}
    return found


def _place(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()
