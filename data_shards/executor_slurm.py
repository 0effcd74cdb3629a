"""A conversion as a Slurm job array: each element writes its share of the shards, a last job finishes.

python -m data_shards.executor_slurm OUT ELEMENT ELEMENTS    what an element of the array runs
"""

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence

from data_shards.convert import plan_only
from data_shards.convert_config import ConvertConfig
from data_shards.sources.base import Source
from data_shards.store import Store
from data_shards.work import WORK, Work, close_work, run_task

MAX_ELEMENTS = 1000
"""Of an array; Slurm's own limit (MaxArraySize) is 1,001 where nobody has raised it."""
SCRIPTS = "array.sbatch", "finish.sbatch"


def submit(source: Source, out: str, config: ConvertConfig, arguments: Sequence[str]) -> str:
    """Plans the conversion, writes OUT/.work/array.sbatch and finish.sbatch and submits both where there is an sbatch.

    The array's elements write shards without a lock, each its own; the last job runs the same command with processes: it writes
    what an element has not, and the index and the manifest. Slurm's own settings (partition, time, account) come from the
    environment: SBATCH_PARTITION, SBATCH_TIMELIMIT, SBATCH_ACCOUNT, …

    Args:
        arguments: those of `facescale`, of which `--executor slurm-array` is left out for the last job.
    Returns:
        What was submitted, or the commands that submit it.
    Raises:
        ValueError: OUT is a URL, or see `convert`.
    """
    store = Store(out, config.file_mode)
    if store.remote:
        raise ValueError(f"output {out} is a URL: the executor slurm-array needs a folder that all machines share")
    work = plan_only(source, out, config)
    elements = min(MAX_ELEMENTS, max(1, len(work.plan.shards)))
    array, finish = (f"{WORK}/{name}" for name in SCRIPTS)
    store.write(
        array, _script(f"{_python()} -m data_shards.executor_slurm {shlex.quote(out)} $SLURM_ARRAY_TASK_ID {elements}")
    )
    command = f"{_python()} -m trainer.cli {shlex.join(_without_executor(arguments))}"
    store.write(finish, _script(f"{command} --executor processes"))
    first = ["sbatch", "--parsable", f"--array=0-{elements - 1}", "--cpus-per-task=1", str(store.path(array))]
    then = ["sbatch", "--parsable", "--dependency=afterany:JOB", str(store.path(finish))]
    if not shutil.which("sbatch"):
        return f"no sbatch here; submit with:\n{shlex.join(first)}\n{shlex.join(then)}   # JOB: the number that the first prints"
    number = _submitted(first)
    return f"submitted: array {number}, then {_submitted([part.replace('JOB', number) for part in then])}"


def run_element(out: str, element: int, elements: int) -> int:
    """Writes every shard whose number leaves `element` when divided by `elements` and that is not written yet; returns how many.

    Raises:
        ValueError: there is no planned conversion, or no such element.
    """
    if not 0 <= element < elements:
        raise ValueError(f"element is {element}; it must be 0 to {elements - 1}")
    store = Store(out)
    if not store.exists(f"{WORK}/plan.json"):
        raise ValueError(f"{out} holds no planned conversion: run `facescale shard … --executor slurm-array` first")
    work = Work(Store(out, Work(store).config.file_mode))
    tasks = [task for task in work.open_tasks("done", len(work.plan.shards)) if task.number % elements == element]
    try:
        for task in tasks:
            run_task(task)
    finally:
        close_work()
    return len(tasks)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one element; 0, 1 (failed) or 2 (usage)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if len(arguments) != 3 or not all(number.isdigit() for number in arguments[1:]):
        print("usage: python -m data_shards.executor_slurm OUT ELEMENT ELEMENTS", file=sys.stderr)
        return 2
    try:
        written = run_element(arguments[0], int(arguments[1]), int(arguments[2]))
    except (ValueError, OSError) as error:
        print(f"facescale: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    print(f"{written:,} shards written")
    return 0


def _python() -> str:
    return shlex.quote(sys.executable)


def _script(command: str) -> bytes:
    return f"#!/bin/bash\nset -euo pipefail\ncd {shlex.quote(os.getcwd())}\nexec {command}\n".encode(
        errors="surrogateescape"
    )


def _without_executor(arguments: Sequence[str]) -> list[str]:
    kept: list[str] = []
    skip = False
    for argument in arguments:
        if skip or argument == "--executor":
            skip = not skip
        elif not argument.startswith("--executor="):
            kept.append(argument)
    return kept


def _submitted(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"sbatch refused the job: {' '.join(done.stderr.split()) or f'exit code {done.returncode}'}")
    return done.stdout.strip().partition(";")[0]


if __name__ == "__main__":
    sys.exit(main())
