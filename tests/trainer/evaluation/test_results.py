import json
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from tests.trainer.evaluation.report.fake_runs import evaluate, people
from trainer.evaluation.examples import find_examples, shown_samples
from trainer.evaluation.protocols import SetResult
from trainer.evaluation.results import FACESCALE, ResultRow, load_results, replaced_folder, save_results
from trainer.evaluation.thumbnails import thumbnails

LFW = ResultRow("LFW", FACESCALE, SetResult({"verification_accuracy": 0.99}, {"roc_far": np.array([0.0, 1.0])}))


def test_results_come_back_as_they_were_saved(tmp_path):
    rows = evaluate(tmp_path)
    found = load_results(tmp_path / "evaluation")
    assert [(row.set, row.embedder) for row in found.rows] == [(row.set, row.embedder) for row in rows]
    for before, after in zip(rows, found.rows, strict=True):
        assert after.result.scalars == before.result.scalars
        assert after.result.curves.keys() == before.result.curves.keys() >= {"cmc", "roc_far", "roc_tar"}
        for name, curve in before.result.curves.items():
            np.testing.assert_array_equal(after.result.curves[name], curve)
    embeddings, identities = people(24, 8, 1.1, seed=1)
    assert torch.equal(found.embeddings, embeddings)
    assert torch.equal(found.identities, identities)
    assert (found.examples, found.names, found.keys, found.thumbnails) == (None, {}, {}, {})


def test_with_a_split_come_examples_names_keys_and_thumbnails(held_out, tmp_path):
    split = held_out.split("unseen_identities")
    evaluate(tmp_path, split=split, names=held_out.identity_names)
    found = load_results(tmp_path / "evaluation")
    assert found.examples == find_examples(*people(24, 8, 1.1, seed=1))
    shown = found.examples.positions() | set(shown_samples(found.identities.numpy()).tolist())
    assert found.thumbnails.keys() == found.keys.keys() == shown
    assert found.names == dict(enumerate(held_out.identity_names[:24]))
    place = found.examples.impostor[0].second
    assert found.keys[place] == split.key(place)
    assert found.thumbnails[place] == thumbnails(split, np.array([place]))[0]
    assert Image.open(BytesIO(found.thumbnails[place])).size == (24, 16)


def test_samples_say_which_rows_of_the_split_were_embedded(held_out, tmp_path):
    split = held_out.split("unseen_identities")
    embeddings, identities = people(4, 3, 1.0, seed=0)
    samples = np.arange(len(split))[::-1][:12]
    save_results(tmp_path / "evaluation", [LFW], embeddings, identities, split=split, samples=samples)
    found = load_results(tmp_path / "evaluation")
    assert found.keys == {place: split.key(int(samples[place])) for place in range(12)}
    assert found.names == {}
    with pytest.raises(ValueError, match="192 samples of the split and 12 embeddings"):
        save_results(tmp_path / "evaluation", [LFW], embeddings, identities, split=split)
    assert load_results(tmp_path / "evaluation").keys == found.keys


def test_a_picture_that_does_not_decode_is_left_out(held_out, tmp_path, monkeypatch):
    monkeypatch.setattr("trainer.evaluation.results.thumbnails", lambda split, samples: [None] * len(samples))
    evaluate(tmp_path, split=held_out.split("unseen_identities"))
    found = load_results(tmp_path / "evaluation")
    assert found.thumbnails == {}
    assert len(found.keys) > 100


@pytest.mark.parametrize("embeddings", [None, torch.empty(0, 2)])
def test_results_of_pair_lists_alone_have_no_embeddings(tmp_path, embeddings):
    identities = None if embeddings is None else torch.empty(0, dtype=torch.int64)
    save_results(tmp_path / "evaluation", [LFW], embeddings, identities)
    found = load_results(tmp_path / "evaluation")
    assert found.embeddings is None
    assert [row.set for row in found.rows] == ["LFW"]


def test_a_damaged_list_of_examples_is_told(pictured, tmp_path):
    folder = tmp_path / "evaluation"
    folder.mkdir()
    for name in ("results.json", "curves.npz", "embeddings.npz"):
        (folder / name).write_bytes((pictured / "evaluation" / name).read_bytes())
    (folder / "examples.json").write_text(json.dumps({"examples": []}))
    with pytest.raises(ValueError, match=r"evaluation is damaged .*facescale evaluate"):
        load_results(folder)


def test_a_failed_write_leaves_the_earlier_folder(tmp_path):
    folder = tmp_path / "report"
    with replaced_folder(folder) as partial:
        (partial / "a").write_text("whole")

    def fail():
        with replaced_folder(folder) as partial:
            (partial / "a").write_text("half")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert (folder / "a").read_text() == "whole"
    assert [path.name for path in tmp_path.iterdir()] == ["report"]


def test_a_set_may_have_any_name_but_none_and_an_embedder_is_one_of_two():
    assert ResultRow("cfp_fp", FACESCALE, SetResult({})).set == "cfp_fp"
    with pytest.raises(ValueError, match="a result's set has no name"):
        ResultRow(" ", FACESCALE, SetResult({}))
    with pytest.raises(ValueError, match="a result's embedder is 'mine'; allowed are facescale, raw pixels"):
        ResultRow("LFW", "mine", SetResult({}))
