"""`facescale shards forget` with embeddings beside the shards; what is left trains and is evaluated."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from data_shards import replacing
from data_shards.convert import ConvertConfig, convert
from data_shards.index import ShardSet
from data_shards.synthetic import synthesize
from trainer import forget_embeddings, load_embedder
from trainer.cli import main
from trainer.evaluation.embedding_store import read_embeddings
from trainer.photos import embed_photos, read_gallery

pytestmark = pytest.mark.usefixtures("fresh_accelerate")
TRAIN = "--data.image-size 32 --model.trunk resnet18 --plan.identities-per-batch 4 --plan.images-per-identity 2 --run.steps 2 "
TRAIN += "--model.embedding-size 16 --run.device cpu --run.precision fp32 --run.no-tensorboard"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """faces, shards, a run, embeddings of two splits, a gallery of the faces."""
    root = tmp_path_factory.mktemp("made")
    synthesize(root / "faces", identities=14, images_per_identity=4, size=40, seed=3, workers=1)
    (sorted((root / "faces").iterdir())[0] / "bad.jpg").write_text("no picture")
    convert(root / "faces", root / "shards", ConvertConfig(holdout_identities=6, holdout_images=1, workers=1))
    with pytest.MonkeyPatch.context() as environment:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            environment.delenv(name, raising=False)
        assert main(f"train --data.shards {root}/shards --run.folder {root}/run {TRAIN}".split()) == 0
        for split in ("train", "unseen_identities"):
            assert main(f"embed {root}/run {root}/{split} --split {split} --device cpu".split()) == 0
    embed_photos(root / "faces", root / "gallery", load_embedder(root / "run", device="cpu"))
    return root


@pytest.fixture
def copy(made, tmp_path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "copy"))


def people(made: Path, split: str, count: int) -> list[str]:
    shards = ShardSet.open(made / "shards")
    return [shards.identity_names[label] for label in shards.split(split).identities[:count]]


def test_rows_names_and_pictures_go_everywhere_and_the_rest_trains(copy, capsys):
    names = [*people(copy, "train", 2), *people(copy, "unseen_identities", 1)]
    first = sorted((copy / "faces").iterdir())[0].name
    names += [first] * (first not in names)
    before = {split: read_embeddings(copy / split) for split in ("train", "unseen_identities")}
    keys = {split: (copy / split / "keys.txt").read_text().split() for split in before}
    rows = {split: stored.embeddings.numpy().copy() for split, stored in before.items()}
    gallery = read_gallery(copy / "gallery")
    of_gallery = {key: row.copy() for key, row in zip(gallery.keys, gallery.embeddings, strict=True)}
    del before, gallery
    (copy / "gallery" / "embeddings.raw").write_bytes(
        next(iter(of_gallery.values())).tobytes()
    )  # left by a kill at the end
    folders = [str(copy / name) for name in ("train", "unseen_identities", "gallery")]
    capsys.readouterr()
    assert main(["shards", "forget", str(copy / "shards"), *names, "--embeddings", *folders]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith(f"{4 * len(names)} pictures of {len(names)} identities taken out of ")
    assert said[0].split("; ")[1].endswith(" rows out of embeddings")
    assert said[-1] == f"{copy}/shards: all as the manifest says"
    for split, was in keys.items():
        kept = [place for place, key in enumerate(was) if key.split("/")[0] not in names]
        assert 0 < len(kept) < len(was)
        stored = read_embeddings(copy / split)
        np.testing.assert_array_equal(stored.embeddings.numpy(), rows[split][kept])
        assert (copy / split / "keys.txt").read_text().split() == [was[place] for place in kept]
        names_left = [ShardSet.open(copy / "shards").identity_names[label] for label in stored.identities.tolist()]
        assert names_left == [was[place].split("/")[0] for place in kept]
    found = read_gallery(copy / "gallery")
    assert list(found.keys) == [key for key in of_gallery if key.split("/")[0] not in names]
    np.testing.assert_array_equal(found.embeddings, np.stack([of_gallery[key] for key in found.keys]))
    assert [found.names[label] for label in found.identities] == [key.split("/")[0] for key in found.keys]
    assert not (copy / "gallery" / "embeddings.raw").exists()
    assert found.skipped == 0, "the picture that could not be read was of one of them"
    for folder in ("shards", "train", "unseen_identities", "gallery"):
        for path in (copy / folder).rglob("*"):
            assert not path.is_file() or not any(name.encode() in path.read_bytes() for name in names), path
    assert main(f"train --data.shards {copy}/shards --run.folder {copy}/again {TRAIN}".split()) == 0
    assert main(f"evaluate {copy}/again --knn 1 --device cpu".split()) == 0


def test_embeddings_that_are_not_whole_are_refused_before_anything_changes(copy, capsys):
    (name,) = people(copy, "train", 1)
    manifest = json.loads((copy / "train" / "embeddings.json").read_text())
    (copy / "train" / "embeddings.json").write_text(json.dumps(manifest | {"complete": False}))
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*")}
    folders = [str(copy / "gallery"), str(copy / "train")]
    assert main(["shards", "forget", str(copy / "shards"), name, "--embeddings", *folders]) == 1
    assert "holds no whole embeddings" in capsys.readouterr().err
    assert main(["shards", "forget", str(copy / "shards"), "nobody", "--embeddings", folders[0]]) == 1
    assert "has no identity 'nobody'; nothing was changed" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in copy.rglob("*")} == before


def test_killed_in_embeddings_or_shards_the_same_command_goes_on(copy, monkeypatch, capsys):
    (name,) = people(copy, "train", 1)
    words = ["shards", "forget", str(copy / "shards"), name, "--embeddings", str(copy / "gallery"), str(copy / "train")]
    replace, moves = os.replace, []

    class Killed(BaseException):
        pass

    def counted(old, new):
        if ".forget" in str(old) and ".forget" not in str(new):
            moves.append(new)
            if len(moves) == last:
                raise Killed
        return replace(old, new)

    monkeypatch.setattr(os, "replace", counted)
    kills, last = 0, 2
    while True:
        moves.clear()
        try:
            assert main(words) == 0
            break
        except Killed:
            kills += 1
            last += 1
            closed = [folder for folder in ("gallery", "train", "shards") if replacing.is_interrupted(copy / folder)]
            assert len(closed) == 1
            if closed == ["gallery"]:
                with pytest.raises(ValueError, match="the same command goes on"):
                    read_gallery(copy / "gallery")
            if closed == ["train"]:
                with pytest.raises(ValueError, match="the same command goes on"):
                    read_embeddings(copy / "train")
    assert kills >= 3
    assert name not in read_gallery(copy / "gallery").names
    assert name not in ShardSet.open(copy / "shards").identity_names
    assert not any(
        name in path.read_text() for path in copy.glob("*/keys.txt") if path.parent.name != "unseen_identities"
    )
    assert "all as the manifest says" in capsys.readouterr().out


def test_a_name_that_embeddings_do_not_have_takes_no_row(copy):
    assert forget_embeddings.forget_embeddings(copy / "gallery", {"nobody": 10**6}) == 0
    assert forget_embeddings.forget_embeddings(copy / "train", {"nobody": 10**6}) == 0
