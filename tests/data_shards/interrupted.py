"""A program that runs conversions in children of its own and interrupts them; its arguments are JSON, its findings too.

Forking starts a conversion in a millisecond, so that hundreds of interruptions take seconds. Nothing else runs here.
"""

import contextlib
import hashlib
import io
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np

from data_shards import commit
from data_shards.convert import ConvertConfig, convert


def hashes(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file()
    }


def child(work):
    """Starts a process that does this; its exit code is 0, or 1 with a line in the returned file."""
    said = Path(os.environ["TMPDIR"], f"said-{random.getrandbits(60):x}")
    pid = os.fork()
    if pid == 0:
        os.setsid()
        try:
            work()
        except (ValueError, OSError) as error:
            said.write_text(str(error))
            os._exit(1)
        os._exit(0)
    return pid, said


def ended(pid):
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


def to_the_end(source, out, config):
    """Runs the conversion until it succeeds; returns what it said where it did not at once."""
    complaints = []
    for _ in range(5):
        pid, said = child(lambda: convert(source, out, config))
        if ended(pid) == 0:
            return complaints
        complaints.append(said.read_text())
    raise AssertionError(complaints)


def visible_shards_are_whole(out, expected):
    """Every file under its final name has its final bytes, whatever else is unfinished."""
    found = {name: value for name, value in hashes(out).items() if not name.startswith(".work") and ".tmp" not in name}
    return all(expected.get(name) == value for name, value in found.items())


def random_moments(source, out, expected, config, seconds, rounds, seed):
    """Kills a conversion at random moments over its whole length, its main process or the whole group.

    Args:
        seconds: how long one takes, at most.
    """
    draw = random.Random(seed)
    report = {"killed": 0, "finished": 0, "wrong": [], "shards": []}
    for number in range(rounds):
        moment = draw.uniform(0, seconds)
        pid, _ = child(lambda: convert(source, out, config))
        time.sleep(moment)
        with contextlib.suppress(ProcessLookupError):
            (os.kill if number % 2 else os.killpg)(pid, signal.SIGKILL)
        killed = ended(pid) == -signal.SIGKILL
        report["killed" if killed else "finished"] += 1
        if not killed:  # the first one was measured on a busier machine
            seconds = moment
        time.sleep(0.002)
        if not visible_shards_are_whole(out, expected):
            report["wrong"].append(f"a partial file is visible after {moment:.3f} s")
        report["shards"].append(len(list(Path(out).glob("*/*.tar"))) if os.path.isdir(out) else 0)
        if killed:
            to_the_end(source, out, config)
        if hashes(out) != expected:
            report["wrong"].append(f"other bytes after a kill at {moment:.3f} s")
        shutil.rmtree(out)
    return report


def workers_killed(source, out, expected, config, seconds, rounds, seed):
    """Kills one of a conversion's workers at random moments; the conversion itself is left alone."""
    draw = random.Random(seed)
    report = {"killed": 0, "codes": [], "said": [], "wrong": []}
    for _ in range(rounds):
        pid, said = child(lambda: convert(source, out, config))
        time.sleep(draw.uniform(0, seconds))
        with contextlib.suppress(OSError, IndexError):
            worker = int(draw.choice(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))
            os.kill(worker, signal.SIGKILL)
            report["killed"] += 1
        report["codes"].append(ended(pid))
        if said.exists():
            report["said"].append(said.read_text())
        if not visible_shards_are_whole(out, expected):
            report["wrong"].append("a partial file is visible")
        if report["codes"][-1]:
            to_the_end(source, out, config)
        if hashes(out) != expected:
            report["wrong"].append("other bytes")
        shutil.rmtree(out)
    return report


POINTS = {
    "before fsync": (os, "fsync", "before"),
    "after fsync": (os, "fsync", "after"),
    "before rename": (os, "replace", "before"),
    "after rename": (os, "replace", "after"),
    "inside a header": (commit.HashedFile, "write", 300),
    "inside a payload": (commit.HashedFile, "write", 900),
    "before mkdir": (os, "mkdir", "before"),
    "after mkdir": (os, "mkdir", "after"),
    "after unlink": (os, "unlink", "after"),
    "after rmdir": (os, "rmdir", "after"),
}


def killing(owner, name, where, count, counter):
    """Replaces a function by one that kills its process at call number `count`."""
    really = getattr(owner, name)

    def patched(*args, **more):
        counter.append(1)
        hit = len(counter) == count
        if hit and isinstance(where, int):
            args[0]._file.write(args[1][:where])
            args[0]._file.flush()
        if hit and where != "after":
            os.kill(os.getpid(), signal.SIGKILL)
        result = really(*args, **more)
        if hit:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, patched)


def named_points(source, out, expected, config, most):
    """Kills a conversion at every call of the functions that change the disk, up to `most` spread over them."""
    report = {}
    for point, (owner, name, where) in POINTS.items():
        reached, total = Path(os.environ["TMPDIR"], "calls"), []

        def counted(owner=owner, name=name, where=where, reached=reached):
            calls = []
            killing(owner, name, where, -1, calls)
            convert(source, out, config)
            reached.write_text(str(len(calls)))

        pid, _ = child(counted)
        assert ended(pid) == 0
        shutil.rmtree(out)
        total = int(reached.read_text())
        wrong, kills = [], 0
        for count in np.linspace(1, total, min(most, total)).round().astype(int).tolist():

            def doomed(owner=owner, name=name, where=where, count=count):
                killing(owner, name, where, count, [])
                convert(source, out, config)

            pid, _ = child(doomed)
            kills += ended(pid) == -signal.SIGKILL
            if os.path.isdir(out) and not visible_shards_are_whole(out, expected):
                wrong.append(f"a partial file is visible after call {count}")
            if Path(out, "manifest.json").exists() and not Path(out, ".work").exists():
                pass  # killed behind the very end
            else:
                to_the_end(source, out, config)
            if hashes(out) != expected:
                wrong.append(f"other bytes after call {count}")
            shutil.rmtree(out)
        report[point] = {"calls": total, "kills": kills, "wrong": wrong}
    return report


def two_at_once(source, out, expected, config, rounds):
    """Starts two conversions into one folder at the same moment."""
    report = {"codes": [], "said": [], "wrong": 0}
    for _ in range(rounds):
        start = time.monotonic() + 0.02

        def work(start=start):
            while time.monotonic() < start:
                pass
            convert(source, out, config)

        children = [child(work) for _ in range(2)]
        report["codes"].append(sorted(ended(pid) for pid, _ in children))
        report["said"] += [said.read_text() for _, said in children if said.exists()]
        report["wrong"] += hashes(out) != expected
        shutil.rmtree(out)
    return report


def main():
    task = json.loads(sys.argv[1])
    source, out = task["source"], task["out"]
    config = ConvertConfig(**task["config"])
    with contextlib.redirect_stdout(io.StringIO()):
        started = time.monotonic()
        pid, said = child(lambda: convert(source, out, config))
        assert ended(pid) == 0, said.read_text()
        seconds = time.monotonic() - started
        expected = hashes(out)
        shutil.rmtree(out)
        kind = task["kind"]
        if kind == "random":
            report = random_moments(source, out, expected, config, seconds, task["rounds"], task["seed"])
        elif kind == "workers":
            report = workers_killed(source, out, expected, config, seconds, task["rounds"], task["seed"])
        elif kind == "points":
            report = named_points(source, out, expected, config, task["most"])
        else:
            report = two_at_once(source, out, expected, config, task["rounds"])
    print(json.dumps(report | {"seconds": seconds}))


if __name__ == "__main__":
    main()
