import re
from types import SimpleNamespace

import pytest

from data_shards import resize
from trainer import doctor
from trainer.cli import main
from trainer.doctor import Check, examine

PARTS = ["packages", "cpu", "memory", "gpu", "dali", "faiss", "gather", "shared memory", "open files", "disk", "clock"]


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
    assert re.search(r"two processes added by (gloo|nccl) in [\d.]+ s", found["gather"])
    assert re.search(r"GB free in .*; writes [\d,]+ MB/s, reads [\d,]+ MB/s", found["disk"])
    assert re.search(r"^2\d{3}-\d\d-\d\d .* kept by NTP$", found["clock"])
    assert found["memory"].endswith(" GiB available")


def quick(monkeypatch, **parts) -> None:
    """Every part is fine but for those given."""
    for name in PARTS:
        function = f"_{name.replace(' ', '_')}"
        monkeypatch.setattr(doctor, function, parts.get(function, lambda *given, name=name: Check(name, True, "fine")))


def broken() -> Check:
    raise RuntimeError("libfaiss.so: cannot open shared object file\n  No such file")


def test_a_part_that_raises_is_a_finding_and_the_others_are_still_tried(monkeypatch):
    quick(monkeypatch, _dali=broken, _faiss=broken)
    checks = examine()
    assert [check.name for check in checks] == PARTS
    assert [check.name for check in checks if not check.ok] == ["dali", "faiss"]
    message = "RuntimeError: libfaiss.so: cannot open shared object file No such file"
    assert checks[PARTS.index("faiss")] == Check("faiss", False, message, "reinstall: rm -rf .venv && make setup")


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


def test_processes_that_do_not_reach_each_other_are_a_finding(monkeypatch):
    """A real failure: gloo is told to use an interface that is not there."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nosuch0")
    check = doctor._gather()
    assert not check.ok
    assert check.found.startswith("gloo: ")
    assert "GLOO_SOCKET_IFNAME" in check.advice
    assert " lo" in check.advice, "names of interfaces that are there"


def test_a_sum_that_is_wrong_is_an_error(monkeypatch):
    from trainer import collectives

    monkeypatch.setattr(collectives, "_sum_of_ranks", operator_two)
    with pytest.raises(RuntimeError, match=r"1 \+ 2 came out as 2.0 and 2.0"):
        collectives.try_all_reduce("gloo")


def operator_two(backend, address, number) -> float:
    return 2.0


def test_limits_of_a_container_are_read(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "CGROUP", tmp_path)
    assert doctor._cpu().ok
    assert doctor._memory().ok
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert doctor._cpu().ok
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    check = doctor._cpu()
    assert not check.ok
    assert check.found.endswith("of which the container may use 0.5")
    (tmp_path / "memory.max").write_text(f"{3 * 2**30}\n")
    (tmp_path / "memory.current").write_text(f"{2 * 2**30}\n")
    check = doctor._memory()
    assert (check.ok, check.found) == (False, "1.0 GiB available")
    (tmp_path / "memory.max").write_text("max\n")
    assert doctor._memory().ok


def test_a_driver_without_a_gpu_for_pytorch_is_a_finding(monkeypatch, tmp_path):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor, "DRIVER", tmp_path / "version")
    assert doctor._gpu().ok
    doctor.DRIVER.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  470.82.01\nGCC\n")
    check = doctor._gpu()
    assert not check.ok
    assert check.found.endswith("470.82.01")
    assert "a newer driver" in check.advice


def test_faiss_that_sees_fewer_gpus_than_pytorch_is_a_finding(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 97)
    check = doctor._faiss()
    assert not check.ok
    assert "of 97 GPUs" in check.advice


def test_a_full_or_slow_disk_is_a_finding(monkeypatch, tmp_path):
    check = doctor._disk(tmp_path / "not" / "yet" / "there")
    assert check.found.split(";")[0].endswith(f"GB free in {tmp_path}")
    assert not list(tmp_path.iterdir())
    times = iter([0.0, 1.0, 1.0, 2.0])
    monkeypatch.setattr(doctor.time, "perf_counter", lambda: next(times))
    check = doctor._disk(tmp_path)
    assert not check.ok
    assert check.found.endswith("writes 67 MB/s, reads 67 MB/s")
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: SimpleNamespace(free=5 * 10**8))
    check = doctor._disk(tmp_path)
    assert (check.ok, check.found) == (False, f"0.50 GB free in {tmp_path}")


def test_a_clock_before_the_program_was_made_is_a_finding(monkeypatch):
    class Early(doctor.datetime):
        @classmethod
        def now(cls, zone=None):
            return doctor.datetime(2001, 1, 1, tzinfo=zone)

    assert doctor._clock().ok
    released = doctor.datetime
    monkeypatch.setattr(Early, "fromtimestamp", released.fromtimestamp)
    monkeypatch.setattr(doctor, "datetime", Early)
    check = doctor._clock()
    assert (check.ok, check.found[:10]) == (False, "2001-01-01")
    assert "timedatectl" in check.advice


def test_the_command_gives_json(monkeypatch, capsys):
    import json

    quick(monkeypatch, _faiss=broken)
    assert main(["doctor", "--json", "--folder", "/"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert [check["name"] for check in found["checks"]] == PARTS
    assert [check["name"] for check in found["checks"] if not check["ok"]] == ["faiss"]
    assert found["cores"] >= 1


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


@pytest.mark.parametrize(
    ("compiled", "told"), [(True, "by compiled code"), (False, "by PyTorch, for want of a C compiler")]
)
def test_who_resizes_is_told(monkeypatch, compiled, told):
    monkeypatch.setattr(resize, "compiled", lambda: compiled)
    assert f", pictures resized {told}" in doctor._cpu().found
