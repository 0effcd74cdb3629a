"""With a real Ray cluster on this machine, in processes of their own."""

import json
import subprocess
import sys

import pytest
from collections_on_disk import draw_collection, every_file

from data_shards import executor_ray
from data_shards.convert import ConvertConfig, convert
from data_shards.work import Task

CONVERT = """
import json, os, signal, subprocess, sys, threading, time
from data_shards.convert import ConvertConfig, convert
from data_shards.executor_ray import run_tasks_ray

source, out, kill = sys.argv[1:]
killed = []

def kill_a_worker_at_work():
    # a worker of Ray is called after the task that it does
    while len(killed) < 3:
        names = subprocess.run(["ps", "-eo", "pid=,args="], capture_output=True, text=True).stdout
        for line in names.splitlines():
            pid, _, name = line.strip().partition(" ")
            if name.startswith("ray::_task_in_folder"):
                try:
                    os.kill(int(pid), signal.SIGKILL)
                    killed.append(int(pid))
                except ProcessLookupError:
                    pass
                time.sleep(0.3)
                break
        time.sleep(0.002)

if kill == "kill":
    threading.Thread(target=kill_a_worker_at_work, daemon=True).start()
summary = convert(source, out, ConvertConfig(shard_samples=40, workers=2), run_tasks_ray)
print(json.dumps([summary.read, summary.written, len(killed)]))
"""


@pytest.mark.parametrize("kill", ["let live", "kill"])
def test_ray_writes_the_same_bytes_also_when_its_workers_are_killed(tmp_path, kill):
    source = draw_collection(tmp_path / "in", {f"id{number:03d}": 40 for number in range(60)})
    (source / "id003" / "bad.jpg").write_text("no picture")
    convert(source, tmp_path / "processes", ConvertConfig(shard_samples=40, workers=2))
    command = [sys.executable, "-c", CONVERT, str(source), str(tmp_path / "ray"), kill]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    read, written, killed = json.loads(done.stdout.splitlines()[-1])
    assert (read, written) == (2401, 2400)
    assert killed == (3 if kill == "kill" else 0)
    assert every_file(tmp_path / "ray") == every_file(tmp_path / "processes")


FAIL = """
import sys
from data_shards.executor_ray import run_tasks_ray
from data_shards.work import Task
try:
    list(run_tasks_ray([Task(sys.argv[1], 0o600, "done", 0, "")], 1))
except OSError as error:
    print(type(error).__name__, "|", " ".join(str(error).split()))
"""


def test_what_a_task_says_is_told_without_rays_traceback(tmp_path):
    done = subprocess.run([sys.executable, "-c", FAIL, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.stdout.startswith("FileNotFoundError | "), done.stderr[-2000:]
    assert "job.json" in done.stdout
    assert "ray" not in done.stdout.replace(str(tmp_path), "")


def test_ray_that_is_missing_or_old_is_told_in_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"executor ray: Ray is not installed: pip install 'facescale\[ray\]'"):
        list(executor_ray.run_tasks_ray([Task("out", 0o600, "done", 0, "")], 1))

    class Old:
        __version__ = "2.51.3"

    monkeypatch.setitem(sys.modules, "ray", Old)
    with pytest.raises(ValueError, match=r"Ray 2\.51\.3 is installed, needed is 2\.52 or newer"):
        list(executor_ray.run_tasks_ray([Task("out", 0o600, "done", 0, "")], 1))


def test_memory_is_refused():
    with pytest.raises(ValueError, match="belongs to one process: the executor ray needs one that machines share"):
        list(executor_ray.run_tasks_ray([Task("memory://x", 0o600, "done", 0, "")], 1))
