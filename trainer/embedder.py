"""A trained network to be used: pictures in, embeddings out, as the evaluation has them."""

import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from data_shards.pictures import quiet_pillow
from trainer import checkpoint
from trainer.checkpoint import LATEST
from trainer.config import CONFIG, TrainConfig, load
from trainer.devices import resolve
from trainer.evaluation.embed import BATCH
from trainer.evaluation.embedding_store import MANIFEST
from trainer.evaluation.results import EVALUATION, FACESCALE, UNSEEN_IDENTITIES, thresholds_of
from trainer.evaluation.run import EMBEDDINGS
from trainer.export import huggingface
from trainer.model import Embedder
from trainer.network_inputs import Unreadable, expanded, network_input
from trainer.precision import use_bf16


class Skipped(NamedTuple):
    """A picture that could not be embedded."""

    position: int
    """Among the pictures that were given."""
    name: str
    reason: str


class PhotoEmbedder:
    """Embeds pictures with a trained network; made by `load_embedder`.

    Pictures are decoded, cut to their central square and resized by what evaluation uses on a CPU (`data.decoder libjpeg`), on
    every device. Files and bytes therefore get the embedding that the same picture has in `facescale embed RUN`; a large JPEG
    that was decoded before it is given here is resized from all its pixels, which makes a small difference.

    Attributes:
        model: in evaluation mode.
        image_size: width and height of the network's input, in pixels.
        embedding_size: d.
        squared: whether `distance` is the squared one.
        thresholds: root L2 distances in [0, 2] up to which two pictures count as of one identity, by name: `verification`
            divided the pairs of held-out identities best, `far_0.001` let one of 1,000 pairs of different ones through. Empty
            where this checkpoint has not been evaluated.
        weights: SHA-256 of the weights.
        config: settings of the run; None of an exported network.
        skipped: what the last `embed` with errors="skip" left out.
    """

    def __init__(
        self,
        model: Embedder,
        *,
        device: str,
        squared: bool,
        weights: str,
        thresholds: Mapping[str, float] | None = None,
        config: TrainConfig | None = None,
    ) -> None:
        self.model = model.to(memory_format=torch.channels_last).to(device).eval()
        self.device, self.squared, self.weights, self.config = device, squared, weights, config
        self.image_size, self.embedding_size = model.image_size, model.config.embedding_size
        self.thresholds = dict(thresholds or {})
        self.skipped: list[Skipped] = []

    def embed(
        self, images: Any, batch_size: int = BATCH, errors: Literal["raise", "skip"] = "raise"
    ) -> NDArray[np.float32]:
        """Embeddings in the order of the pictures: float32, unit norm, shape (n, d).

        Args:
            images: a picture or a sequence of them, of any sizes, mixed: the path of a file, its bytes, a PIL image, a uint8
                array (H, W, 3) or (H, W), a uint8 tensor (H, W, 3) or (3, H, W); a uint8 array or tensor (n, H, W, 3) or
                (n, 3, H, W); a folder, of which every picture is taken, sorted by path.
            batch_size: pictures that go through the network at once.
            errors: "skip" leaves out pictures that cannot be read, and lists them in `skipped`.
        Raises:
            ValueError: a picture cannot be read (the message names its file or position), or is of no kind named above.
        """
        if batch_size < 1 or errors not in ("raise", "skip"):
            raise ValueError(
                f"batch_size is {batch_size} and errors {errors!r}; allowed are at least 1, and 'raise' or 'skip'"
            )
        self.skipped = []
        pictures = expanded(images)
        parts = [np.empty((0, self.embedding_size), np.float32)]
        waiting: list[NDArray[np.uint8]] = []
        with quiet_pillow(), ThreadPoolExecutor(len(os.sched_getaffinity(0)), thread_name_prefix="decode") as pool:
            for begin in range(0, len(pictures), batch_size):
                waiting += self._inputs(pictures, range(begin, min(begin + batch_size, len(pictures))), errors, pool)
                while len(waiting) >= batch_size:
                    parts.append(self._run(waiting[:batch_size]))
                    del waiting[:batch_size]
        if waiting:
            parts.append(self._run(waiting))
        return np.concatenate(parts)

    def _inputs(
        self, pictures: Sequence[Any], positions: range, errors: str, pool: ThreadPoolExecutor
    ) -> list[NDArray[np.uint8]]:
        """The readable ones of some pictures as the network takes them, shape (size, size, 3) each."""
        found = []
        tasks = [pool.submit(network_input, pictures[position], self.image_size) for position in positions]
        for position, task in zip(positions, tasks, strict=True):
            try:
                found.append(task.result())
            except Unreadable as error:
                name = error.name or f"picture {position}"
                if errors == "raise":
                    for other in tasks:
                        other.cancel()
                    raise ValueError(f"{name} {error}") from None
                self.skipped.append(Skipped(position, name, str(error)))
        return found

    @torch.inference_mode()
    def _run(self, inputs: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
        images = torch.from_numpy(np.stack(inputs)).permute(0, 3, 1, 2)  # (b, 3, H, W)
        embeddings = self.model(images.to(self.device)).float().cpu()  # (b, d)
        if not torch.isfinite(embeddings).all():
            raise ValueError("embeddings hold NaN or infinity; the weights have diverged or are damaged")
        found: NDArray[np.float32] = embeddings.numpy()
        return found

    def distance(self, a: NDArray[Any], b: NDArray[Any]) -> NDArray[np.float64]:
        """L2 distance of embeddings, root in [0, 2] or squared in [0, 4] (`squared`); (…, d) and (…, d) broadcast to (…).

        Raises:
            ValueError: their last dimensions differ.
        """
        one, other = np.asarray(a, np.float64), np.asarray(b, np.float64)
        if one.ndim < 1 or other.ndim < 1 or one.shape[-1] != other.shape[-1]:
            raise ValueError(f"embeddings have shapes {one.shape} and {other.shape}; the last dimensions must be equal")
        squares: NDArray[np.float64] = np.square(one - other).sum(-1)
        return squares if self.squared else np.sqrt(squares)

    @property
    def threshold(self) -> float | None:
        """`thresholds["verification"]` as a distance in the unit of `distance`; None where there is none."""
        found = self.thresholds.get("verification")
        return found**2 if found is not None and self.squared else found


def load_embedder(
    path: str | os.PathLike[str],
    device: str = "auto",
    precision: Literal["auto", "fp32", "bf16"] = "auto",
    checkpoint: str | int = LATEST,
) -> PhotoEmbedder:
    """The network of a run, of one of its checkpoints, or of an exported folder.

    Args:
        path: run folder of `facescale train`, a folder RUN/checkpoints/step-…, or a folder of `facescale export`.
        device: cpu, cuda, cuda:N, or auto: the GPU where there is one.
        precision: auto is the run's `run.precision`, and fp32 for exported networks.
        checkpoint: of a run: latest, best (of `run.best_metric`), or the number of a step.
    Raises:
        ValueError: nothing of that kind is there, or it is damaged, or of another architecture than it says.
    """
    folder = Path(path)
    if precision not in ("auto", "fp32", "bf16"):
        raise ValueError(f"precision is {precision!r}; allowed are auto, fp32 and bf16")
    device = resolve(device)
    if huggingface.is_exported(folder):
        return _exported(folder, device, precision, checkpoint)
    return _of_run(folder, device, precision, checkpoint)


def _of_run(folder: Path, device: str, precision: str, which: str | int) -> PhotoEmbedder:
    if checkpoint.is_checkpoint(folder):
        _no_choice(folder, which)
        run = folder.resolve().parent.parent
        found = checkpoint.at(folder)
        settings = next((path for path in (folder / CONFIG, run / CONFIG) if path.is_file()), None)
    else:
        run, settings = folder, folder / CONFIG if (folder / CONFIG).is_file() else None
        if settings is not None:
            found = checkpoint.chosen(folder / checkpoint.CHECKPOINTS, str(which))
    if settings is None:
        raise ValueError(
            f"{folder} holds no network: it is no run folder ({CONFIG}, checkpoints), no checkpoint of one, and no exported "
            f"folder ({huggingface.CONFIG})"
        )
    config = load(settings)
    wanted = config.run.precision if precision == "auto" else precision
    model = Embedder(replace(config.model, weights=None), use_bf16(wanted, device), config.data.image_size)
    found.load_model(model)
    weights = found.weights_sha256
    return PhotoEmbedder(
        model,
        device=device,
        squared=config.loss.squared,
        weights=weights,
        thresholds=_thresholds(run, weights),
        config=config,
    )


def _exported(folder: Path, device: str, precision: str, which: str | int) -> PhotoEmbedder:
    _no_choice(folder, which)
    model, config = huggingface.read_exported(folder)
    model.bf16 = precision == "bf16"
    weights = huggingface.weights_sha256(folder)
    squared = config.distance == "squared"
    return PhotoEmbedder(model, device=device, squared=squared, weights=weights, thresholds=config.thresholds)


def _no_choice(folder: Path, which: str | int) -> None:
    if which != LATEST:
        raise ValueError(f"checkpoint is {which!r}, but {folder} is one network: give the run's folder")


def _thresholds(run: Path, weights: str) -> dict[str, float]:
    """Of RUN/evaluation where stored embeddings show that it judged these weights."""
    results = run / EVALUATION / "results.json"
    try:
        judged = {json.loads(path.read_text()).get("weights") for path in (run / EMBEDDINGS).glob(f"*/{MANIFEST}")}
        rows = json.loads(results.read_text()) if weights in judged else []
        wanted = [row for row in rows if (row["set"], row["embedder"]) == (UNSEEN_IDENTITIES, FACESCALE)]
        return thresholds_of(wanted[0]) if wanted else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # none, or not one that can be used
        return {}
