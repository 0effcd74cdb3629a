"""Training's parts that need no launcher: schedule, optimiser, run folder, exit codes."""

import dataclasses
import math
import os

import pytest
import torch
from torch import nn

from data_shards.convert import ConvertConfig, convert
from data_shards.loader import Batch
from tests.data_shards.collections_on_disk import every_file
from tests.trainer.metric import oracle
from trainer import checkpoint
from trainer.config import (
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    PlanConfig,
    RunConfig,
    TrainConfig,
    save,
)
from trainer.engine import PlainEngine
from trainer.train import (
    check_folder,
    learning_rate,
    main,
    make_accelerator,
    make_folder,
    make_optimizer,
    set_learning_rate,
)
from trainer.train_step import TrainStep


@pytest.mark.parametrize(
    ("warmup", "steps", "step", "share"),
    [
        (4, 12, 1, 0.25),
        (4, 12, 3, 0.75),
        (4, 12, 4, 1.0),
        (4, 12, 5, 1.0),
        (4, 12, 7, 0.5 * (1 + 0.5**0.5)),  # a quarter down: cos 45 degrees
        (4, 12, 9, 0.5),
        (4, 12, 11, 0.5 * (1 - 0.5**0.5)),
        (0, 4, 1, 1.0),
        (0, 4, 2, 0.5 * (1 + 0.5**0.5)),
        (0, 4, 3, 0.5),
        (0, 1, 1, 1.0),  # the last step learns, too
        (10, 5, 5, 0.5),  # stopped in its warm-up
        (5, 5, 5, 1.0),
        (4, 12, 13, 0.0),  # behind the end it stays down
    ],
)
def test_learning_rate_by_hand(warmup, steps, step, share):
    config = OptimizerConfig(learning_rate=0.4, warmup_steps=warmup)
    assert learning_rate(config, step, steps) == pytest.approx(0.4 * share, abs=1e-16)


def test_learning_rate_is_set_in_every_group():
    config = OptimizerConfig(learning_rate=0.4, warmup_steps=4)
    optimizer = make_optimizer(nn.Linear(2, 2), config)
    assert set_learning_rate(optimizer, config, 1, 12) == 0.1
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.1]


def test_adamw():
    model = nn.Linear(2, 2)
    optimizer = make_optimizer(model, OptimizerConfig(kind="adamw", learning_rate=0.3, weight_decay=0.2, momentum=0.8))
    assert type(optimizer) is torch.optim.AdamW
    decayed, others = optimizer.param_groups
    assert (decayed["lr"], decayed["betas"]) == (0.3, (0.8, 0.999))
    assert decayed["params"][0] is model.weight
    assert others["params"][0] is model.bias
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.2, 0)


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.9, True), (0.0, False)])
def test_sgd(momentum, nesterov):
    optimizer = make_optimizer(nn.Linear(2, 2), OptimizerConfig(kind="sgd", momentum=momentum, weight_decay=0.1))
    assert type(optimizer) is torch.optim.SGD
    for group, decay in zip(optimizer.param_groups, (0.1, 0), strict=True):
        assert (group["momentum"], group["nesterov"], group["weight_decay"]) == (momentum, nesterov, decay)


class Table(nn.Module):
    """Embeds picture i as row i of a table of points on the circle, given in degrees."""

    def __init__(self, degrees: list[float]) -> None:
        super().__init__()
        self.angles = nn.Parameter(torch.tensor(degrees, dtype=torch.float64).deg2rad())

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.stack([self.angles[rows].cos(), self.angles[rows].sin()], 1)


# Chords of the hardest triplets: d_ap 60, 60, 90, 90 degrees; d_an 60, 120, 60, 150 degrees.
DEGREES, IDENTITIES = [60, 0, 120, 210], [0, 0, 1, 1]
HARDEST = [(60, 60), (60, 120), (90, 60), (90, 150)]


def expected_step(kind: str) -> tuple[float, int]:
    """Sum and active count over the four anchors, from `HARDEST`."""
    chord = {angle: 2 * math.sin(math.radians(angle) / 2) for angle in (60, 90, 120, 150)}
    difference = [chord[positive] - chord[negative] for positive, negative in HARDEST]
    if kind == "soft_margin":
        return sum(math.log(1 + math.exp(x)) for x in difference), 4
    losses = [max(0.0, x + 0.2) for x in difference]
    return sum(losses), sum(loss > 0 for loss in losses)


def step_of(model: nn.Module, optimizer: torch.optim.Optimizer, **loss) -> TrainStep:
    plan = PlanConfig(identities_per_batch=2, images_per_identity=2)
    config = dataclasses.replace(TrainConfig(), loss=LossConfig(**loss), plan=plan)
    return TrainStep(PlainEngine(model, optimizer), config)


def batch_of(identities: list[int]) -> Batch:
    rows = torch.arange(len(identities))
    return Batch(rows, torch.tensor(identities), rows)


def fused(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=rate, momentum=0.5, fused=True)


@pytest.mark.parametrize("kind", ["margin", "soft_margin"])
def test_a_step_divides_the_sum_by_the_active_count_and_updates_once(kind):
    model = Table(DEGREES)
    before = model.angles.detach().clone()
    stats = step_of(model, fused(model, 0.01), kind=kind, margin=0.2)(batch_of(IDENTITIES))
    total, active = expected_step(kind)
    assert (stats.loss_sum.item(), stats.active.item()) == (pytest.approx(total, abs=1e-12), active)
    assert active == {"margin": 2, "soft_margin": 4}[kind]
    assert stats.flags.tolist() == [0, 0, 0]
    assert not stats.loss_sum.requires_grad
    assert model.angles.grad is None

    def loss_of(angles: torch.Tensor) -> torch.Tensor:
        points = torch.stack([angles.cos(), angles.sin()], 1)
        return oracle.loss_of(points, IDENTITIES, "batch_hard", None if kind == "soft_margin" else 0.2, False)[0]

    (gradient,) = torch.autograd.grad(loss_of(before.requires_grad_()), before)
    torch.testing.assert_close(model.angles.detach(), before.detach() - 0.01 * gradient / active, rtol=0, atol=1e-14)
    assert gradient.any()


def test_a_step_in_which_no_triplet_is_active_changes_nothing():
    model = Table([0, 1, 180, 181])
    before = model.angles.detach().clone()
    stats = step_of(model, fused(model, 1), kind="margin", margin=0.2)(batch_of(IDENTITIES))
    assert (stats.active, stats.loss_sum) == (0, 0)
    assert torch.equal(model.angles, before)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("kind", ["smooth", "margin", "soft_margin"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("memory", [0, 6])
def test_embeddings_that_are_not_finite_change_nothing(memory, optimizer, kind, bad):
    """Neither weights, nor the optimiser's state, nor running statistics, nor what is remembered; the next batch is learned from
    as if nothing was."""

    class Odd(Table):
        def __init__(self) -> None:
            super().__init__(DEGREES)
            self.norm = nn.BatchNorm1d(2, affine=False).double()

        def forward(self, rows: torch.Tensor) -> torch.Tensor:
            points = super().forward(rows)
            self.norm(points + self.add)
            return points + self.add

    def trained(adds: list[float]) -> tuple[Odd, list]:
        model = Odd()
        settings = OptimizerConfig(kind=optimizer, learning_rate=0.01, momentum=0.5)
        step = step_of(model, make_optimizer(model, settings), kind=kind, memory=memory, memory_start=0)
        flags = []
        for model.add in adds:
            flags.append(step(batch_of(IDENTITIES)).flags.tolist())
        return model, flags

    ours, flags = trained([0.0, bad, 0.0])
    theirs, _ = trained([0.0, 0.0])
    assert flags == [[0, 0, 0], [1, 0, 2], [0, 0, 0]]
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, value in ours.state_dict().items():
        assert name == "norm.num_batches_tracked" or torch.equal(value, theirs.state_dict()[name]), name


def test_a_gradient_that_is_not_finite_changes_nothing():
    model = Table(DEGREES)
    model.angles.register_hook(lambda gradient: gradient * math.nan)
    before = model.angles.detach().clone()
    stats = step_of(model, fused(model, 0.1), kind="smooth")(batch_of(IDENTITIES))
    assert stats.flags.tolist() == [1, 0, 0]
    assert torch.equal(model.angles, before)


def test_gradients_are_clipped_to_the_norm_that_is_asked_for():
    changes = []
    for clip in (0.0, 0.5, 1e-3):
        model = Table(DEGREES)
        before = model.angles.detach().clone()
        engine = PlainEngine(model, fused(model, 1.0), clip)
        (model(torch.arange(4)).sum() * 3).backward()
        assert engine.update(torch.tensor(0.0)) == 0
        changes.append((model.angles.detach() - before).norm().item())
    assert changes[0] > 1
    assert changes[1:] == pytest.approx([0.5, 1e-3], rel=1e-4)


def test_being_asked_to_stop_is_passed_on():
    model = Table(DEGREES)
    assert step_of(model, fused(model, 0.1))(batch_of(IDENTITIES), 1, asked_to_stop=True).flags.tolist() == [0, 1, 0]


def config_at(folder, **changed) -> TrainConfig:
    run = RunConfig(folder=folder, **changed.pop("run", {}))
    return dataclasses.replace(TrainConfig(), run=run, **changed)


def refusal(call, *args) -> str:
    with pytest.raises(ValueError, match=r".") as refused:
        call(*args)
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_run_folder_with_something_in_it_is_refused_and_stays(tmp_path, kind):
    folder = tmp_path / "run"
    if kind == "folder":
        folder.mkdir()
        (folder / "mine.txt").write_text("keep")
    else:
        folder.write_text("keep")
    before = every_file(tmp_path)
    said = refusal(check_folder, config_at(folder))
    assert said == f"run folder {folder} exists and is not empty; choose another run.folder or say --run.resume"
    assert every_file(tmp_path) == before


def test_looking_at_a_new_run_folder_makes_nothing(tmp_path):
    check_folder(config_at(tmp_path / "a" / "run"))
    assert list(tmp_path.iterdir()) == []


def test_the_run_folder_is_made_with_its_settings(tmp_path):
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "a" / "run", tmp_path / "empty"):
        config = config_at(folder)
        check_folder(config)
        make_folder(config)
        assert [path.name for path in folder.iterdir()] == ["config.yaml"]
        check_folder(config_at(folder, run={"resume": True}))  # and it is one to resume


def test_resuming_leaves_the_settings_of_the_first_start(tmp_path):
    make_folder(config_at(tmp_path / "run"))
    before = every_file(tmp_path)
    make_folder(config_at(tmp_path / "run", run={"resume": True, "log_every": 3}))
    assert every_file(tmp_path) == before


def test_resuming_what_is_no_run_is_refused(tmp_path):
    said = refusal(check_folder, config_at(tmp_path / "run", run={"resume": True}))
    assert said == f"cannot resume {tmp_path}/run: there is no run, it has no config.yaml"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"plan": PlanConfig(images_per_identity=3)}, ["images_per_identity=4", "images_per_identity=3"]),
        ({"model": ModelConfig(trunk="resnet18")}, ["trunk='resnet50'", "trunk='resnet18'"]),
        ({"loss": LossConfig(distance="squared")}, ["distance='root'", "distance='squared'"]),
        ({"optimizer": OptimizerConfig(learning_rate=0.5)}, ["learning_rate=0.001", "learning_rate=0.5"]),
        ({"run": {"seed": 1}}, ["run.seed was 0, now 1"]),
        ({"run": {"steps": 9}}, ["run.steps was None, now 9"]),
        ({"run": {"epochs": 9}}, ["run.epochs was 20, now 9"]),
    ],
)
def test_resuming_with_other_settings_names_them(tmp_path, changed, named):
    folder = tmp_path / "run"
    folder.mkdir()
    save(config_at(folder), folder / "config.yaml")
    run = {"resume": True} | changed.get("run", {})
    said = refusal(check_folder, config_at(folder, **(changed | {"run": run})))
    assert said.startswith(f"cannot resume {folder}: ")
    assert all(word in said for word in named)


def test_resuming_may_change_what_does_not_change_the_training(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    save(config_at(folder), folder / "config.yaml")
    other = {"log_every": 1, "checkpoint_every": 7, "keep_checkpoints": 9, "tensorboard": False, "evaluate_every": 5}
    check_folder(config_at(folder, run={"resume": True} | other))


@pytest.mark.usefixtures("fresh_accelerate")
def test_the_accelerator_leaves_precision_to_the_model(tmp_path):
    accelerator = make_accelerator(RunConfig(folder=tmp_path / "run", precision="bf16", device="cpu"))
    assert (accelerator.mixed_precision, accelerator.device.type) == ("no", "cpu")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.parametrize(("local_ranks", "threads"), [("1", 8), ("3", 2), ("99", 1)])
def test_ranks_of_a_machine_share_its_cores(tmp_path, monkeypatch, local_ranks, threads):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", local_ranks)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8))
    make_accelerator(RunConfig(folder=tmp_path, precision="fp32", device="cpu"))
    assert torch.get_num_threads() == threads


TINY = ["--data.image-size", "32", "--plan.identities-per-batch", "4", "--plan.images-per-identity", "2"]
TINY += ["--model.trunk", "resnet18", "--model.embedding-size", "8"]
TINY += ["--run.steps", "2", "--run.device", "cpu", "--run.precision", "fp32", "--run.no-tensorboard"]


@pytest.mark.usefixtures("fresh_accelerate")
class TestMain:
    """Exit codes; one line on stderr; nothing is made."""

    def fails(self, capsys, tmp_path, args, code) -> str:
        before = every_file(tmp_path)
        assert main([*TINY, "--run.folder", str(tmp_path / "run"), *map(str, args)]) == code
        assert every_file(tmp_path) == before
        assert not (tmp_path / "run").exists()
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("facescale: ")
        return line.removeprefix("facescale: ")

    def test_bad_config_file(self, capsys, tmp_path):
        path = tmp_path / "settings.yaml"
        path.write_text("run: {step: 3}")
        line = self.fails(capsys, tmp_path, ["--config", path], 2)
        assert line.startswith(f"config file {path}: unknown key 'run.step'")

    def test_bad_option(self, capsys, tmp_path):
        assert self.fails(capsys, tmp_path, ["--run.steps", "0"], 2) == (
            "Error parsing run: run.steps is 0; it must be at least 1, or None"
        )

    def test_no_shards(self, capsys, tmp_path):
        line = self.fails(capsys, tmp_path, ["--data.shards", tmp_path / "none"], 1)
        assert line.startswith(f"{tmp_path}/none holds no manifest.json")

    def test_more_identities_than_there_are(self, capsys, tmp_path, shards):
        line = self.fails(capsys, tmp_path, ["--data.shards", shards, "--plan.identities-per-batch", 9], 1)
        assert line == "plan.identities_per_batch is 9; the shards have 7 training identities with at least 2 images"

    def test_evaluation_without_held_out_identities(self, capsys, tmp_path, pictures):
        convert(pictures, tmp_path / "all", ConvertConfig(workers=1))
        line = self.fails(capsys, tmp_path, ["--data.shards", tmp_path / "all", "--run.evaluate-every", 1], 1)
        assert line == f"{tmp_path}/all has no split 'unseen_identities': it has train"

    def test_weights_that_are_missing(self, capsys, tmp_path, shards):
        line = self.fails(capsys, tmp_path, ["--data.shards", shards, "--model.weights", tmp_path / "w.pth"], 1)
        assert line.startswith(f"model.weights {tmp_path}/w.pth does not exist")

    def test_synchronised_batch_norm_without_a_gpu(self, capsys, tmp_path, shards):
        line = self.fails(capsys, tmp_path, ["--data.shards", shards, "--model.sync-batchnorm"], 1)
        assert line == "model.sync_batchnorm is True; PyTorch has it on GPUs only"

    def test_resuming_what_is_not_there(self, capsys, tmp_path, shards):
        line = self.fails(capsys, tmp_path, ["--data.shards", shards, "--run.resume"], 1)
        assert line == f"cannot resume {tmp_path}/run: there is no run, it has no config.yaml"

    def test_one_rank_of_a_machine_says_it(self, capsys, monkeypatch):
        monkeypatch.setenv("LOCAL_RANK", "1")
        assert main(["--run.steps", "0"]) == 2
        assert capsys.readouterr().err == ""

    def test_the_place_is_shown_where_it_is_asked_for(self, monkeypatch):
        monkeypatch.setenv("FACESCALE_TRACEBACK", "1")
        with pytest.raises(ValueError, match=r"run\.steps is 0"):
            main(["--run.steps", "0"])


STUCK = ["--optimizer.learning-rate", "1e-30", "--optimizer.weight-decay", "0", "--run.steps", "50"]
"""Nothing gets better, so the first evaluation stays the best."""


@pytest.mark.usefixtures("fresh_accelerate")
def test_training_ends_early_keeps_the_best_and_does_not_begin_again(capsys, tmp_path, shards):
    run = tmp_path / "run"
    options = [*TINY, *STUCK, "--data.shards", str(shards), "--run.folder", str(run), "--run.evaluate-every", "2"]
    # the weights stay, but the statistics of batch norm do not: every evaluation is told to be equal
    options += ["--run.best-metric", "rank5", "--run.patience", "3", "--run.keep-checkpoints", "1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trainer.train.evaluate_in_training", lambda *_: {"rank5": 0.5})
        assert main(options) == 0
        said = capsys.readouterr().err
        assert (
            "facescale: 3 evaluations in a row without a better rank5 (best: 0.5000 at step 2): training ends" in said
        )
        checkpoints = run / "checkpoints"
        assert {path.name for path in checkpoints.glob("step-*")} == {"step-00000002", "step-00000008"}
        assert checkpoint.chosen(checkpoints, "best").step == 2
        assert checkpoint.chosen(checkpoints, "latest").step == 8
        before = every_file(checkpoints)
        assert main([*options, "--run.resume"]) == 0
        assert every_file(checkpoints) == before


@pytest.mark.usefixtures("fresh_accelerate")
def test_the_best_checkpoint_is_replaced_by_a_better_one(tmp_path, shards):
    run, values = tmp_path / "run", iter([0.1, 0.4, 0.2, 0.3])
    options = [*TINY, "--run.steps", "8", "--data.shards", str(shards), "--run.folder", str(run)]
    options += ["--run.evaluate-every", "2", "--run.best-metric", "rank1", "--run.keep-checkpoints", "1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trainer.train.evaluate_in_training", lambda *_: {"rank1": next(values)})
        assert main(options) == 0
    assert {path.name for path in (run / "checkpoints").glob("step-*")} == {"step-00000004", "step-00000008"}
    assert checkpoint.chosen(run / "checkpoints", "best").step == 4
