"""Runs such as training and evaluation leave them, made in a second: for the tests of the report."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import yaml
from torch.nn.functional import normalize

from trainer.evaluation.protocols import ProtocolConfig, closed_set, open_set
from trainer.evaluation.results import (
    FACESCALE,
    RAW_PIXELS,
    UNSEEN_IDENTITIES,
    UNSEEN_IMAGES,
    ResultRow,
    save_results,
)


def people(identities, images, spread, seed):
    generator = torch.Generator().manual_seed(seed)
    means = normalize(torch.randn(identities, 32, generator=generator), dim=1)
    ids = torch.arange(identities).repeat_interleave(images)
    noise = torch.randn(len(ids), 32, generator=generator) * spread / 32**0.5
    return normalize(means[ids] + noise, dim=1), ids


def evaluate(run, identities=24, images=8, config=None, margin=0.2, complete=True, spread=1.1, **saved):
    """Blobs on the sphere: ours tighter than raw pixels, training identities tighter than unseen ones.

    Args:
        complete: False leaves out bands, histograms and the accuracy of each identity, as an earlier version did.
        saved: further arguments of `save_results`.
    """
    config = config or ProtocolConfig()
    judged = {"margin": margin, "squared": False, "config": config}
    rows = []
    for embedder, wide in ((FACESCALE, spread), (RAW_PIXELS, 2.4)):
        unseen = people(identities, images, wide, seed=1)
        rows.append(ResultRow(UNSEEN_IDENTITIES, embedder, open_set(*unseen, **judged)))
        embeddings, ids = people(identities, 2 * images, wide * 0.85, seed=2)
        held_out = torch.arange(len(ids)) % 2 == 1
        sides = (embeddings[~held_out], ids[~held_out], embeddings[held_out], ids[held_out])
        rows.append(ResultRow(UNSEEN_IMAGES, embedder, closed_set(*sides, **judged)))
    rows = [row if complete else earlier(row) for row in sorted(rows, key=lambda row: row.set)]
    save_results(run / "evaluation", rows, *people(identities, images, spread, seed=1), **saved)
    return rows


def earlier(row: ResultRow) -> ResultRow:
    """As an earlier version of evaluation would have left it."""
    curves = {name: row.result.curves[name] for name in ("cmc", "roc_far", "roc_tar")}
    scalars = {name: value for name, value in row.result.scalars.items() if name != "verification_threshold"}
    return replace(row, result=replace(row.result, scalars=scalars, curves=curves))


def train(run: Path, steps=4000, log_every=10, evaluate_every=400, margin=0.2, speed=410):
    """A log such as training writes."""
    run.mkdir(parents=True)
    loss = {"kind": "margin", "margin": margin, "distance": "root"}
    config = {"model": {"trunk": "resnet50", "embedding_size": 128}, "loss": loss}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    noise = np.random.default_rng(0)
    with (run / "log.jsonl").open("w") as log:
        for step in range(log_every, steps + 1, log_every):
            gone = 1 - np.exp(-3 * step / steps)
            line = {"step": step, "epoch": step / 500, "images_seen": 256 * step, "learning_rate": 1e-3}
            line |= {"loss": 0.3 - 0.17 * gone + noise.normal(0, 0.01), "active_fraction": 0.98 - 0.7 * gone}
            line |= {"d_ap": 1.0 - 0.4 * gone + noise.normal(0, 0.02), "d_an": 0.8 + 0.15 * gone}
            line |= {"embedding_spread": 0.9 + 0.05 * gone, "effective_rank": 20 + 30 * gone}
            line |= {"images_per_s": speed + noise.normal(0, 5), "data_wait_percent": 2.0}
            line["loss_over_margin"] = line["loss"] / margin
            log.write(json.dumps(line) + "\n")
    with (run / "evaluations.jsonl").open("w") as log:
        for step in range(evaluate_every, steps + 1, evaluate_every):
            gone = 1 - np.exp(-4 * step / steps)
            line = {"step": step, "images_seen": 256 * step, "rank1": 0.2 + 0.5 * gone, "rank5": 0.4 + 0.5 * gone}
            line |= {"knn": 0.3 + 0.5 * gone, "verification_accuracy": 0.6 + 0.3 * gone}
            log.write(json.dumps(line | {"triplet_loss": 0.2 - 0.15 * gone}) + "\n")
