"""The one DALI pipeline: encoded bytes and augmentation parameters in, uint8 batches out. The device is an argument.

Only on a GPU: `decoders.image_slice` runs as "mixed" (the hardware decoder where the GPU has one) with room made beforehand for
the largest picture, the operators after it on the GPU, and DALI's output is copied on the current CUDA stream. These are the
lines that read `device.type` or `gpu` below. On CPU cores `cpu_decode` gives the same batches sooner.
"""

from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.pipeline import Pipeline
from nvidia.dali.plugin.pytorch import feed_ndarray

from data_shards.augment import Augmentation

Encoded = list[NDArray[np.uint8]]
Source = Callable[[], tuple[Encoded, Augmentation]]
HARDWARE_LOAD = 0.65
"""DALI's own default for the share of JPEGs that a GPU's hardware decoder takes."""


class DecodeError(RuntimeError):
    """A picture of a batch that was handed to the pipeline does not decode; the pipeline cannot be used any more."""


class Decoder:
    """Decodes, crops, resizes and mirrors batches, some batches ahead of their use; their colours stay.

    Args:
        source: called for the next batch, up to `ahead` calls before its result leaves `next`; raises StopIteration at the end.
        batch_size: most samples in a batch.
        image_size: width and height of the output, in pixels.
        device: where the output lies and, for CUDA, where the work is done.
        threads: CPU threads of DALI.
        hardware_load: on a GPU, share of the JPEGs that its hardware decoder takes, in [0, 1].
        largest: on a GPU, width and height of the largest picture, in pixels, for which memory is taken at the start.
    """

    ahead = 3
    """Batches that DALI holds at most: two decoded and one in work."""

    def __init__(
        self,
        source: Source,
        batch_size: int,
        image_size: int,
        device: torch.device | str = "cpu",
        threads: int = 2,
        *,
        hardware_load: float = HARDWARE_LOAD,
        largest: tuple[int, int] = (0, 0),
    ) -> None:
        self._device = torch.device(device)
        self._sizes: deque[int] = deque()
        gpu = self._device.type == "cuda"
        device_id = (self._device.index or 0) if gpu else None

        def fed() -> tuple[Encoded, ...]:
            encoded, parameters = source()
            self._sizes.append(len(encoded))
            return (encoded, *(list(column) for column in (parameters.anchor, parameters.shape, parameters.mirror)))

        self._pipeline: Pipeline = _pipeline(
            fed,
            image_size,
            _on_gpu(hardware_load, largest) if gpu else {"device": "cpu"},
            batch_size=batch_size,
            num_threads=threads,
            device_id=device_id,
            prefetch_queue_depth=2,
        )
        self._size = image_size

    def next(self) -> torch.Tensor:
        """The next batch: uint8 in [0, 255], shape (b, 3, H, W), channels-last in memory.

        Raises:
            StopIteration: the source has ended.
            DecodeError: a picture among the batches fed so far does not decode.
        """
        try:
            (output,) = self._pipeline.run()
        except RuntimeError as error:
            raise DecodeError(str(error)) from error
        images = torch.empty((self._sizes.popleft(), self._size, self._size, 3), dtype=torch.uint8, device=self._device)
        if self._device.type == "cuda":
            feed_ndarray(output.as_tensor(), images, cuda_stream=torch.cuda.current_stream(self._device))
        else:
            feed_ndarray(output.as_tensor(), images)
        return images.permute(0, 3, 1, 2)  # (b, 3, H, W)

    def decodes(self, encoded: NDArray[np.uint8]) -> bool:
        """Whether DALI's decoder can read one picture."""
        return decodes(encoded)


def _on_gpu(hardware_load: float, largest: tuple[int, int]) -> dict[str, Any]:
    width, height = largest
    return {
        "device": "mixed",
        "hw_decoder_load": hardware_load,
        "preallocate_width_hint": width,
        "preallocate_height_hint": height,
    }


@pipeline_def
def _pipeline(source: Callable[[], tuple[Encoded, ...]], image_size: int, decoder: dict[str, Any]):  # type: ignore[no-untyped-def]
    encoded, anchor, shape, mirror = fn.external_source(source=source, num_outputs=4, batch=True)
    images: Any = fn.decoders.image_slice(
        encoded,
        anchor,
        shape,
        axis_names="WH",
        normalized_anchor=True,
        normalized_shape=True,
        output_type=types.DALIImageType.RGB,
        **decoder,
    )
    images = fn.resize(
        images, size=(image_size, image_size), interp_type=types.DALIInterpType.INTERP_LINEAR, antialias=True
    )
    return fn.flip(images, horizontal=mirror)


class SizeProbe:
    """Decodes whole pictures on the CPU to see whether that works and how large they come out.

    Args:
        threads: CPU threads of DALI.
    """

    batch_size = 32

    def __init__(self, threads: int = 1) -> None:
        self._threads = threads
        self._pipeline: Pipeline | None = None

    def sizes(self, encoded: Encoded) -> list[tuple[int, int] | None]:
        """Width and height of each picture; None where it does not decode.

        A batch that fails is halved until the pictures that do not decode are alone.
        """
        if len(encoded) > self.batch_size:
            return self.sizes(encoded[: self.batch_size]) + self.sizes(encoded[self.batch_size :])
        try:
            return self._run(encoded)
        except RuntimeError:
            self._pipeline = None  # it stays dead
        if len(encoded) == 1:
            return [None]
        half = len(encoded) // 2
        return self.sizes(encoded[:half]) + self.sizes(encoded[half:])

    def _run(self, encoded: Encoded) -> list[tuple[int, int] | None]:
        if self._pipeline is None:
            self._pipeline = _whole(
                batch_size=self.batch_size, num_threads=self._threads, device_id=None, prefetch_queue_depth=1
            )
            self._pipeline.build()
        self._pipeline.feed_input("encoded", encoded)
        (images,) = self._pipeline.run()
        return [(int(shape[1]), int(shape[0])) for shape in images.shape()]


@pipeline_def
def _whole():  # type: ignore[no-untyped-def]
    encoded = fn.external_source(name="encoded", no_copy=False)
    return fn.decoders.image(encoded, device="cpu", output_type=types.DALIImageType.RGB)


def decodes(encoded: NDArray[np.uint8]) -> bool:
    """Whether DALI's decoder can read one picture."""
    return SizeProbe().sizes([encoded]) != [None]
