from types import SimpleNamespace

import pytest

from trainer import doctor
from trainer.cli import main
from trainer.doctor import Check, examine

PARTS = ["packages", "cpu", "gpu", "dali", "faiss", "gather", "shared memory", "open files"]


@pytest.fixture(scope="module")
def examined() -> list[Check]:
    return examine()


def test_everything_works_here(examined):
    assert [check.name for check in examined] == PARTS
    assert [check for check in examined if not check.ok] == []


def test_what_was_found_is_told(examined):
    found = {check.name: check.found for check in examined}
    assert "torch 2." in found["packages"]
    assert "faiss-gpu 1." in found["packages"]
    assert "decodes JPEG on the " in found["dali"]
    assert "gloo" in found["gather"]


def quick(monkeypatch, **parts) -> None:
    """Every part is fine but for those given."""
    for name in PARTS:
        function = f"_{name.replace(' ', '_')}"
        monkeypatch.setattr(doctor, function, parts.get(function, lambda name=name: Check(name, True, "fine")))


def broken() -> Check:
    raise RuntimeError("libfaiss.so: cannot open shared object file\n  No such file")


def test_a_part_that_raises_is_a_finding_and_the_others_are_still_tried(monkeypatch):
    quick(monkeypatch, _dali=broken, _faiss=broken)
    checks = examine()
    assert [check.name for check in checks] == PARTS
    assert [check.name for check in checks if not check.ok] == ["dali", "faiss"]
    message = "RuntimeError: libfaiss.so: cannot open shared object file No such file"
    assert checks[4] == Check("faiss", False, message, "reinstall: rm -rf .venv && make setup")


def test_a_package_that_is_missing_is_a_finding(monkeypatch):
    monkeypatch.setattr(doctor, "_PACKAGES", ("torch", "no-such-package"))
    check = doctor._tried("packages", doctor._packages)
    assert (check.ok, check.found) == (False, "PackageNotFoundError: No package metadata was found for no-such-package")


def test_wrong_results_are_a_finding(monkeypatch):
    """A decoder that mixes up colours, a search that finds others."""
    import torch

    import trainer.evaluation.index

    monkeypatch.setattr("data_shards.decode.Decoder.next", lambda self: torch.tensor([50, 100, 200]).view(1, 3, 1, 1))
    check = doctor._dali()
    assert (check.ok, check.advice) == (False, "mean colour [50, 100, 200] instead of [200, 100, 50]")
    monkeypatch.setattr(trainer.evaluation.index, "search", lambda p, q, k: (p, torch.zeros(8, 1, dtype=torch.int64)))
    assert not doctor._faiss().ok


def test_too_little_shared_memory_and_too_few_files_are_findings_with_advice(monkeypatch):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: SimpleNamespace(free=64 * 2**20))
    monkeypatch.setattr(doctor.resource, "getrlimit", lambda _: (256, 256))
    memory, files = doctor._shared_memory(), doctor._open_files()
    assert (memory.ok, memory.found) == (False, "0.1 GiB free in /dev/shm")
    assert "--shm-size=8g" in memory.advice
    assert (files.ok, files.found) == (False, "at most 256")
    assert "ulimit -n" in files.advice


def test_the_command_says_it_and_what_to_do(monkeypatch, capsys):
    quick(monkeypatch, _faiss=broken)
    assert main(["doctor"]) == 1
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert len(lines) == len(PARTS) + 1
    at = PARTS.index("faiss")
    assert lines[at].startswith("PROBLEM faiss         RuntimeError: libfaiss.so")
    assert lines[at + 1].strip() == "reinstall: rm -rf .venv && make setup"
    assert all(line.startswith("ok ") for line in lines[:at] + lines[at + 2 :])
    assert said.err == ""


def test_the_command_ends_with_0_where_all_is_well(monkeypatch, capsys):
    quick(monkeypatch)
    assert main(["doctor"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(PARTS)
