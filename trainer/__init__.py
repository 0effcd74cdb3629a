"""Training, evaluation and use of face-embedding networks: `from trainer import load_embedder`."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.embedder import PhotoEmbedder as PhotoEmbedder
    from trainer.embedder import load_embedder as load_embedder

_OFFERED = ("PhotoEmbedder", "load_embedder")


def __getattr__(name: str) -> Any:
    """Imports what the package offers only when it is asked for: the command line must start without PyTorch."""
    if name in _OFFERED:
        from trainer import embedder

        return getattr(embedder, name)
    raise AttributeError(f"module 'trainer' has no attribute {name!r}")
