"""Shards at a URL or on a slow disk: the same bytes as from a folder, or one clear line after the stated attempts."""

import gc
import subprocess
import sys
import threading
import time
from itertools import islice

import fsspec
import numpy as np
import pytest
from remote_sets import EVERYTHING, TOTAL, all_bytes, config_of, copies, local_bytes, opened
from store_server import drops, fails, lies, refuses, slow, stalls, truncates, well

from data_shards.augment import AugmentConfig
from data_shards.index import ShardSet
from data_shards.loader import LoaderConfig, training_loader
from data_shards.plan import Plan, PlanConfig
from data_shards.reader import TarReader, keys_of, open_reader
from data_shards.remote_ranges import Place, runs
from data_shards.remote_reader import RemoteReader
from data_shards.stream_config import StreamConfig

# the same bytes


@pytest.mark.parametrize("cache_gb", [0, 1])
@pytest.mark.parametrize("samples", [range(TOTAL), [39, 0, 7, 21], [4, 4, 4], [6], []])
def test_a_store_gives_the_bytes_of_the_folder_in_the_order_asked_for(store, shards, tmp_path, samples, cache_gb):
    ids = np.array(list(samples), np.int64)
    split = opened(store, tmp_path, cache_gb=cache_gb)
    assert isinstance(open_reader(split), RemoteReader)
    assert all_bytes(split, ids) == local_bytes(shards, ids)


def test_a_memory_store_and_a_cached_slow_disk_give_them_too(shards, tmp_path):
    memory = fsspec.filesystem("memory")
    memory.put(str(shards), "/facescale-remote", recursive=True)
    try:
        split = ShardSet.open("memory://facescale-remote", config_of(tmp_path / "a")).split("train")
        assert all_bytes(split) == local_bytes(shards)
    finally:
        memory.rm("/facescale-remote", recursive=True)
    split = ShardSet.open(shards, config_of(tmp_path / "b", cache_local=True)).split("train")
    assert isinstance(open_reader(split), RemoteReader)
    assert all_bytes(split) == local_bytes(shards)
    assert copies(tmp_path / "b")


def test_a_folder_is_mapped_as_ever_unless_the_cache_is_asked_for(shards, tmp_path):
    split = ShardSet.open(shards, config_of(tmp_path)).split("train")
    assert isinstance(open_reader(split), TarReader)
    assert not (tmp_path / "cache").exists()


def test_batches_are_those_of_the_folder_bit_for_bit(store, shards, tmp_path):
    plan_config = PlanConfig(identities_per_batch=4, images_per_identity=2)
    loader_config = LoaderConfig(image_size=32, decode_threads=1)

    def batches(split):
        plan = Plan(split.starts, plan_config, seed=3)
        loader = training_loader(split, plan, loader_config, AugmentConfig(), stop=2 * plan.steps_per_epoch)
        return [(batch.images.clone(), batch.identities, batch.samples, batch.colour) for batch in loader]

    here, there = batches(ShardSet.open(shards).split("train")), batches(opened(store, tmp_path))
    assert len(here) == len(there) > 6
    assert all(one.equal(other) for pair in zip(here, there, strict=True) for one, other in zip(*pair, strict=True))


def test_keys_come_with_the_pictures(store, shards, tmp_path):
    split = opened(store, tmp_path)
    expected = keys_of(ShardSet.open(shards).split("train"), EVERYTHING)
    assert keys_of(split, EVERYTHING) == expected == sorted(expected)
    requests = len(store.requests)
    assert [split.key(sample) for sample in (0, 17, 39)] == [expected[sample] for sample in (0, 17, 39)]
    assert len(store.requests) == requests


def test_a_key_alone_is_fetched_too(store, shards, tmp_path):
    assert opened(store, tmp_path, cache_gb=0).key(12) == ShardSet.open(shards).split("train").key(12)


# what is fetched, and how often


def test_what_was_read_once_comes_from_the_cache_also_for_another_process(store, shards, tmp_path):
    assert all_bytes(opened(store, tmp_path)) == local_bytes(shards)
    fetched = len(store.asked(".tar"))
    split = opened(store, tmp_path)
    reader = open_reader(split)
    assert [bytes(image) for image in reader.read(EVERYTHING)] == local_bytes(shards)
    assert (len(store.asked(".tar")), reader.ranges.requests, reader.ranges.hits) == (fetched, 0, TOTAL)


def test_small_files_are_fetched_once_and_the_manifest_each_time(store, tmp_path):
    for _ in range(3):
        opened(store, tmp_path)
    assert [len(store.asked(name)) for name in ("manifest.json", "index.npy", "identities.npy")] == [3, 1, 1]


def test_neighbours_are_fetched_as_one_range(store, shards, tmp_path):
    reader = open_reader(opened(store, tmp_path))
    reader.read(EVERYTHING)
    assert reader.ranges.requests == len(ShardSet.open(shards).split("train").shards)


def test_runs_by_hand():
    places = [Place(0, 10, 0, 0), Place(12, 20, 0, 1), Place(30, 40, 0, 2), Place(40, 45, 0, 3)]

    def found(gap, most):
        return [[place.sample for place in run] for run in runs(places, gap, most)]

    assert found(2, 100) == [[0, 1], [2, 3]]
    assert found(1, 100) == [[0], [1], [2, 3]]
    assert found(10, 100) == [[0, 1, 2, 3]]
    assert found(10, 40) == [[0, 1, 2], [3]]
    assert found(100, 1) == [[0], [1], [2], [3]]
    assert list(runs([], 5)) == []


def test_what_was_read_ahead_is_not_fetched_again_and_is_let_go_of(store, shards, tmp_path):
    reader = open_reader(opened(store, tmp_path, cache_gb=0, coalesce_kb=0))
    first, second = np.array([3, 1, 3, 20]), np.array([20, 8])
    for samples in (first, second):
        reader.read_ahead(samples)
    assert [bytes(image) for image in reader.read(first)] == local_bytes(shards, first)
    assert [bytes(image) for image in reader.read(second)] == local_bytes(shards, second)
    assert reader.ranges.requests == 4
    assert not reader._ahead
    assert not reader._wanted
    reader.read(first)
    assert reader.ranges.requests == 7


def test_reading_ahead_does_not_wait(store, tmp_path):
    reader = open_reader(opened(store, tmp_path))
    store.faults, store.stays = [slow(0.4)], True
    begun = time.monotonic()
    reader.read_ahead(EVERYTHING)
    assert time.monotonic() - begun < 0.2
    reader.read(EVERYTHING)
    assert time.monotonic() - begun > 0.4


def test_a_set_that_is_let_go_of_ends_its_threads(store, tmp_path):
    before = set(threading.enumerate())

    def of_the_set():
        return [t for t in threading.enumerate() if t not in before and t.name == "facescale-fetch" and t.is_alive()]

    split = opened(store, tmp_path)
    reader = open_reader(split)
    reader.hold([0, 1])
    reader.read(EVERYTHING)
    assert len(of_the_set()) > 3
    del split, reader
    gc.collect()
    patience = time.monotonic() + 5
    while of_the_set() and time.monotonic() < patience:
        time.sleep(0.02)
    assert not of_the_set()


# faults


FAULTS = {
    "500": fails(500),
    "503": fails(503),
    "429": fails(429),
    "drops": drops,
    "truncates": truncates,
    "lies": lies,
    "refuses": refuses,
    "stalls": stalls(1.5),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_store_that_fails_now_and_then_costs_further_attempts_alone(store, shards, tmp_path, name):
    split = opened(store, tmp_path, retries=3, timeout_s=0.5, connections=1)
    store.faults = [FAULTS[name], well, FAULTS[name], FAULTS[name], FAULTS[name]]
    assert all_bytes(split) == local_bytes(shards)
    assert not store.faults


SAID = {
    "500": "the server answered 500 Internal Server Error",
    "503": "the server answered 503 Service Unavailable",
    "429": "the server answered 429 Too Many Requests",
    "drops": "ClientPayloadError ",
    "truncates": r"[\d,]+ bytes came instead of [\d,]+",
    "lies": r"1 of \d+ pictures differ from the index \(CRC-32\)",
    "refuses": "ServerDisconnectedError Server disconnected",
    "stalls": r"nothing whole came within 0.3 s \(data.stream.timeout_s\)",
}


@pytest.mark.parametrize("retries", [0, 2])
@pytest.mark.parametrize("name", FAULTS)
def test_a_store_that_goes_on_failing_ends_in_one_line_after_the_stated_attempts(store, tmp_path, name, retries):
    split = opened(store, tmp_path, retries=retries, timeout_s=0.3)
    store.faults, store.stays = [FAULTS[name]], True
    sample = np.array([11])
    before = len(store.asked(".tar"))
    file = f"train/{split.shards[split.samples['shard'][11]].name}"
    message = (
        rf"^{store.url}/{file}, bytes [\d,]+ to [\d,]+: {SAID[name]}.*; that was the last of {retries + 1} attempts in "
        rf"\d+\.\d s \(data.stream.retries is {retries}\)$"
    )
    with pytest.raises(ValueError, match=message) as raised:
        open_reader(split).read(sample)
    assert "\n" not in str(raised.value)
    own = 2 if name == "refuses" else 1  # aiohttp asks once more by itself when a connection ends before any answer
    assert len(store.asked(".tar")) - before == own * (retries + 1)
    assert not copies(tmp_path)


def test_pauses_double_and_are_drawn_from_their_upper_half(store, tmp_path, monkeypatch):
    split = opened(store, tmp_path, retries=9, backoff_s=0.5)
    pauses = []
    monkeypatch.setattr("data_shards.remote_fetch.time.sleep", pauses.append)
    store.faults, store.stays = [fails(503)], True
    with pytest.raises(ValueError, match="last of 10 attempts"):
        open_reader(split).read(np.array([1]))
    for pause, longest in zip(pauses, [0.5, 1, 2, 4, 8, 16, 30, 30, 30], strict=True):
        assert longest / 2 <= pause <= longest


def test_a_slow_disk_that_hangs_counts_as_a_stall(shards, tmp_path, monkeypatch):
    split = ShardSet.open(shards, config_of(tmp_path, cache_local=True, retries=1, timeout_s=0.2)).split("train")
    hangs = threading.Event()
    monkeypatch.setattr(split.remote.fetcher._system, "cat_file", lambda *_, **__: hangs.wait(20))
    with pytest.raises(ValueError, match=r"nothing whole came within 0.2 s .* the last of 2 attempts in 0\.[4-9] s"):
        open_reader(split).read(np.array([1]))
    hangs.set()


ENDS = """
import sys, numpy as np
from pathlib import Path
from data_shards.index import ShardSet
from data_shards.reader import open_reader
from data_shards.stream_config import StreamConfig
stream = StreamConfig(cache_dir=Path(sys.argv[2]), timeout_s=10, retries=5, backoff_s=5)
reader = open_reader(ShardSet.open(sys.argv[1], stream).split("train"))
reader.hold([0, 1])
reader.read_ahead(np.arange(40))
print("ends", flush=True)
"""


def test_attempts_under_way_do_not_keep_a_process_from_ending(store, tmp_path):
    store.faults, store.stays = [stalls(20)], True
    command = [sys.executable, "-c", ENDS, store.url, str(tmp_path / "cache")]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "ends\n"
    assert child.wait(timeout=8) == 0
    child.stdout.close()


@pytest.mark.parametrize(
    ("status", "said"), [(403, "the server answered 403 Forbidden"), (404, "there is no such file")]
)
def test_what_another_attempt_cannot_mend_is_tried_once(store, tmp_path, status, said):
    split = opened(store, tmp_path)
    store.faults, store.stays = [fails(status)], True
    before = len(store.requests)
    with pytest.raises(ValueError, match=rf"bytes [\d,]+ to [\d,]+: {said}$"):
        open_reader(split).read(np.array([1]))
    assert len(store.requests) == before + 1


def test_a_server_without_ranges_is_named(store, tmp_path):
    split = opened(store, tmp_path, retries=1)
    store.ranges = False
    with pytest.raises(ValueError, match="does the server answer Range requests"):
        open_reader(split).read(np.array([1]))


def test_a_fault_in_the_middle_of_training_comes_out_of_the_loader_as_it_is(store, tmp_path):
    split = opened(store, tmp_path, retries=1, read_ahead_batches=1)
    plan = Plan(split.starts, PlanConfig(identities_per_batch=4, images_per_identity=2))
    for decoder in ("libjpeg", "dali"):
        store.faults, store.stays = [], False
        loader_config = LoaderConfig(image_size=32, decode_threads=1, decoder=decoder)
        loader = training_loader(split, plan, loader_config, AugmentConfig())
        next(loader)
        for copy in copies(tmp_path):
            copy.unlink()
        store.faults, store.stays = [fails(500)], True
        with pytest.raises(ValueError, match=r"answered 500 .* last of 2 attempts"):
            list(islice(loader, 50))


@pytest.mark.parametrize("name", ["500", "drops", "truncates", "lies", "stalls"])
def test_the_small_files_are_tried_again_too(store, shards, tmp_path, name):
    store.pattern, store.faults = r"\.(json|npy)$", [FAULTS[name], FAULTS[name], well, FAULTS[name]]
    split = opened(store, tmp_path, timeout_s=0.5)
    assert split.samples.tobytes() == ShardSet.open(shards).split("train").samples.tobytes()


def test_an_index_of_another_set_ends_in_one_line(store, tmp_path):
    store.pattern, store.faults, store.stays = r"index\.npy$", [lies], True
    with pytest.raises(ValueError, match=rf"^{store.url}/index.npy is not the file that its manifest names .* 3 times"):
        opened(store, tmp_path, retries=2)
    assert not list(tmp_path.rglob("index.npy*"))


def test_a_url_without_a_set_and_an_unknown_scheme_are_refused(store, tmp_path):
    with pytest.raises(ValueError, match=rf"^{store.url}/none/manifest.json: there is no such file$"):
        ShardSet.open(f"{store.url}/none", config_of(tmp_path))
    with pytest.raises(ValueError, match="is not a URL that we read"):
        ShardSet.open("pipe://cat", config_of(tmp_path))


def test_a_cache_folder_that_cannot_be_is_named(store, tmp_path):
    (tmp_path / "cache").write_text("")
    with pytest.raises(ValueError, match=rf"^data.stream.cache_dir {tmp_path}/cache cannot be written to"):
        opened(store, tmp_path)


@pytest.mark.parametrize(
    ("name", "value"),
    [("cache_gb", -1), ("cache_gb", float("nan")), ("retries", -1), ("timeout_s", 0), ("connections", 0)],
)
def test_settings_outside_their_range_are_refused(name, value):
    with pytest.raises(ValueError, match=f"^data.stream.{name} is {value}; allowed is "):
        StreamConfig(**{name: value})
