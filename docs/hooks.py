"""What mkdocs does beyond pages/: READMEs become pages, the reference is written from parsers and settings, figures are drawn.

Nothing of it lies in the repository, so none of it can go stale.
"""

import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT), str(HERE)]

import figures  # noqa: E402
import reference  # noqa: E402

DETAILS = {
    "data_shards/README.md": "details/data_shards.md",
    "trainer/README.md": "details/trainer.md",
    "trainer/evaluation/README.md": "details/evaluation.md",
    "launch/README.md": "details/launch.md",
    "benchmarks/README.md": "details/benchmarks.md",
    "CHANGELOG.md": "details/changelog.md",
}
"""Files of the repository and the pages that they become."""

_INCLUDE = re.compile(r"^<!-- from (?P<file>\S+): (?P<heading>.+) -->$", re.MULTILINE)
_LINK = re.compile(r"(\]\()(?!https?:|#)([^)\s]+)(\))")


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages and figures that are made rather than written."""
    made: dict[str, str | bytes] = {place: (ROOT / source).read_text() for source, place in DETAILS.items()}
    made |= {"reference/commands.md": reference.commands(), "reference/settings.md": reference.settings()}
    made |= {"reference/python.md": reference.python()}
    made |= {f"figures/{name}.svg": draw() for name, draw in figures.FIGURES.items()}
    for place, content in made.items():
        files.append(File.generated(config, place, content=content))
    for source, place in DETAILS.items():
        for picture in _pictures(source):
            target = (Path(place).parent / picture).as_posix()
            files.append(File.generated(config, target, abs_src_path=str((ROOT / source).parent / picture)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Puts in the sections that a page takes from a README, and links the READMEs that it names."""
    markdown = _INCLUDE.sub(lambda found: section(ROOT / found["file"], found["heading"]), markdown)
    up = "../" * page.file.src_uri.count("/")
    for source, place in DETAILS.items():
        if place != page.file.src_uri:
            markdown = markdown.replace(f"`{source}`", f"[`{source}`]({up}{place})")
    return markdown


def section(path: Path, heading: str) -> str:
    """The text below a `## heading`, up to the next one of its level."""
    found = re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", path.read_text(), re.MULTILINE | re.DOTALL)
    if found is None:
        raise PluginError(f"{path.name} has no section {heading!r}")
    return found[1].strip()


def _pictures(source: str) -> list[str]:
    links = [found[2] for found in _LINK.finditer((ROOT / source).read_text())]
    return [link for link in links if link.endswith((".png", ".svg"))]
