"""Loaders that `loader.py` compares: each turns a set of JPEGs, 64 at a time and for ever, into batches.

All but the two that only decode crop at random (area 0.6 to 1 of the largest square, aspect 0.85 to 1.18), resize with
antialiasing, jitter brightness, contrast and saturation by 0.2, take the colour of 2 %, mirror half, and normalise to float32.
"""

import io
import itertools
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

BATCH, P, K = 64, 16, 4
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
AREA, ASPECT, JITTER, GREYSCALE = (0.6, 1.0), (0.85, 1.18), 0.2, 0.02
CORES = len(os.sched_getaffinity(0))


@dataclass(frozen=True)
class Work:
    pictures: Path
    """identity/image.jpg."""
    shards: Path
    """The same pictures as facescale's shards."""
    size: int
    """Width and height of the output, in pixels."""
    workers: int
    """Worker processes of DataLoaders; threads of SPDL."""

    @property
    def tars(self) -> list[str]:
        return sorted(str(path) for path in self.shards.glob("train/*.tar"))


Batches = Iterator[Any]


def normalised(images: Tensor) -> Tensor:
    """As the model's first operation: uint8 (b, 3, H, W) -> float32."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return (images.float() / 255 - mean) / std


def facescale_loader(work: Work, threads: int = 0, ahead: int = 0) -> Any:
    """Ours, for ever; 0 leaves the settings' defaults."""
    from data_shards.augment import AugmentConfig
    from data_shards.index import ShardSet
    from data_shards.loader import LoaderConfig, training_loader
    from data_shards.plan import Plan, PlanConfig

    split = ShardSet.open(work.shards).split("train")
    plan = Plan(split.starts, PlanConfig(identities_per_batch=P, images_per_identity=K), seed=1)
    loader = training_loader(split, plan, LoaderConfig(image_size=work.size, decode_threads=threads), AugmentConfig())
    if ahead:
        loader._decoder.ahead = ahead
    return loader


def facescale(work: Work) -> Batches:
    """With what the network does first: colours and normalisation, in one product."""
    from trainer.model import normalised as recoloured

    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    for batch in facescale_loader(work):
        yield recoloured(batch.images, mean, std, batch.colour)


def facescale_uint8(work: Work) -> Batches:
    """As training takes it: normalisation is the model's."""
    return (batch.images for batch in facescale_loader(work))


def _encoded(work: Work) -> list[np.ndarray]:
    """Every picture's bytes, in memory already."""
    return [np.fromfile(path, np.uint8) for path in sorted(work.pictures.glob("*/*.jpg"))]


def _parts(items: list[Any]) -> Iterator[list[Any]]:
    endless = itertools.cycle(items)
    while True:
        yield list(itertools.islice(endless, BATCH))


def floor(work: Work) -> Batches:
    """A bare libjpeg-turbo loop (simplejpeg) in as many threads as cores; whole pictures, and nothing else."""
    import simplejpeg

    def decode_all(part: list[np.ndarray]) -> None:
        for encoded in part:
            simplejpeg.decode_jpeg(encoded)

    with ThreadPoolExecutor(CORES) as pool:
        for part in _parts(_encoded(work)):
            yield list(pool.map(decode_all, [part[number::CORES] for number in range(CORES)]))


def floor_scaled(work: Work) -> Batches:
    """The same where libjpeg-turbo may halve or quarter pictures that stay at least as large as the output."""
    import simplejpeg

    def decode_all(part: list[np.ndarray]) -> None:
        for encoded in part:
            simplejpeg.decode_jpeg(encoded, min_height=work.size, min_width=work.size, min_factor=2)

    with ThreadPoolExecutor(CORES) as pool:
        for part in _parts(_encoded(work)):
            yield list(pool.map(decode_all, [part[number::CORES] for number in range(CORES)]))


def dali_decode(work: Work) -> Batches:
    """A pipeline of DALI's that only decodes, whole pictures, bytes fed as ours are."""
    from nvidia.dali import fn, pipeline_def

    parts = _parts(_encoded(work))

    @pipeline_def(batch_size=BATCH, num_threads=CORES, device_id=None, prefetch_queue_depth=2)
    def pipeline() -> Any:
        return fn.decoders.image(fn.external_source(source=lambda: next(parts), batch=True))

    made = pipeline()
    while True:
        yield made.run()


def _dali_webdataset(work: Work, float_out: bool) -> Batches:
    from nvidia.dali import fn, pipeline_def, types
    from nvidia.dali.plugin.pytorch import feed_ndarray

    @pipeline_def(batch_size=BATCH, num_threads=CORES, device_id=None, prefetch_queue_depth=2, seed=1)
    def pipeline() -> Any:
        indexes = [tar.removesuffix(".tar") + ".idx" for tar in work.tars]
        encoded, _ = fn.readers.webdataset(paths=work.tars, index_paths=indexes, ext=["jpg", "cls"])
        area = fn.random.uniform(range=AREA) ** 0.5
        images = fn.decoders.image_slice(
            encoded,
            fn.stack((1 - area) * fn.random.uniform(range=(0, 1)), (1 - area) * fn.random.uniform(range=(0, 1))),
            fn.stack(area, area),
            axis_names="WH",
        )
        images = fn.resize(images, size=(work.size, work.size), interp_type=types.INTERP_LINEAR, antialias=True)
        factors = {
            name: fn.random.uniform(range=(1 - JITTER, 1 + JITTER)) for name in ("brightness", "contrast", "saturation")
        }
        images = fn.color_twist(images, **factors)
        mirror = fn.random.coin_flip()
        if not float_out:
            return fn.flip(images, horizontal=mirror)
        scaled = {"mean": [255 * value for value in MEAN], "std": [255 * value for value in STD]}
        return fn.crop_mirror_normalize(images, mirror=mirror, dtype=types.FLOAT, output_layout="CHW", **scaled)

    made = pipeline()
    while True:
        (output,) = made.run()
        shape, kind = (
            ((3, work.size, work.size), torch.float32) if float_out else ((work.size,) * 2 + (3,), torch.uint8)
        )
        images = torch.empty(BATCH, *shape, dtype=kind)
        feed_ndarray(output.as_tensor(), images)
        yield images


def dali_webdataset(work: Work) -> Batches:
    """DALI's own reader of tars, in the order of the tars: no P x K; the same operators, parameters drawn by DALI."""
    return _dali_webdataset(work, float_out=True)


def dali_webdataset_uint8(work: Work) -> Batches:
    return _dali_webdataset(work, float_out=False)


def _transform(size: int) -> Callable[[Any], Tensor]:
    """torchvision's, of a PIL image or of a uint8 tensor (3, H, W)."""
    from torchvision.transforms import v2

    jitter = v2.ColorJitter(JITTER, JITTER, JITTER)
    steps = [
        v2.RandomResizedCrop(size, scale=AREA, ratio=ASPECT, antialias=True),
        jitter,
        v2.RandomGrayscale(GREYSCALE),
        v2.RandomHorizontalFlip(),
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(MEAN, STD),
    ]
    return v2.Compose(steps)


def _pil(encoded: Any) -> Any:
    from PIL import Image

    return Image.open(io.BytesIO(encoded)).convert("RGB")


def _tensor(encoded: Any) -> Tensor:
    from torchvision.io import ImageReadMode, decode_jpeg

    return decode_jpeg(torch.frombuffer(bytearray(encoded), dtype=torch.uint8), mode=ImageReadMode.RGB)


class _FromBytes:
    """Decode and transform of encoded bytes, as a picklable function."""

    def __init__(self, decode: Callable[[Any], Any], size: int) -> None:
        self._decode, self._transform = decode, _transform(size)

    def __call__(self, encoded: Any) -> Tensor:
        return self._transform(self._decode(encoded))


def _forever(loader: Any) -> Batches:
    while True:
        for images, *_ in loader:
            yield images


def _data_loader(dataset: Any, workers: int, **more: Any) -> Batches:
    from torch.utils.data import DataLoader

    kept = {"persistent_workers": True} if workers else {}
    return _forever(DataLoader(dataset, num_workers=workers, **kept, **more))


def _image_folder(work: Work, decode: Callable[[Any], Any]) -> Batches:
    from torchvision.datasets import ImageFolder

    def read(path: str) -> bytes:
        return Path(path).read_bytes()

    dataset = ImageFolder(str(work.pictures), _FromBytes(decode, work.size), loader=read)
    return _data_loader(dataset, work.workers, batch_size=BATCH, shuffle=True, drop_last=True)


def torch_pil_folder(work: Work) -> Batches:
    """PyTorch's DataLoader over ImageFolder, decoded by Pillow."""
    return _image_folder(work, _pil)


def torch_jpeg_folder(work: Work) -> Batches:
    """PyTorch's DataLoader over ImageFolder, decoded by torchvision.io.decode_jpeg."""
    return _image_folder(work, _tensor)


def _webdataset(work: Work, decode: Callable[[Any], Any]) -> Batches:
    import webdataset

    dataset = webdataset.WebDataset(work.tars, resampled=True, shardshuffle=False, nodesplitter=None)
    dataset = dataset.shuffle(500).to_tuple("jpg", "cls").map_tuple(_FromBytes(decode, work.size), int)
    return _data_loader(dataset.batched(BATCH), work.workers, batch_size=None)


def torch_pil_webdataset(work: Work) -> Batches:
    """`webdataset` through PyTorch's DataLoader, decoded by Pillow."""
    return _webdataset(work, _pil)


def torch_jpeg_webdataset(work: Work) -> Batches:
    """`webdataset` through PyTorch's DataLoader, decoded by torchvision.io.decode_jpeg."""
    return _webdataset(work, _tensor)


class _MapStyle:
    """Items of facescale's tars by number, the way insightface reads its RecordIO: seek, read, decode with OpenCV."""

    def __init__(self, work: Work) -> None:
        from data_shards.index import ShardSet

        rows = ShardSet.open(work.shards).split("train").samples
        self._rows = [tuple(int(row[name]) for name in ("shard", "offset", "size")) for row in rows]
        self._tars, self._files = work.tars, {}
        self._transform = _transform(work.size)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> tuple[Tensor, int]:
        import cv2

        cv2.setNumThreads(0)
        shard, offset, size = self._rows[number]
        if (os.getpid(), shard) not in self._files:
            self._files[os.getpid(), shard] = open(self._tars[shard], "rb")  # noqa: SIM115
        file = self._files[os.getpid(), shard]
        file.seek(offset)
        image = cv2.imdecode(np.frombuffer(file.read(size), np.uint8), cv2.IMREAD_COLOR_RGB)
        return self._transform(torch.from_numpy(image).permute(2, 0, 1)), number


def map_style(work: Work) -> Batches:
    """A map-style Dataset over the same tars as insightface's MXFaceDataset reads its RecordIO."""
    return _data_loader(_MapStyle(work), work.workers, batch_size=BATCH, shuffle=True, drop_last=True)


def spdl(work: Work) -> Batches:
    """SPDL (wants FFmpeg's libraries): a pipeline of threads; FFmpeg decodes and resizes whole pictures, no random crop."""
    import spdl.io
    from spdl.pipeline import PipelineBuilder

    options = {"scale_algo": "bilinear", "scale_mode": None, "pix_fmt": "rgb24"}
    filter_desc = spdl.io.get_video_filter_desc(scale_width=work.size, scale_height=work.size, **options)

    def batch(part: list[bytes]) -> Tensor:
        frames = [spdl.io.decode_packets(spdl.io.demux_image(encoded), filter_desc=filter_desc) for encoded in part]
        return spdl.io.to_torch(spdl.io.convert_frames(frames))

    pictures = [encoded.tobytes() for encoded in _encoded(work)]
    batch(pictures[:1])  # without FFmpeg's libraries the pipeline would wait for ever
    source = _parts(pictures)
    builder = PipelineBuilder().add_source(source).pipe(batch, concurrency=max(1, work.workers)).add_sink(4)
    pipeline = builder.build(num_threads=max(1, work.workers))
    with pipeline.auto_stop():
        for images in pipeline:
            yield normalised(images.permute(0, 3, 1, 2))


CONTENDERS: dict[str, Callable[[Work], Batches]] = {
    function.__name__: function
    for function in (
        facescale, facescale_uint8, floor, floor_scaled, dali_decode, dali_webdataset, dali_webdataset_uint8,
        torch_pil_folder, torch_jpeg_folder, torch_pil_webdataset, torch_jpeg_webdataset, map_style, spdl,
    )
}  # fmt: skip
HAVE_WORKERS = (
    "torch_pil_folder",
    "torch_jpeg_folder",
    "torch_pil_webdataset",
    "torch_jpeg_webdataset",
    "map_style",
    "spdl",
)
