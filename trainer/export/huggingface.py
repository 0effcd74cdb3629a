"""Folders in the layout of the Hugging Face Hub: model.safetensors, config.json, README.md.

The Hub is spoken to by `push` alone.
"""

import hashlib
from pathlib import Path

from safetensors.torch import save_file

from trainer.backbones import difference
from trainer.export.config import ExportedConfig
from trainer.export.network import new_folder
from trainer.model import Embedder, read_state

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"


def write(model: Embedder, config: ExportedConfig, card: str, out: Path) -> None:
    """Writes the folder, whole or not at all.

    Raises:
        ValueError: `out` exists and is not empty.
    """
    tensors = {name: value.contiguous() for name, value in model.state_dict().items()}
    with new_folder(out) as folder:
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        (folder / CONFIG).write_text(config.json(), encoding="utf-8")
        (folder / CARD).write_text(card, encoding="utf-8")


def is_exported(folder: Path) -> bool:
    """Whether it looks like a folder that `write` made."""
    return (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file()


def read_exported(folder: Path) -> tuple[Embedder, ExportedConfig]:
    """The network, float32, on the CPU, in evaluation mode, and what it says about itself.

    Raises:
        ValueError: the folder is not such a one, is damaged, or its weights are of another network than its config says.
    """
    path = folder / CONFIG
    if not is_exported(folder):
        raise ValueError(f"{folder} is no exported network: it must have {CONFIG} and {WEIGHTS}")
    try:
        config = ExportedConfig.from_json(path.read_text(encoding="utf-8"))
        model = config.network()
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    state = read_state(folder / WEIGHTS, "exported network")
    if said := difference(model.state_dict(), state):
        raise ValueError(f"{folder / WEIGHTS} is not of the network of {path}: it {said}")
    model.load_state_dict(state, strict=False)  # older files may lack counts of batches
    return model, config


def weights_sha256(folder: Path) -> str:
    """Of the weights of an exported network."""
    with (folder / WEIGHTS).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_repo(name: str) -> None:
    """Raises ValueError unless it is a repository's name on the Hub: NAME or OWNER/NAME."""
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except ValueError as error:
        raise ValueError(f"--push is {name!r}; OWNER/NAME of a repository is needed: {error}") from None


def push(folder: Path, repo: str) -> str:
    """Uploads a written folder, with the user's own token; a repository that is not there yet is made, private.

    Returns:
        the commit's address.
    Raises:
        ValueError: the Hub refuses, or cannot be reached; the folder stays.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(repo, private=True, exist_ok=True)
        return str(api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Export from facescale"))
    except Exception as error:  # of the Hub's client and of the HTTP client beneath it, without a common parent
        said = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(f"{folder} is written, but could not be pushed to {repo}: {said}") from None
