"""What the tests of shards in a store share: settings, and ways to read."""

import contextlib

import numpy as np

from data_shards.index import ShardSet
from data_shards.reader import TarReader, open_reader
from data_shards.stream_config import StreamConfig

COUNTS = {"ann": 9, "bob": 7, "cy": 12, "dee": 8, "eve": 4}
TOTAL = 40
EVERYTHING = np.arange(TOTAL)
QUICK = {"backoff_s": 0.01, "timeout_s": 5.0, "connections": 4}


def config_of(folder, **settings):
    return StreamConfig(cache_dir=folder / "cache", **{"cache_gb": 1.0, **QUICK, **settings})


def opened(store, folder, **settings):
    return ShardSet.open(store.url, config_of(folder, **settings)).split("train")


def all_bytes(split, samples=EVERYTHING):
    return [bytes(image) for image in open_reader(split).read(samples)]


def local_bytes(shards, samples=EVERYTHING):
    return [bytes(image) for image in TarReader(ShardSet.open(shards).split("train")).read(samples)]


def on_disk(folder):
    """Bytes on the disk; another process may delete files meanwhile."""
    found = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            found += path.stat().st_blocks * 512 if path.is_file() else 0
    return found


def copies(folder):
    return sorted(folder.rglob("*.tar.part"))
