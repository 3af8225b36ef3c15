"""The static site: built from a clone's committed artifacts, and used in a real browser where there is one."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest

REPOSITORY = Path(__file__).parents[1]
DEADLINE = 600  # seconds, of a command
PATIENCE = 60_000  # milliseconds, of a page on a busy machine
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

SHOWS_ECE = """wanted => [...document.querySelectorAll("#chart-reliability svg text")].some(
    text => text.textContent.startsWith("ECE") && Math.abs(parseFloat(text.textContent.slice(4)) - wanted) < 0.006)"""
DRAWN_ANEW = "before => document.querySelector('#chart-curves svg').innerHTML !== before"

pytestmark = pytest.mark.whole


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The report of the committed results, built in a clone: its folder."""
    folder = tmp_path_factory.mktemp("report")
    clone, site = folder / "clone", folder / "site"
    environment = os.environ | {"PYTHONPATH": str(clone / "src")}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    for command in (
        ["git", "clone", "-q", REPOSITORY, clone],
        ["dvc", "pull", "-q", "--allow-missing"],
        [sys.executable, "-m", "compendium", "report", site],
    ):
        where = clone if clone.exists() else folder
        done = subprocess.run(command, cwd=where, env=environment, capture_output=True, text=True, timeout=DEADLINE)
        assert done.returncode == 0, done.stdout + done.stderr
    return site


def test_every_link_resolves_and_none_leaves_for_a_script_or_style(site):
    pages = sorted(site.glob("*.html"))
    assert len(pages) > 15
    for page in pages:
        html = page.read_text()
        assert not re.search(r"<(script|link|img|iframe)[^>]+(src|href)=[\"'](https?:)?//", html), page.name
        for target in re.findall(r"(?:href|src)=\"([^\"#?]+)[\"#?]", re.sub(r"(?s)<script>.*?</script>", "", html)):
            if not target.startswith(("http", "mailto:", "data:", "$")):
                assert (page.parent / unquote(target)).exists(), f"{page.name}: {target}"


def test_the_opening_page_is_small_and_holds_the_numbers(site):
    html = (site / "index.html").read_text()
    assert (site / "index.html").stat().st_size < 3e6
    assert "The answer, in the default study" in html and "Dual focal" in html and "{{" not in html.split("<script")[0]
    assert (site / "provenance.html").read_text().count("<tr") > 12
    assert len(list((site / "_downloads").rglob("*.csv"))) > 20


@pytest.fixture
def page(site):
    if BROWSER is None:
        pytest.skip("no Chromium on this machine")
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=PATIENCE)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = browser.new_page()
        page.set_default_timeout(PATIENCE)
        page.said, page.asked = [], []
        page.on("console", lambda message: page.said.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda problem: page.said.append(str(problem)))
        page.on("request", lambda request: page.asked.append(request.url))
        yield page
        browser.close()


def open_index(page, site):
    page.goto(f"file://{site}/index.html")
    page.wait_for_selector("#chart-curves svg")
    page.wait_for_selector("table.dataTable tbody tr")


def test_no_page_says_an_error_or_asks_another_machine(site, page):
    open_index(page, site)
    for path in sorted(site.glob("*.html")):
        page.goto(f"file://{path}")
    assert page.said == []
    assert [url for url in page.asked if not url.startswith(("file:", "data:", "blob:"))] == []


def test_the_table_sorts_and_filters(site, page):
    open_index(page, site)
    table = page.locator("#table-numbers")
    column = "table.dataTable tbody tr td:nth-child({})"
    for heading, wanted in (("metric", "ECE %"), ("scaling", "none")):
        table.locator("table.dataTable thead th", has_text=heading).get_by_role("button", name="Filter").click()
        page.get_by_role("dialog").get_by_role("button", name=wanted, exact=True).click()
        page.keyboard.press("Escape")
    table.locator("table.dataTable thead th", has_text="value").locator(".dt-column-title").click()
    page.wait_for_selector("th[aria-sort=ascending]")
    values = [float(text) for text in table.locator(column.format(4)).all_inner_texts()]
    assert len(values) > 5 and values == sorted(values)
    assert set(table.locator(column.format(3)).all_inner_texts()) == {"none"}
    cells = page.locator("#table-cells")
    assert cells.locator(column.format(1)).first.inner_text() == "sst"  # what was run comes first
    cells.locator("table.dataTable thead th", has_text="verdict").get_by_role("button", name="Filter").click()
    page.get_by_role("dialog").get_by_role("button", name="match", exact=True).click()
    page.keyboard.press("Escape")
    verdicts = cells.locator("table.dataTable tbody tr td:nth-last-child(2)").all_inner_texts()
    assert len(verdicts) > 3 and set(verdicts) == {"match"}


def test_the_controls_move_the_figures(site, page):
    from playwright.sync_api import expect

    open_index(page, site)
    ece = page.locator("#chart-reliability svg text", has_text="ECE")
    before = ece.text_content()
    page.locator("#chart-reliability input[type=range]").fill("2.5")
    expect(ece).not_to_have_text(before)
    scaled = ece.text_content()
    assert float(scaled.split()[1]) < float(before.split()[1])
    page.locator("#chart-reliability select").first.select_option("FLSD-53")
    expect(ece).not_to_have_text(scaled)
    page.locator("#chart-reliability select").first.select_option("Focal, γ = 3")
    page.locator("#chart-reliability input[type=range]").fill("1")
    known = json.loads((site.with_name("clone") / "figures/fashion/08_results/metrics/focal3.json").read_text())
    page.wait_for_function(SHOWS_ECE, arg=known["ece_percent"])
    lines = page.locator("#chart-curves svg").inner_html()
    page.locator("#chart-curves select").first.select_option("Test ECE")
    page.wait_for_function(DRAWN_ANEW, arg=lines)


def test_the_keyboard_suffices(site, page):
    from playwright.sync_api import expect

    open_index(page, site)
    table = page.locator("#table-numbers")
    table.get_by_role("button", name="value: Activate to sort").press("Enter")
    page.wait_for_selector("th[aria-sort=ascending]")
    table.get_by_role("button", name="Filter").last.press("Enter")
    page.get_by_role("dialog").get_by_role("button", name="fashion-seeds").press("Enter")
    page.keyboard.press("Escape")
    assert set(table.locator("table.dataTable tbody tr td:last-child").all_inner_texts()) == {"fashion-seeds"}
    ece = page.locator("#chart-reliability svg text", has_text="ECE")
    before = ece.text_content()
    page.get_by_role("slider", name="Temperature").press("ArrowRight")
    expect(ece).not_to_have_text(before)
    page.locator("#chart-curves").get_by_role("combobox", name="Loss").focus()
    page.keyboard.type("FLSD")
    expect(page.locator("#chart-curves svg .mark-line path")).to_have_count(1)


@pytest.mark.parametrize(("width", "scheme"), [(390, "light"), (390, "dark"), (1280, "light")])
def test_no_page_needs_sideways_scrolling(site, page, width, scheme):
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": 800})
    for path in sorted(site.glob("*.html")):
        page.goto(f"file://{path}")
        assert page.evaluate("document.documentElement.scrollWidth") <= width, path.name
