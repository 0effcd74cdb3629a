"""The cache of shards in a store: never a wrong byte, never above its limit, whoever is killed; and whole tars."""

import errno
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from remote_sets import EVERYTHING, QUICK, TOTAL, all_bytes, copies, local_bytes, on_disk, opened
from store_server import fails, slow

from data_shards.index import ShardSet
from data_shards.reader import open_reader
from data_shards.remote_cache import TarCache
from data_shards.stream_config import StreamConfig


def test_a_damaged_cut_or_empty_copy_is_fetched_again_and_mended(store, shards, tmp_path):
    split = opened(store, tmp_path)
    all_bytes(split)
    cut, zeroed, *others = copies(tmp_path)
    os.truncate(cut, cut.stat().st_size // 2)
    zeroed.write_bytes(bytes(zeroed.stat().st_size))
    with others[0].open("r+b") as file:
        file.seek(int(split.samples["offset"][np.flatnonzero(split.samples["shard"] == 2)[0]]) + 9)
        file.write(b"\x55")
    before = len(store.asked(".tar"))
    assert all_bytes(split) == local_bytes(shards)
    assert len(store.asked(".tar")) - before == 3
    assert all_bytes(split) == local_bytes(shards)
    assert len(store.asked(".tar")) - before == 3


def test_the_limit_holds_in_bytes_on_the_disk(store, shards, tmp_path):
    assert on_disk(shards / "train") > 100_000
    limit = 80_000
    split = opened(store, tmp_path, cache_gb=limit / 1e9, coalesce_kb=0)
    reader, order = open_reader(split), np.random.default_rng(1)
    for _ in range(30):
        samples = order.choice(TOTAL, 8, replace=False)
        assert [bytes(image) for image in reader.read(samples)] == local_bytes(shards, samples)
        assert on_disk(tmp_path / "cache") <= limit
    assert copies(tmp_path)
    assert reader.ranges.hits > 0


def test_what_was_used_longest_ago_goes_first(tmp_path):
    cache = TarCache(tmp_path, limit=90_000)
    for number in range(3):
        assert cache.write(f"set/{number}.tar", 0, bytes([number + 1]) * 20_000)
        os.utime(tmp_path / f"set/{number}.tar.part", (number, number))
    cache.touch("set/0.tar")
    assert cache.write("set/3.tar", 0, b"x" * 20_000)
    assert [bool(cache.read(f"set/{number}.tar", [(0, 5)])[0]) for number in range(4)] == [True, False, True, True]
    assert not cache.write("set/4.tar", 0, bytes(200_000))


KILLED = """
import sys, numpy as np
from pathlib import Path
from data_shards.index import ShardSet
from data_shards.reader import open_reader
from data_shards.stream_config import StreamConfig
stream = StreamConfig(cache_dir=Path(sys.argv[2]), coalesce_kb=0, cache_gb=float(sys.argv[3]))
reader = open_reader(ShardSet.open(sys.argv[1], stream).split("train"))
print("ready", flush=True)
while True:
    reader.read(np.random.default_rng().permutation(40)[:8])
"""


def test_a_reader_that_is_killed_leaves_nothing_wrong_in_the_cache(store, shards, tmp_path):
    limit = 80_000
    for number in range(4):
        command = [sys.executable, "-c", KILLED, store.url, str(tmp_path / "cache"), str(limit / 1e9)]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert child.stdout.readline() == "ready\n"
        time.sleep(0.05 + 0.1 * number)
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        assert on_disk(tmp_path / "cache") <= limit
    assert all_bytes(opened(store, tmp_path, cache_gb=limit / 1e9)) == local_bytes(shards)


def read_all(url, folder, limit, seed, expected):
    split = ShardSet.open(url, StreamConfig(cache_dir=folder, cache_gb=limit / 1e9, **QUICK)).split("train")
    reader, order = open_reader(split), np.random.default_rng(seed)
    for _ in range(40):
        samples = order.permutation(TOTAL)[:10]
        found = [bytes(image) for image in reader.read(samples)]
        assert found == [expected[sample] for sample in samples]
        assert on_disk(Path(folder)) <= limit


@pytest.mark.parametrize("limit", [80_000, 10_000_000])
def test_two_processes_share_a_cache(store, shards, tmp_path, limit):
    context = multiprocessing.get_context("spawn")
    arguments = (store.url, tmp_path / "cache", limit)
    readers = [context.Process(target=read_all, args=(*arguments, seed, local_bytes(shards))) for seed in range(2)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    assert [reader.exitcode for reader in readers] == [0, 0]
    assert len(store.asked("index.npy")) == 1


# whole tars


def test_whole_tars_are_fetched_once_in_order_and_pictures_wait_for_them(store, shards, tmp_path):
    split = opened(store, tmp_path, connections=2)
    reader = open_reader(split)
    store.faults, store.stays = [slow(0.1)], True
    reader.hold([2, 0])
    wanted = np.flatnonzero(np.isin(split.samples["shard"], [0, 2]))
    assert [bytes(image) for image in reader.read(wanted)] == local_bytes(shards, wanted)
    assert [path for path, _, _ in store.asked(".tar")] == ["/train/000002.tar", "/train/000000.tar"]
    reader.hold([0, 1])
    other = np.flatnonzero(split.samples["shard"] == 1)
    assert [bytes(image) for image in reader.read(other)] == local_bytes(shards, other)
    assert len(store.asked(".tar")) == 3


def test_of_two_readers_one_fetches_a_whole_tar(store, tmp_path):
    readers = [open_reader(opened(store, tmp_path)) for _ in range(2)]
    store.faults, store.stays = [slow(0.1)], True
    for reader in readers:
        reader.hold([0, 1, 2])
    for reader in readers:
        reader.read(np.flatnonzero(reader.ranges.split.samples["shard"] <= 2))
    assert len(store.asked(".tar")) == 3


def test_a_whole_tar_that_a_killed_process_began_is_only_completed(store, tmp_path):
    split = opened(store, tmp_path)
    mine = np.flatnonzero(split.samples["shard"] == 1)
    open_reader(split).read(mine[:2])
    before = len(store.asked(".tar"))
    reader = open_reader(split)
    reader.hold([1])
    reader.read(mine)
    (request,) = store.asked(".tar")[before:]
    assert request[2] - request[1] < int(split.shard_bytes[1]) - int(split.samples["size"][mine[:2]].sum())


HOLDS = """
import sys, numpy as np
from pathlib import Path
from data_shards.index import ShardSet
from data_shards.reader import open_reader
from data_shards.stream_config import StreamConfig
split = ShardSet.open(sys.argv[1], StreamConfig(cache_dir=Path(sys.argv[2]))).split("train")
reader = open_reader(split)
reader.hold(range(len(split.shards)))
print("ready", flush=True)
reader.read(np.arange(40))
"""


def test_a_process_that_is_killed_while_it_fetches_whole_tars_hands_over(store, shards, tmp_path):
    store.faults, store.stays = [slow(0.3)], True
    command = [sys.executable, "-c", HOLDS, store.url, str(tmp_path / "cache")]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "ready\n"
    reader = open_reader(opened(store, tmp_path))
    reader.hold(range(4))
    reader.read_ahead(EVERYTHING)
    time.sleep(0.5)
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    assert [bytes(image) for image in reader.read(EVERYTHING)] == local_bytes(shards)
    assert all_bytes(opened(store, tmp_path)) == local_bytes(shards)


def test_a_failed_whole_tar_ends_the_reader_in_one_line(store, tmp_path):
    split = opened(store, tmp_path, retries=1)
    store.faults, store.stays = [fails(503)], True
    reader = open_reader(split)
    reader.hold([0])
    with pytest.raises(ValueError, match=r"answered 503 .* last of 2 attempts"):
        reader.read(np.flatnonzero(split.samples["shard"] == 0))


def test_a_cache_too_small_for_whole_tars_is_named(store, tmp_path):
    reader = open_reader(opened(store, tmp_path, cache_gb=50_000 / 1e9))
    message = r"^data.stream.cache_gb is 5e-05; the 3 tars of two windows have 6.*e-05 GB and want 1.2 times as much: allow it"
    with pytest.raises(ValueError, match=message):
        reader.hold([0, 1, 2])


def test_a_full_disk_ends_whole_tars_in_one_line_and_ranges_go_on_without_the_cache(
    store, shards, tmp_path, monkeypatch
):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("data_shards.remote_cache.TarCache._put", full)
    reader = open_reader(opened(store, tmp_path))
    with pytest.warns(RuntimeWarning, match=r"^data.stream.cache_dir is not used any more: .*No space left on device$"):
        assert [bytes(image) for image in reader.read(EVERYTHING)] == local_bytes(shards)
    reader.hold([0])
    with pytest.raises(
        ValueError, match=r"^data.stream.cache_gb is 1: .* has no room for the tars of a window; allow more"
    ):
        reader.read(EVERYTHING)
