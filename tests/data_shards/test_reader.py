"""The reader gives the bytes that were converted."""

import os
from pathlib import Path

import numpy as np
import pytest
from collections_on_disk import encoded

from data_shards.reader import TarReader

COUNTS = {"ann": 5, "bob": 3, "cy": 6}
FILES = [encoded(31 * number, size=(24 + number, 16)) for number in range(14)]


@pytest.fixture
def split(split_of):
    rows = iter(FILES)
    split = split_of({name: [next(rows) for _ in range(n)] for name, n in COUNTS.items()}, ".jpg", shard_bytes=6_000)
    assert len(split.shards) > 2
    return split


@pytest.mark.parametrize("samples", [range(14), [13, 0, 7, 1], [4, 4, 4], [6], []])
def test_reads_each_samples_bytes_in_the_order_asked_for(split, samples):
    found = TarReader(split).read(np.array(list(samples), np.int64))
    assert [bytes(image) for image in found] == [FILES[sample] for sample in samples]


def test_images_are_read_only_views_of_one_map_for_each_shard(split):
    reader = TarReader(split)
    first, second = reader.read(np.arange(14)), reader.read(np.arange(14))
    assert all(np.shares_memory(*pair) for pair in zip(first, second, strict=True))
    assert not any(image.flags.writeable for image in first)
    maps = [
        line
        for line in Path("/proc/self/maps").read_text().split("\n")
        if str(split.directory) in line and line.endswith(".tar")
    ]
    assert len(maps) == len(split.shards)


def test_a_shard_is_opened_when_it_is_first_read(split):
    reader = TarReader(split)
    last = int(split.samples["shard"].argmax())
    untouched = np.flatnonzero(split.samples["shard"] != split.samples["shard"][last])
    os.unlink(split.shards[int(split.samples["shard"][last])])
    assert [bytes(image) for image in reader.read(untouched)] == [FILES[sample] for sample in untouched]
    with pytest.raises(FileNotFoundError):
        reader.read(np.array([last]))


def test_a_map_outlives_the_file(split):
    reader = TarReader(split)
    images = reader.read(np.arange(14))
    for shard in split.shards:
        shard.unlink()
    assert [bytes(image) for image in images] == FILES
    assert bytes(reader.read(np.array([9]))[0]) == FILES[9]


@pytest.mark.parametrize("samples", [range(14), [13, 0], []])
def test_reading_ahead_advises_the_kernel_of_every_samples_pages(split, samples, monkeypatch):
    reader, advised = TarReader(split), []

    class Map:
        def __init__(self, shard):
            self.shard = shard

        def madvise(self, option, begin, length):
            assert begin % os.sysconf("SC_PAGESIZE") == 0  # the kernel refuses anything else
            advised.append((self.shard, begin, begin + length))

    monkeypatch.setattr(reader, "_map", lambda shard: (Map(shard), None))
    reader.read_ahead(np.array(list(samples), np.int64))
    rows = split.samples[list(samples)]
    for (shard, begin, end), row in zip(advised, rows, strict=True):
        assert shard == row["shard"]
        assert begin <= row["offset"]
        assert end >= row["offset"] + row["size"]


def test_reading_ahead_changes_no_byte(split):
    reader = TarReader(split)
    reader.read_ahead(np.arange(14))
    assert [bytes(image) for image in reader.read(np.arange(14))] == FILES
