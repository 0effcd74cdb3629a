"""RUN/logs/rank-N.log of two real ranks, and what is left on the console."""

import os
import re
import sys
import warnings
from pathlib import Path

import pytest

from data_shards.convert import ConvertConfig, convert
from data_shards.synthetic import synthesize
from tests.distributed.ranks import Job

TIME = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[+-]\d\d:\d\d "


@pytest.fixture(scope="module")
def options(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("synthetic")
    synthesize(folder / "pictures", identities=8, images_per_identity=4, size=40, seed=5)
    convert(folder / "pictures", folder / "shards", ConvertConfig(images_per_group=2))
    words = (
        f"--data.shards {folder / 'shards'} --data.image-size 32 --plan.identities-per-batch 4 --model.trunk resnet18 "
    )
    words += "--plan.images-per-identity 2 --run.steps 3 --run.log-every 1 --run.precision fp32 --run.device cpu "
    return f"{words} --run.no-tensorboard".split()


class _Talks:
    """At every step: a warning, a word of ours, one of a library of C++, a progress bar."""

    def __init__(self, fails: bool = False) -> None:
        self.fails = fails

    def __call__(self, rank: int) -> None:
        from trainer.train_step import TrainStep

        call, fails = TrainStep.__call__, self.fails

        def talking(train_step, batch, step, stop):
            with warnings.catch_warnings():
                warnings.simplefilter("default")
                warnings.warn(f"library of rank {rank} at step {step}", stacklevel=1)
            print(f"facescale: rank {rank} at step {step}", file=sys.stderr)
            os.write(2, f"c++ of rank {rank} at step {step}\n".encode())
            os.write(1, f"stdout of rank {rank} at step {step}\n".encode())
            sys.stderr.write(f"\rbar of rank {rank}")
            if fails and rank == 1 and step == 2:
                raise RuntimeError("this rank is broken")
            return call(train_step, batch, step, stop)

        TrainStep.__call__ = talking


@pytest.fixture(scope="module")
def job(options, tmp_path_factory) -> tuple[Path, list[str], list[str]]:
    """The folder, what each rank left on the console, and what is in its file."""
    folder = tmp_path_factory.mktemp("talks")
    job = Job(folder, 2, *options, "--run.folder", folder / "run", prepare=_Talks())
    assert job.wait() == [0, 0], job.said()
    files = [(folder / "run" / "logs" / f"rank-{number}.log").read_text() for number in range(2)]
    return folder, [path.read_text() for path in job.said_in], files


def test_rank_0_says_everything_on_the_console_and_its_words_are_kept(job):
    _, console, files = job
    for step in (1, 2, 3):
        for said in (f"library of rank 0 at step {step}", f"facescale: rank 0 at step {step}", "bar of rank 0"):
            assert said in console[0]
        assert f"c++ of rank 0 at step {step}" in console[0]
        assert re.search(rf"^{TIME}facescale: rank 0 at step {step}$", files[0], re.MULTILINE)
        assert f"library of rank 0 at step {step}" in files[0]
    assert re.search(rf"^{TIME}facescale: 32 images of 8 identities", files[0], re.MULTILINE), "what is trained"
    assert "bar of" not in files[0]


def test_of_other_ranks_only_our_own_lines_are_on_the_console(job):
    _, console, files = job
    said = [line for line in console[1].splitlines() if "rank 1 at step" in line]
    assert said == [f"facescale: rank 1 at step {step}" for step in (1, 2, 3)]
    assert "TCPStore" not in console[1], "PyTorch's last words when rank 0 is gone first"
    for step in (1, 2, 3):
        for kind in ("library", "c++", "stdout"):
            assert f"{kind} of rank 1 at step {step}" in files[1]
        assert re.search(rf"^{TIME}facescale: rank 1 at step {step}$", files[1], re.MULTILINE)


def test_a_resumed_run_goes_on_in_the_same_files(job, options):
    folder, _, files = job
    again = Job(folder, 2, *options, "--run.folder", folder / "run", "--run.resume", "--run.keep-checkpoints", 3)
    assert again.wait() == [0, 0], again.said()
    for number, before in enumerate(files):
        assert (folder / "run" / "logs" / f"rank-{number}.log").read_text().startswith(before)


def test_the_traceback_of_a_rank_is_in_its_file(options, tmp_path):
    job = Job(tmp_path, 2, *options, "--run.folder", tmp_path / "run", prepare=_Talks(fails=True))
    assert 0 not in job.wait()
    found = (tmp_path / "run" / "logs" / "rank-1.log").read_text()
    assert re.search(rf"^{TIME}RuntimeError: this rank is broken$", found, re.MULTILINE)
    assert re.search(rf"^{TIME}Traceback", found, re.MULTILINE)
    assert "this rank is broken" not in (tmp_path / "run" / "logs" / "rank-0.log").read_text()
