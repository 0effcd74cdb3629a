"""Embeddings on disk: whole, in order, gone on with, refused where they are of something else. Real ranks: tests/distributed."""

import errno
import json
import os

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from data_shards.index import ShardSet
from data_shards.loader import LoaderConfig
from trainer.evaluation import embedding_store
from trainer.evaluation.embed import embed, mirrored
from trainer.evaluation.embedding_store import Encoder, embed_to, folder_name, read_embeddings

LOADER = LoaderConfig(image_size=16, decode_threads=1)


def corners(images):
    """Unit vectors of three pixels' colours, which tell pictures and their mirror images apart."""
    return normalize(torch.cat([images[:, :, 0, 0], images[:, :, 2, 5], images[:, :, -1, 1]], 1).float() + 1)


class Counted:
    """`corners` that counts the images it has seen, and may stop as a kill would."""

    def __init__(self, stop_after=None):
        self.images, self.stop_after = 0, stop_after

    def __call__(self, images):
        if self.stop_after is not None and self.images >= self.stop_after:
            raise KeyboardInterrupt
        self.images += len(images)
        return corners(images)


def encoder(function=corners, **about):
    return Encoder(function, 9, LOADER, {"embedder": "corners", **about})


@pytest.fixture
def split(shards):
    return ShardSet.open(shards).split("train")


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch):
    monkeypatch.setattr(embedding_store, "BATCH", 4)


def store(folder, split, made=None, **options):
    return embed_to(folder, made or encoder(), split, fingerprint=split.fingerprint, **options)


def test_what_is_stored_is_what_is_embedded(split, tmp_path):
    found = store(tmp_path / "out", split)
    embeddings, identities = embed(corners, split, LOADER, batch_size=4)
    assert torch.equal(found.embeddings, embeddings)
    assert torch.equal(found.identities, identities)
    assert found.embeddings.dtype == torch.float32
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {"embeddings.json", "embeddings.npy", "identities.npy", "keys.txt"}
    assert torch.equal(torch.from_numpy(np.load(out / "embeddings.npy")), embeddings)
    assert (out / "keys.txt").read_text().splitlines() == [split.key(sample) for sample in range(len(split))]
    assert 1 < found.manifest["images_per_s"] < 1e6
    assert 0 <= found.manifest["data_wait_percent"] <= 100


def test_a_set_of_one_batch_has_a_pace(split, tmp_path):
    found = store(tmp_path / "out", split, samples=np.arange(3))
    assert 1 < found.manifest["images_per_s"] < 1e6
    assert 0 <= found.manifest["data_wait_percent"] <= 100


def test_some_samples_in_the_order_given(split, tmp_path):
    chosen = np.array([9, 2, 5, 30, 0])
    found = store(tmp_path / "out", split, samples=chosen)
    everything, identities = embed(corners, split, LOADER)
    assert torch.equal(found.embeddings, everything[chosen])
    assert torch.equal(found.identities, identities[chosen])
    assert (tmp_path / "out" / "keys.txt").read_text().splitlines() == [split.key(sample) for sample in chosen]


def test_half_precision(split, tmp_path):
    found = store(tmp_path / "out", split, dtype="fp16")
    assert found.embeddings.dtype == torch.float16
    assert torch.equal(found.embeddings, embed(corners, split, LOADER)[0].half())


def test_mirror_by_hand(split, tmp_path):
    found = store(tmp_path / "out", split, encoder(mirrored(corners)))
    plain = embed(corners, split, LOADER)[0]
    flipped = embed(lambda images: corners(images.flip(-1)), split, LOADER)[0]
    assert not torch.allclose(plain, flipped, atol=1e-3)
    assert torch.allclose(found.embeddings, normalize(plain + flipped), atol=1e-6)


def test_interrupted_it_goes_on_and_embeds_nothing_twice(split, tmp_path):
    """Batches are decoded in order, so what was not synced is at most a chunk."""
    out, first = tmp_path / "out", Counted(stop_after=12)
    with pytest.raises(KeyboardInterrupt):
        store(out, split, encoder(first))
    with pytest.raises(ValueError, match="holds no whole embeddings: embed again into it"):
        read_embeddings(out)
    done = int(np.fromfile(out / "done", np.uint8).sum())
    assert done == 3  # chunks of four
    second = Counted()
    found = store(out, split, encoder(second))
    assert second.images == len(split) - 12
    assert torch.equal(found.embeddings, embed(corners, split, LOADER, batch_size=4)[0])


def test_whole_embeddings_are_read_and_not_made_again(split, tmp_path):
    store(tmp_path / "out", split)
    again = Counted()
    store(tmp_path / "out", split, encoder(again))
    assert again.images == 0


@pytest.mark.parametrize(
    ("options", "made", "said"),
    [
        ({"dtype": "fp16"}, encoder(), "dtype was fp32, now it is fp16"),
        ({}, encoder(weights="b"), "weights was a, now it is b"),
        ({"samples": np.arange(3)}, encoder(weights="a"), "chosen was all, now it is "),
    ],
)
def test_a_folder_of_other_embeddings_is_refused_and_left_alone(split, tmp_path, options, made, said):
    out = tmp_path / "out"
    store(out, split, encoder(weights="a"))
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(ValueError, match=f"{out} holds other embeddings: {said}"):
        store(out, split, Encoder(made.function, 9, LOADER, {"weights": "a", **made.about}), **options)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_other_embeddings_are_replaced_where_that_is_asked_for(split, tmp_path):
    store(tmp_path / "out", split, encoder(weights="a"))
    found = store(tmp_path / "out", split, encoder(weights="b"), replace=True)
    assert found.manifest["weights"] == "b"


def test_a_folder_with_something_else_in_it_is_refused(split, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match=f"{tmp_path} exists and is not empty; choose another folder"):
        store(tmp_path, split)
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_names_tell_apart_what_must_be_told_apart(split):
    names = {
        folder_name(made, split, pictures, samples, dtype)
        for made in (encoder(), encoder(weights="b"))
        for pictures in ("one", "other")
        for samples in (None, np.arange(3), np.arange(4))
        for dtype in ("fp32", "fp16")
    }
    assert len(names) == 2 * 2 * 3 * 2


def test_an_embedding_that_is_not_finite_is_refused(split, tmp_path):
    made = encoder(lambda images: corners(images) * torch.nan)
    with pytest.raises(ValueError, match="4 embeddings hold NaN or infinity; the weights have diverged or are damaged"):
        store(tmp_path / "out", split, made)


def test_a_full_disk_is_one_line_and_can_be_gone_on_from(split, tmp_path, monkeypatch):
    """pwrite writes half of the third chunk, then nothing more, as on a full disk."""
    real, calls = os.pwrite, [0]

    def full(handle, data, at):
        if len(data) > 1:
            calls[0] += 1
            if calls[0] == 3:
                return real(handle, data[: len(data) // 2], at)
            if calls[0] > 3:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(handle, data, at)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(OSError, match=r"No space left on device: '.*embeddings\.npy'"):
            store(tmp_path / "out", split)
    second = Counted()
    found = store(tmp_path / "out", split, encoder(second))
    assert second.images == len(split) - 8
    assert torch.equal(found.embeddings, embed(corners, split, LOADER, batch_size=4)[0])


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda out: (out / "embeddings.json").write_text("{"), "embeddings.json is damaged: it is no JSON"),
        (lambda out: (out / "embeddings.json").write_text('{"format": "x"}'), "is not one of facescale's"),
        (lambda out: (out / "embeddings.json").unlink(), "holds no embeddings: it has no embeddings.json"),
        (lambda out: os.truncate(out / "embeddings.npy", 200), "is damaged"),
        (
            lambda out: np.save(out / "identities.npy", np.arange(2)),
            r"identities\.npy has shape \(2,\), embeddings\.json says",
        ),
    ],
)
def test_damage_is_named(split, tmp_path, damage, said):
    store(tmp_path / "out", split)
    damage(tmp_path / "out")
    with pytest.raises(ValueError, match=said):
        read_embeddings(tmp_path / "out")


def test_the_manifest_says_what_was_embedded(split, tmp_path):
    store(tmp_path / "out", split, encoder(weights="abc"))
    found = json.loads((tmp_path / "out" / "embeddings.json").read_text())
    assert (found["samples"], found["dimensions"], found["split"]) == (len(split), 9, "train")
    assert (found["weights"], found["pictures"], found["complete"]) == ("abc", split.fingerprint, True)
