"""What counts as a loss, and the table in the README."""

import json

import pytest

from benchmarks import bench, check


def told(median, low, high):
    return {"median": median, "lower_quartile": low, "upper_quartile": high}


def lost(now, was=(2.0, 1.9, 2.1), tolerance=0.15):
    return bool(check.losses({"ratios": {"a": told(*was)}}, {"ratios": {"a": told(*now)}}, tolerance))


@pytest.mark.parametrize(
    ("now", "expected"),
    [
        ((2.0, 1.9, 2.1), False),
        ((3.0, 2.9, 3.1), False),
        ((1.5, 1.4, 1.6), True),
        ((1.5, 1.4, 2.05), False),  # its spread reaches the stored median
        ((1.8, 1.75, 1.85), False),  # a tenth is within the tolerance
        ((1.69, 1.6, 1.75), True),
    ],
)
def test_a_loss_is_outside_both_spreads_and_beyond_the_tolerance(now, expected):
    assert lost(now) == expected


def test_a_wide_stored_spread_forgives():
    assert not lost((1.5, 1.4, 1.6), was=(2.0, 1.4, 2.6))


def write(path, ratios):
    path.write_text(json.dumps({"ratios": ratios}))
    return str(path)


def test_exit_codes_and_lines(tmp_path, capsys):
    stored = write(tmp_path / "stored.json", {"a": told(2, 2, 2), "only here": told(1, 1, 1)})
    good = write(tmp_path / "good.json", {"a": told(1.9, 1.9, 1.9)})
    bad = write(tmp_path / "bad.json", {"a": told(1, 1, 1), "new": told(1, 1, 1)})
    other = write(tmp_path / "other.json", {"b": told(1, 1, 1)})
    (tmp_path / "broken.json").write_text("{")
    runs = [good, bad, other, str(tmp_path / "broken.json"), str(tmp_path / "none.json")]
    assert [check.main([path, "--stored", stored]) for path in runs] == [0, 1, 2, 2, 2]
    said = capsys.readouterr()
    assert "LOST a: 1 (1 to 1), was 2" in said.out
    assert all(len(line.replace(str(tmp_path), "")) < 200 for line in said.err.splitlines())
    assert len(said.err.splitlines()) == 3


def test_ratios_are_turned_so_that_more_is_better():
    turned = bench.upside_down(told(0.5, 0.4, 0.8))
    assert turned == told(2.0, 1.25, 2.5)
    times = {"milliseconds": 10, "fastest": 8, "slowest": 20}
    theirs = {"milliseconds": 30, "fastest": 24, "slowest": 40}
    found = dict(bench.of_mining({"sizes": {"8 x 2": {"facescale": times, "product": theirs}}}))
    assert found == {"mining 8 x 2: product / facescale, time": told(3.0, 1.2, 5.0)}


def test_the_table_goes_between_its_marks(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{bench.BEGIN}\nold\n{bench.END}\nafter\n")
    machine = {"cpu": "a CPU", "cores": 2, "python": "3.11"}
    found = {
        "machine": machine,
        "commit": "abc+",
        "seconds": {"mining": 90},
        "ratios": {"a / b": told(1.234, 1.2, 1.3)},
    }
    for _ in range(2):
        bench.put_table(bench.table(found), readme)
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert text.count("| a / b | 1.23 | 1.20 to 1.30 |") == 1
    assert "old" not in text


def test_the_stored_ratios_are_of_benchmarks_that_exist():
    """The file that CI compares with, and the marks that `make bench` writes between."""
    stored = json.loads(check.STORED.read_text())
    assert set(stored["seconds"]) <= set(bench.JOBS)
    assert stored["ratios"]
    for mark in (bench.BEGIN, bench.END):
        assert bench.README.read_text().count(mark) == 1
