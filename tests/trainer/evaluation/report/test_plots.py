import numpy as np
import pytest

from trainer.evaluation.report.charts import DASHES as PAGE_DASHES
from trainer.evaluation.report.charts import SOLID_SYMBOLS, SYMBOLS, Album, chart
from trainer.evaluation.report.figures import DASHES, MARKERS, draw, save
from trainer.evaluation.report.plots import DARK, LIGHT, Line, Panel, Plot, Style, groups, thinned
from trainer.evaluation.report.plots_results import cmc_plot, histogram_plot, identities_plot, roc_plot
from trainer.evaluation.report.plots_training import accuracy_plot, health_plot, loss_plot, throughput_plot
from trainer.evaluation.report.records import read_records
from trainer.evaluation.report.swatches import swatch


@pytest.fixture(scope="module")
def one(pictured):
    return read_records([pictured])


@pytest.fixture(scope="module")
def two(pictured, plain):
    return read_records([pictured, plain])


def line(**changes):
    x = np.arange(4.0)
    return Line(**({"label": "a", "x": x, "y": 10 * x, "style": Style(colour=0)} | changes))


def plot_of(*lines, **changes):
    return Plot(
        name="p", title="t", caption="c", alt="a", panels=[Panel(x_label="x", y_label="y", lines=lines, **changes)]
    )


def drawn(*lines, **changes):
    plot = plot_of(*lines, **changes)
    return chart(plot.panels[0], plot, Album())


def test_palettes_markers_and_dashes_are_as_many_and_all_differ():
    assert len(set(LIGHT)) == len(set(DARK)) == len(SYMBOLS) == len(set(SOLID_SYMBOLS)) == len(set(MARKERS)) == 8
    assert len(set(map(str, DASHES))) == len(set(PAGE_DASHES)) == 6


def luminance(colour):
    """Relative luminance, WCAG 2."""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_dark_colours_stand_out_from_the_dark_page():
    for colour in DARK:
        assert (luminance(colour) + 0.05) / (luminance("#171e24") + 0.05) > 4.5


def test_lines_that_share_a_panel_differ_in_more_than_colour(one, two):
    for records in (one, two):
        for made in (cmc_plot(records), roc_plot(records), histogram_plot(records), accuracy_plot(records)):
            for panel in made.panels:
                named = [line for line in panel.lines if line.label and not line.label.startswith("chance")]
                assert len({(each.kind, each.style.dash, each.style.marker) for each in named}) == len(named)


def test_one_run_has_its_sets_in_one_panel_and_several_runs_a_panel_for_each_set(one, two):
    unseen, closed = "unseen identities", "unseen images of training identities"
    assert [[series.label for series in group.series] for group in groups(one)] == [
        [unseen, closed, f"{unseen}, raw pixels", f"{closed}, raw pixels"]
    ]
    found = {group.title: [series.label for series in group.series] for group in groups(two)}
    assert found == {
        unseen: ["run (margin 0.2)", "plain (margin 0.5)", "raw pixels"],
        closed: ["run (margin 0.2)", "plain (margin 0.5)", "raw pixels"],
    }


def test_curves_hold_what_was_measured(one):
    row = next(row for row in one[0].results.rows if (row.set, row.embedder) == ("unseen identities", "facescale"))
    curves, scalars = row.result.curves, row.result.scalars
    cmc = cmc_plot(one).panels[0].lines[0]
    np.testing.assert_array_equal(cmc.y, 100 * curves["cmc"])
    np.testing.assert_array_equal(cmc.low, 100 * curves["cmc_low"])
    roc = roc_plot(one).panels[0]
    far = roc.lines[0].x / 100
    assert far[0] >= 10 / scalars["impostor_pairs"]
    np.testing.assert_array_equal(roc.lines[0].y, 100 * curves["roc_tar"][-len(far) :])
    histogram = histogram_plot(one)
    genuine, impostor, mark = histogram.panels[0].lines
    np.testing.assert_allclose([genuine.y.sum(), impostor.y.sum()], 100)
    assert mark.x[0] == scalars["verification_threshold"]
    counts = f"{curves['histogram_genuine'].sum():,} genuine and {curves['histogram_impostor'].sum():,} impostor pairs"
    assert counts in histogram.caption
    rates = identities_plot(one).panels[0].lines[0]
    np.testing.assert_array_equal(rates.y, 100 * np.sort(curves["identity_rank1"]))
    assert f"{scalars['probes']:,} probes" in cmc_plot(one).caption


def test_training_curves_of_several_margins_lie_over_each_other(two):
    loss = loss_plot(two)
    assert [panel.y_label for panel in loss.panels] == ["triplet loss", "loss / margin"]
    labels = [line.label for line in loss.legend()]
    assert labels[::2] == ["run (margin 0.2)", "plain (margin 0.5)"]
    losses = {line.label: line for line in loss.panels[0].lines}
    np.testing.assert_allclose(losses["plain (margin 0.5)"].x[-1], 256 * 4000 / 1000)
    titles = [panel.title for panel in health_plot(two).panels]
    assert titles == ["Active triplets", "Distances to the hardest", "Spread of the embeddings", "Effective rank"]
    assert "plain median 300 images/s with 2.0 % data wait" in throughput_plot(two).caption


def test_thinning_keeps_the_last_point_and_what_belongs_to_it():
    long = line(x=np.arange(5000.0), y=np.arange(5000.0), notes=[str(place) for place in range(5000)])
    short = thinned(long, 100)
    assert len(short.x) == len(short.notes) == 100
    assert (short.x[0], short.x[-1], short.notes[-1]) == (0, 4999, "4999")
    assert thinned(line(), 100).x.tolist() == [0, 1, 2, 3]


def test_a_chart_has_the_numbers_and_gaps_where_there_are_none():
    made = drawn(line(y=np.array([1.0, np.nan, 2.123456789, 3])))
    assert made["data"][0]["y"] == [1.0, None, 2.1235, 3.0]
    assert made["legend"] == [0]


def test_a_band_lies_behind_its_line_and_goes_with_its_entry():
    made = drawn(line(label="first"), line(low=np.zeros(4), high=np.ones(4)))
    assert [trace.get("fill") for trace in made["data"]] == [None, "toself", None]
    assert made["legend"] == [0, 1, 1]


def test_every_kind_of_line_becomes_a_trace_and_a_swatch():
    for kind in ("line", "steps", "points", "across", "upright"):
        each = line(kind=kind, style=Style(colour=None, dash=1, marker=7))
        assert drawn(each)["data"]
        assert "var(--grey)" in swatch(each, solid=False)
    assert drawn(line(z=np.arange(4.0), kind="points"))["data"][0]["type"] == "scatter3d"
    for marker in range(8):
        for solid in (False, True):
            assert swatch(line(kind="points", style=Style(colour=1, marker=marker)), solid).count("<") == 3


def test_ranges_of_a_logarithmic_axis_are_told_as_plotly_wants_them():
    assert drawn(line(), log_x=True, x_range=(0.1, 100))["layout"]["xaxis"]["range"] == [-1.0, 2.0]


def test_an_album_has_room_for_so_many(monkeypatch):
    monkeypatch.setattr("trainer.evaluation.report.charts.MOST_PICTURES", 2)
    album = Album()
    assert [album.number(picture) for picture in (b"a", None, b"b", b"a", b"c")] == [0, None, 1, 0, None]


def test_dollar_signs_are_no_mathematics(tmp_path):
    figure = draw(plot_of(line(label="$\\frac$ and $5"), title="$\\broken$"))
    save(figure, tmp_path / "p.png")
    assert (tmp_path / "p.png").stat().st_size > 1000


def test_hidden_lines_are_left_out_of_the_printed_figure():
    axes = draw(plot_of(line(), line(label="b", hidden=True))).axes[0]
    assert len(axes.lines) == 1
    assert drawn(line(hidden=True))["data"][0]["visible"] == "legendonly"
