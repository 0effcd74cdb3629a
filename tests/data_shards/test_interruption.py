"""Conversions that are killed, run out of disk or meet another one: nothing lost, nothing twice, the same bytes."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from collections_on_disk import draw_collection, encoded, every_file
from PIL import Image

from data_shards.convert import ConvertConfig, convert

PROGRAM = Path(__file__).with_name("interrupted.py")


def interrupted(tmp_path, kind, pictures=60, config=None, **task):
    source = tmp_path / "in"
    if not source.exists():
        draw_collection(source, {f"id{number:02d}": 6 for number in range(pictures // 6)})
        (source / "id01" / "bad.jpg").write_text("no picture")
    config = {"shard_bytes": 12_000, "holdout_identities": 2, "holdout_images": 1, "workers": 1} | (config or {})
    task |= {"kind": kind, "source": str(source), "out": str(tmp_path / "out"), "config": config}
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    done = subprocess.run(
        [sys.executable, str(PROGRAM), json.dumps(task)],
        env=os.environ | {"TMPDIR": str(scratch)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_killed_at_100_random_moments_it_goes_on_to_the_same_bytes(tmp_path):
    report = interrupted(tmp_path, "random", pictures=300, config={"workers": 2}, rounds=100, seed=1)
    assert report["wrong"] == []
    assert report["killed"] + report["finished"] == 100
    assert report["killed"] >= 80
    assert len(set(report["shards"])) > 10, "the moments are spread over the whole length"


def test_killed_while_it_looks_for_duplicates_it_goes_on_to_the_same_bytes(tmp_path):
    survey = {"duplicates": "report", "near_duplicates": "drop", "workers": 2}
    report = interrupted(tmp_path, "random", pictures=120, config=survey, rounds=15, seed=2)
    assert report["wrong"] == []
    assert report["killed"] >= 10


def test_when_a_worker_is_killed_it_says_so_and_goes_on_to_the_same_bytes(tmp_path):
    report = interrupted(tmp_path, "workers", pictures=300, config={"workers": 2}, rounds=25, seed=3)
    assert report["wrong"] == []
    assert report["killed"] >= 10
    assert set(report["codes"]) == {0, 1}, report["codes"]
    assert len(report["said"]) >= 8
    assert {said.partition(": ")[2] for said in report["said"]} == {
        "a conversion worker died, perhaps for lack of memory: try fewer `workers`; what is written stays, "
        "the same command goes on from there"
    }


def test_killed_at_every_named_point_it_goes_on_to_the_same_bytes(tmp_path):
    most = int(os.environ.get("FACESCALE_KILLS", "12"))
    report = interrupted(tmp_path, "points", pictures=36, most=most)
    del report["seconds"]
    assert {point: found["wrong"] for point, found in report.items()} == {point: [] for point in report}
    for point, found in report.items():
        assert found["kills"] == min(found["calls"], most), (point, found)
        assert found["kills"] >= 2, (point, found)


def test_of_two_at_once_exactly_one_works_a_hundred_times(tmp_path):
    report = interrupted(tmp_path, "two", pictures=36, rounds=100)
    assert report["codes"] == [[0, 1]] * 100
    assert report["wrong"] == 0
    assert all("is being written by another conversion" in said or "is finished" in said for said in report["said"])


@pytest.fixture
def small_disk(tmp_path):
    """Mounts a file system of so many bytes, and resizes it; only root may."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(size, *options):
        command = ["mount", "-t", "tmpfs", "-o", ",".join([f"size={size}", "mode=700", *options]), "tmpfs", str(place)]
        if os.path.ismount(place):
            command[3:3] = []
            command[4] = ",".join(["remount", f"size={size}", *options])
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("mounting a file system is not allowed here")
        return place

    yield mount
    subprocess.run(["umount", str(place)], capture_output=True, check=False)


def facescale(*args):
    return subprocess.run(
        [sys.executable, "-m", "trainer.cli", *map(str, args)], capture_output=True, text=True, check=False
    )


def test_a_disk_that_is_full_at_ten_places_costs_one_line_and_nothing_else(tmp_path, small_disk):
    source = draw_collection(tmp_path / "in", {f"id{number:02d}": 20 for number in range(30)})
    options = ("--workers", 2, "--shard-mib", 0.05)
    assert facescale("shard", source, tmp_path / "whole", *options).returncode == 0
    whole = every_file(tmp_path / "whole")
    needed = sum(-(-len(data) // 4096) * 4096 for data in whole.values())
    for part in np.linspace(0.05, 0.98, 10):
        place = small_disk(int(needed * part))
        failed = facescale("shard", source, place / "out", *options)
        assert failed.returncode == 1
        lines = failed.stderr.splitlines()
        assert len(lines) == 1, failed.stderr
        assert "No space left on device" in lines[0]
        found = every_file(place / "out") if (place / "out").exists() else {}
        for name, data in found.items():
            if not name.startswith(".work"):
                assert whole[name] == data, f"{name} is not whole"
        assert "manifest.json" not in found
        small_disk(4 * needed)
        assert facescale("shard", source, place / "out", *options).returncode == 0
        assert every_file(place / "out") == whole
        subprocess.run(["umount", str(place)], check=True)


def test_a_read_only_output_is_refused_within_five_seconds_before_any_work(tmp_path, small_disk):
    source = draw_collection(tmp_path / "in", {"a": 3, "b": 3})
    small_disk(2**20)
    place = small_disk(2**20, "ro")
    started = time.monotonic()
    failed = facescale("shard", source, place / "out")
    assert time.monotonic() - started < 5
    assert failed.returncode == 1
    assert failed.stderr == f"facescale: output {place}/out cannot be written: Read-only file system\n"


def truncated_png(number):
    return encoded(number, ".png")[: 40 + number % 20]


def bomb(number):
    header = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"
    body = (30_000 + number).to_bytes(4, "big") + (30_000).to_bytes(4, "big") + b"\x08\x02\0\0\0"
    import zlib

    return header + body + zlib.crc32(b"IHDR" + body).to_bytes(4, "big") + encoded(number, ".png")[33:]


DAMAGES = {
    "empty.jpg": lambda n: b"",
    "one_byte.jpg": lambda n: b"\xff",
    "text.jpg": lambda n: b"no picture %d" % n,
    "zeros.png": lambda n: bytes(1000 + n),
    "cut_in_the_header.jpg": lambda n: encoded(n)[: 20 + n],
    "cut_in_the_data.jpg": lambda n: encoded(n, size=(90, 70))[: -50 - n],
    "cut_at_the_end.jpg": lambda n: encoded(n)[: -40 - n % 10],
    "cut.png": truncated_png,
    "cut_before_its_end.png": lambda n: encoded(n, ".png")[:-12],
    "wrong_chunk.png": lambda n: (
        encoded(n, ".png")[:45] + bytes([encoded(n, ".png")[45] ^ (1 + n)]) + encoded(n, ".png")[46:]
    ),
    "bomb.png": bomb,
    "cut.pgm": lambda n: encoded(n, ".pgm")[: -1 - n],
    "short_header.bmp": lambda n: encoded(n, ".bmp")[:30],
    "cut.webp": lambda n: encoded(n, ".webp")[: 25 + n % 10],
    "gif.jpg": lambda n: b"GIF89a" + bytes(50),
    "html.jpg": lambda n: b"<!DOCTYPE html><title>404 Not Found</title>",
    "16_bit.bmp": lambda n: encoded(n, ".bmp")[:28] + b"\x10\x00" + encoded(n, ".bmp")[30:],
}


@pytest.mark.parametrize("check", ["decode", "header"])
def test_17_kinds_of_damage_times_100_are_all_reported_and_stop_nothing(tmp_path, check):
    source = draw_collection(tmp_path / "in", {f"good{number}": 10 for number in range(10)})
    damaged = set()
    for kind, make in DAMAGES.items():
        stem, extension = kind.split(".")
        for number in range(100):
            path = source / f"bad{number % 20:02d}" / f"{stem}{number:03d}.{extension}"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(make(number))
            damaged.add(str(path.relative_to(source)))
    summary = convert(source, tmp_path / "out", ConvertConfig(workers=2, check=check))
    listed = [json.loads(line) for line in (tmp_path / "out" / "failures.jsonl").read_text().splitlines()]
    assert len(damaged) == 1700
    failed = {line["path"] for line in listed}
    assert len(failed) == len(listed)
    if check == "decode":
        assert failed == damaged
        assert summary.written == 100
    else:  # what only decoding finds is not found
        missed = {name.split("/")[1].rstrip("0123456789.jpgnmbweif") for name in damaged - failed}
        assert failed <= damaged
        assert missed <= {"wrong_chunk", "cut", "cut_in_the_data", "cut_before_its_end"}
    assert all(line["reason"] and "\n" not in line["reason"] for line in listed)
    assert summary.read == 1800 == summary.written + summary.failed


def test_odd_but_good_pictures_and_names_are_written(tmp_path):
    source = draw_collection(tmp_path / "in", {"a": 2, "b c": 2})
    odd = {
        "cmyk.jpg": encoded(1, mode="CMYK"),
        "with space and 'quote'.jpg": encoded(2),
        "new\nline.jpg": encoded(3),
        "caf\udce9.jpg": encoded(4),
        "two.dots.jpg": encoded(5),
        "UPPER.JPG": encoded(6),
    }
    sixteen = Image.fromarray(np.linspace(0, 65_535, 24 * 16).reshape(16, 24).astype(np.uint16))
    sixteen.save(source / "a" / "sixteen.png")
    Image.new("RGB", (24, 16)).save(source / "a" / "progressive.jpg", progressive=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (24, 16)).save(source / "a" / "turned.jpg", exif=exif)
    for name, data in odd.items():
        (source / "b c" / name).write_bytes(data)
    summary = convert(source, tmp_path / "out", ConvertConfig(workers=1))
    assert summary.failures == ()
    assert summary.written == 13
