"""The report in a real browser. What is drawn is also looked at by people: screenshots lie where FACESCALE_SHOTS says."""

import os
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from tests.browser.chromium import Looked, chromium, needs_chromium
from tests.trainer.evaluation.conftest import SCRIPT, held_out, pictured, plain  # noqa: F401
from trainer.evaluation.report.write import write_report

pytestmark = [needs_chromium, pytest.mark.timeout(600)]

PAGES = ("one", "several")


@pytest.fixture(scope="module")
def pages(pictured, plain, tmp_path_factory):  # noqa: F811
    out = tmp_path_factory.mktemp("reports")
    return {
        "one": write_report([pictured], out=out / "one") / "report.html",
        "several": write_report([pictured, plain], out=out / "several") / "report.html",
    }


@pytest.fixture(scope="module")
def browser():
    with chromium() as running:
        yield running


@pytest.fixture
def look(browser):
    opened = []

    def look(path, **context):
        opened.append(Looked(browser, path, **context))
        return opened[-1]

    yield look
    for each in opened:
        each.close()


def shot(page, name):
    folder = os.environ.get("FACESCALE_SHOTS")
    if folder:
        page.screenshot(path=Path(folder) / f"{name}.png", full_page=True)


@pytest.mark.parametrize("name", PAGES)
def test_every_chart_is_drawn_without_an_error_or_a_request(look, pages, name):
    looked = look(pages[name])
    page = looked.page
    charts = page.evaluate("JSON.parse(document.getElementById('report-data').textContent).charts")
    figures = {key.rpartition("-")[0] for key in charts}
    assert figures == {
        "loss", "accuracy", "health", "throughput", "cmc", "identities", "roc", "histogram", "tsne", "umap", "tsne3d"
    }  # fmt: skip
    for key, chart in charts.items():
        place = page.locator(f"#{key}")
        assert place.bounding_box()["height"] > 200, key
        if any(trace.get("type") == "scatter3d" for trace in chart["data"]):
            assert page.evaluate("key => document.getElementById(key).querySelectorAll('canvas').length", key), key
            assert colours(page, key) > 20, f"{key} is an empty canvas"
        else:
            drawn = "key => document.getElementById(key).querySelectorAll('.scatterlayer path[d]').length"
            assert page.evaluate(drawn, key) >= len(chart["data"]), key
    page.wait_for_timeout(300)
    shot(page, f"test_{name}")
    assert looked.errors == []
    assert looked.requests == []


def colours(page, key):
    """How many different colours a chart shows."""
    picture = page.locator(f"#{key}").screenshot()
    return len(Image.open(BytesIO(picture)).convert("RGB").getcolors(1 << 24))


@pytest.mark.parametrize("key", ["tsne-1", "umap-1"])
def test_a_point_shows_its_picture_and_its_name(look, pages, key):
    page = look(pages["one"]).page
    page.locator(f"#{key}").scroll_into_view_if_needed()
    assert page.locator("#tip").is_hidden()
    point = page.locator(f"#{key} .scatterlayer .trace").first.locator("path.point").first.bounding_box()
    page.mouse.move(point["x"] + point["width"] / 2, point["y"] + point["height"] / 2)
    page.wait_for_selector("#tip:not([hidden])")
    tip = page.locator("#tip")
    image = tip.locator("img")
    assert image.get_attribute("src").startswith("data:image/jpeg;base64,")
    assert image.evaluate("image => image.decode().then(() => image.naturalWidth)") == 24
    name, key_of_sample = tip.locator("span").inner_text().split("\n")
    assert name
    assert key_of_sample.startswith("p")
    shot(page, f"test_hover_{key}")
    page.mouse.move(2, 2)
    page.wait_for_selector("#tip", state="hidden")


def test_a_point_in_three_dimensions_shows_its_picture(look, pages):
    page = look(pages["one"]).page
    page.locator("#tsne3d-1").scroll_into_view_if_needed()
    page.wait_for_timeout(500)
    box = page.locator("#tsne3d-1").bounding_box()
    for row in range(8, 33):
        for column in range(10, 31):
            page.mouse.move(box["x"] + box["width"] * column / 40, box["y"] + box["height"] * row / 40)
            if column % 5 == 0:
                page.wait_for_timeout(25)
            if page.locator("#tip").is_visible():
                assert page.locator("#tip img").get_attribute("src").startswith("data:image/jpeg;base64,")
                return
    pytest.fail("no point of the chart showed anything")


def test_buttons_save_a_chart_here_and_none_sends_it_anywhere(look, pages):
    looked = look(pages["one"])
    page = looked.page
    titles = set(page.evaluate("[...document.querySelectorAll('.modebar-btn')].map(button => button.dataset.title)"))
    assert titles == {
        "Download plot as a PNG", "Zoom", "Pan", "Zoom in", "Zoom out", "Reset axes", "Orbital rotation",
        "Reset camera to default",
    }  # fmt: skip
    for key in ("roc-1", "tsne3d-1"):
        page.locator(f"#{key}").scroll_into_view_if_needed()
        page.locator(f"#{key}").hover()
        with page.expect_download() as saved:
            page.locator(f"#{key} .modebar-btn[data-title^=Download]").click()
        assert Path(saved.value.path()).read_bytes().startswith(b"\x89PNG")
    assert looked.errors == []


def test_names_that_look_like_markup_are_shown_and_never_run(look, pages):
    looked = look(pages["one"])
    looked.page.on("dialog", lambda dialog: looked.errors.append(dialog.message))
    assert looked.page.get_by_text(SCRIPT, exact=True).count() >= 1
    assert looked.page.get_by_text("O'Neil & sons", exact=True).count() >= 1
    assert looked.page.evaluate("document.scripts.length") == 3
    assert looked.errors == []


def background(page):
    return page.evaluate("getComputedStyle(document.body).backgroundColor")


def pen(page):
    return page.evaluate("getComputedStyle(document.querySelector('#loss-1 .scatterlayer path.js-line')).stroke")


def test_the_theme_follows_the_system_and_the_button(look, pages):
    light, dark = look(pages["one"], color_scheme="light").page, look(pages["one"], color_scheme="dark").page
    assert (background(light), background(dark)) == ("rgb(246, 247, 248)", "rgb(15, 20, 24)")
    assert (pen(light), pen(dark)) == ("rgb(0, 114, 178)", "rgb(75, 163, 227)")
    shot(dark, "test_dark")
    light.get_by_role("button", name="Dark").click()
    assert (background(light), pen(light)) == (background(dark), pen(dark))
    assert light.locator("#theme").get_attribute("aria-pressed") == "true"
    light.get_by_role("button", name="Dark").click()
    assert (background(light), pen(light)) == ("rgb(246, 247, 248)", "rgb(0, 114, 178)")
    light.emulate_media(color_scheme="dark")
    assert background(light) == "rgb(246, 247, 248)", "who has asked for light keeps it"


def test_an_entry_of_the_legend_takes_its_line_away_and_back(look, pages):
    page = look(pages["several"]).page
    lines = "document.querySelectorAll('#cmc-1 .scatterlayer path.js-line').length"
    before = page.evaluate(lines)
    entry = page.locator("#figure-cmc .legend button").first
    entry.click()
    assert entry.get_attribute("aria-pressed") == "false"
    assert page.evaluate(lines) < before
    entry.click()
    assert page.evaluate(lines) == before


@pytest.mark.parametrize("name", PAGES)
def test_a_phone_scrolls_tables_in_their_box_and_never_the_page_sideways(look, pages, name):
    phone = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
    looked = look(pages[name], **phone)
    page = looked.page
    page.wait_for_timeout(500)
    shot(page, f"test_phone_{name}")
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    assert page.evaluate("[...document.querySelectorAll('.scroll')].some(box => box.scrollWidth > box.clientWidth)")
    wide = "[...document.querySelectorAll('.chart')].filter(chart => chart.getBoundingClientRect().right > 390).length"
    assert page.evaluate(wide) == 0
    assert looked.errors == []


def test_it_prints_light_and_without_what_only_a_screen_needs(look, pages, tmp_path):
    page = look(pages["one"], color_scheme="dark").page
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    page.emulate_media(media="print")
    assert pen(page) == "rgb(0, 114, 178)"
    widths = page.evaluate(
        "[...document.querySelectorAll('main .main-svg, main table')].map(e => e.getBoundingClientRect().width)"
    )
    assert max(widths) <= 680
    assert page.locator("nav").is_hidden()
    assert page.locator("#theme").is_hidden()
    printed = page.pdf(path=tmp_path / "report.pdf", format="A4")
    assert printed.startswith(b"%PDF-")
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert pen(page) == "rgb(75, 163, 227)"
    page.emulate_media(media="screen")
    for _ in range(50):
        if page.evaluate("document.querySelector('#loss-1 .main-svg').getBoundingClientRect().width") > 900:
            return
        page.wait_for_timeout(100)
    pytest.fail("the chart stays as narrow as the paper")


def test_the_policy_stops_a_script_that_is_not_ours(look, pages, tmp_path):
    text = pages["one"].read_text(encoding="utf-8")
    spoiled = tmp_path / "spoiled.html"
    spoiled.write_text(text.replace("<main>", "<main><script>document.title = 'run'</script>", 1), encoding="utf-8")
    looked = look(spoiled)
    assert looked.page.title() != "run"
    assert any("Content Security Policy" in error for error in looked.errors)
