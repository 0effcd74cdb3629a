"""There is no Slurm here: a stand-in for sbatch records what it is given and runs the real scripts with a real shell."""

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from collections_on_disk import draw_collection, every_file

from data_shards.convert import ConvertConfig, convert
from data_shards.executor_slurm import main, submit
from data_shards.sources.detect import open_source

SBATCH = """#!{python}
import os, pathlib, subprocess, sys
place = pathlib.Path(__file__).parent
with open(place / "log", "a") as log:
    print(sys.argv[1:], file=log)
number = 100 + len(open(place / "log").readlines())
ranges = [argument.partition("=0-")[2] for argument in sys.argv if argument.startswith("--array=")]
for element in range(int(ranges[0]) + 1) if ranges else [None]:
    environment = os.environ | ({{}} if element is None else {{"SLURM_ARRAY_TASK_ID": str(element)}})
    if os.environ.get("LOSE") == str(element):
        continue
    subprocess.run(["bash", sys.argv[-1]], env=environment, stdout=subprocess.DEVNULL, check=True)
print(f"{{number}};cluster")
"""


@pytest.fixture
def stand_in(tmp_path):
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "sbatch").write_text(SBATCH.format(python=sys.executable))
    (folder / "sbatch").chmod(0o755)
    return folder


@pytest.fixture
def source(tmp_path):
    return draw_collection(tmp_path / 'it\'s a "source" $(touch canary)', {f"id{number}": 6 for number in range(8)})


def facescale(folder, path, *args, **environment):
    return subprocess.run(
        [sys.executable, "-m", "trainer.cli", "shard", *map(str, args)],
        cwd=folder,
        env=os.environ | {"PATH": f"{path}:{os.environ['PATH']}"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("lose", ["", "2"])
def test_the_array_and_the_last_job_write_the_same_bytes_also_if_an_element_is_lost(tmp_path, stand_in, source, lose):
    work = tmp_path / "work"
    work.mkdir()
    options = ("--shard-mib", "0.02", "--holdout-identities", "2")
    assert facescale(work, stand_in, source, "plain", *options).returncode == 0
    out = "out of 'it'; touch canary"
    done = facescale(work, stand_in, source, out, *options, "--executor", "slurm-array", LOSE=lose)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "submitted: array 101, then 102\n"
    assert every_file(work / out) == every_file(work / "plain")
    log = (stand_in / "log").read_text().splitlines()
    assert re.search(r"--array=0-\d+", log[0])
    assert "--dependency=afterany:101" in log[1]
    assert not list(tmp_path.rglob("canary"))


def test_without_sbatch_the_commands_are_printed_and_elements_may_run_at_the_same_time(tmp_path, source, monkeypatch):
    config = ConvertConfig(shard_samples=3, workers=1)
    convert(source, tmp_path / "plain", config)
    out = str(tmp_path / "out")
    arguments = ["shard", str(source), out, "--executor", "slurm-array"]
    monkeypatch.setenv("PATH", "/nowhere")
    said = submit(open_source(source), out, config, arguments)
    assert said.splitlines()[0] == "no sbatch here; submit with:"
    assert "sbatch --parsable --array=0-15" in said.splitlines()[1]

    def element(number):
        command = [sys.executable, "-m", "data_shards.executor_slurm", out, str(number % 16), "16"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    with ThreadPoolExecutor(2) as threads:
        said = list(threads.map(element, range(17)))
    assert said[:16] == ["1 shards written\n"] * 16
    assert said[16] == "0 shards written\n", "it was written already"
    convert(source, out, config)
    assert every_file(tmp_path / "out") == every_file(tmp_path / "plain")


def test_mistakes_are_told_in_one_line(tmp_path, source, capsys):
    assert main([str(tmp_path), "0"]) == 2
    assert main([str(tmp_path / "none"), "0", "2"]) == 1
    assert main([str(tmp_path), "2", "2"]) == 1
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "usage: python -m data_shards.executor_slurm OUT ELEMENT ELEMENTS",
        f"facescale: {tmp_path}/none holds no planned conversion: run `facescale shard … --executor slurm-array` first",
        "facescale: element is 2; it must be 0 to 1",
    ]
    with pytest.raises(ValueError, match="is a URL: the executor slurm-array needs a folder that all machines share"):
        submit(open_source(source), "memory://x", ConvertConfig(), [])


def test_a_refusal_of_sbatch_is_told(tmp_path, stand_in, source):
    (stand_in / "sbatch").write_text("#!/bin/sh\necho 'Invalid partition' >&2\nexit 1\n")
    done = facescale(tmp_path, stand_in, source, "out", "--executor", "slurm-array")
    assert (done.returncode, done.stderr) == (1, "facescale: sbatch refused the job: Invalid partition\n")
