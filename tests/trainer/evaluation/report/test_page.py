import json
import re
from base64 import b64encode
from hashlib import sha256
from html.parser import HTMLParser
from itertools import pairwise

import numpy as np
import pytest

from tests.trainer.evaluation.conftest import SCRIPT
from trainer.evaluation.report.page import page_html
from trainer.evaluation.report.plots import Line, Panel, Plot, Style
from trainer.evaluation.report.plots_results import identities_plot, roc_plot
from trainer.evaluation.report.records import read_records

VOID = {"meta", "link", "img", "br", "input", "path", "circle", "rect", "polygon"}


class Outline(HTMLParser):
    """What of a page can be checked without a browser."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.text, self.scripts = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)
        elif self.open and self.open[-1] != "style":
            self.text.append(data.strip())

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def records(pictured):
    return read_records([pictured])


@pytest.fixture(scope="module")
def text(records):
    cloud = {"x": np.arange(3.0), "y": np.arange(3.0), "style": Style(colour=0, marker=0), "kind": "points"}
    lines = [Line(label=SCRIPT, notes=["a", "b", "c"], pictures=[b"jpeg", None, b"jpeg"], **cloud)]
    words = {"title": "<i>t</i>", "caption": "<i>c</i>", "alt": '"><i>a</i>'}
    tsne = Plot(name="tsne", panels=[Panel(x_label="x", y_label="y", lines=lines)], legend_title="<i>", **words)
    return page_html(records, [roc_plot(records), identities_plot(records), tsne])


@pytest.fixture(scope="module")
def page(text):
    return Outline(text)


def test_every_element_is_closed_and_headings_do_not_skip_a_level(page):
    assert page.open == []
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))


def test_language_title_and_contents(page):
    assert page.all("html")[0]["lang"] == "en"
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = [link["href"] for link in page.all("a")]
    assert {"#summary", "#identification", "#verification", "#embeddings", "#pictures", "#how"} <= set(targets)
    assert {target[1:] for target in targets} <= set(ids)


def test_every_picture_chart_and_table_is_told_in_words(page):
    assert all(picture["alt"] for picture in page.all("img") if "src" in picture)
    charts = [attributes for attributes in page.all("div") if attributes.get("role") == "img"]
    assert len(charts) == 3
    assert all(chart["aria-label"] for chart in charts)
    tables = len(page.all("table"))
    assert len(page.all("caption")) == tables > 3


def test_nothing_is_loaded_from_anywhere(page, text):
    for _, attributes in page.elements:
        for name in ("src", "href", "srcset", "data", "action"):
            target = attributes.get(name) or "#"
            assert target.startswith(("#", "data:")), target
    style = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style


def test_the_policy_admits_these_scripts_and_no_other(page):
    policy = next(meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    data, *scripts = page.scripts
    hashes = [f"'sha256-{b64encode(sha256(script.encode()).digest()).decode()}'" for script in scripts]
    assert rules["script-src"].split() == hashes
    assert rules["img-src"] == "data: blob:"
    json.loads(data)


def test_no_name_becomes_markup(page, text):
    assert "<i>" not in text
    assert SCRIPT not in text
    assert len(page.all("script")) == 3
    assert any(SCRIPT in words for words in page.text)
    assert any("O'Neil & sons" in words for words in page.text)
    traces = [trace for chart in json.loads(page.scripts[0])["charts"].values() for trace in chart["data"]]
    told = json.dumps([(trace["name"], trace.get("text")) for trace in traces])
    assert "<script" not in told
    assert "&lt;script&gt;" in told


def test_a_picture_stands_in_the_data_once(page):
    found = json.loads(page.scripts[0])
    assert found["pictures"] == ["data:image/jpeg;base64,anBlZw=="]
    assert found["charts"]["tsne-1"]["data"][0]["customdata"] == [["a", 0], ["b", None], ["c", 0]]


def test_published_values_stand_apart(text):
    ours, published = text.split('<tbody class="published">', 1)
    assert "79.55 %" not in ours
    assert published.index("published, not ours") < published.index("79.55 %")


def test_hardest_pictures_are_there_with_their_distances(page, records):
    examples = records[0].results.examples
    assert f"distance {examples.genuine[0].distance:.3f}" in page.text
    assert f"distance {examples.impostor[0].distance:.3f}" in page.text
    miss = examples.misses[0]
    wanted = f"rank {miss.rank}; right at {miss.right_distance:.2f}, found at {miss.found_distance:.2f}"
    assert wanted in page.text
    pictures = [picture for picture in page.all("img") if "src" in picture]
    assert len(pictures) == 2 * len(examples.genuine + examples.impostor) + 3 * len(examples.misses)
    assert any(f"{examples.missed:,} of {examples.probes:,} probes are missed" in words for words in page.text)


def test_a_run_without_pictures_has_no_gallery(plain):
    page = Outline(page_html(read_records([plain]), []))
    assert "#pictures" not in [link["href"] for link in page.all("a")]
    assert page.open == []


def test_tiles_name_the_best_of_several_runs(pictured, plain):
    page = Outline(page_html(read_records([pictured, plain]), []))
    assert page.text.count("best: run") + page.text.count("best: plain") == 4
