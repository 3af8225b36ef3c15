"""The static site: built from a clone's committed artifacts, and used in a real browser where there is one."""

import ast
import json
import re
import shutil
from urllib.parse import unquote

import pandas as pd
import pytest
import yaml
from tiny import COMPENDIUM, REPOSITORY, call

PATIENCE = 60_000  # milliseconds, of a page on a busy machine
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

HEADLINE = yaml.safe_load((REPOSITORY / "params.yaml").read_text())["active"]["headline"]

SHOWS_ECE = """([place, wanted]) => [...document.querySelectorAll(`${place} svg text`)].some(
    text => text.textContent.startsWith("ECE") && Math.abs(parseFloat(text.textContent.slice(4)) - wanted) < 0.006)"""
COLOURS = """id => {
    const cell = document.querySelector(`#${id} table.dataTable tbody td`), filled = element =>
        ["transparent", "rgba(0, 0, 0, 0)"].includes(getComputedStyle(element).backgroundColor)
            ? filled(element.parentElement) : getComputedStyle(element).backgroundColor;
    const brightness = colour => colour.match(/[0-9.]+/g).slice(0, 3).reduce((sum, part) => sum + Number(part), 0);
    return [filled(cell), getComputedStyle(cell).color].map(brightness)}"""
DRAWN_ANEW = "before => document.querySelector('#chart-curves svg').innerHTML !== before"

pytestmark = pytest.mark.whole


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The report of the committed results, built in a clone: its folder."""
    folder = tmp_path_factory.mktemp("report")
    clone, site = folder / "clone", folder / "site"
    call(folder, "git", "clone", "-q", REPOSITORY, clone)
    for command in (("dvc", "pull", "-q", "--allow-missing"), (*COMPENDIUM, "report", site)):
        assert "WARNING" not in (said := call(clone, *command)), said
    return site


def known_ece(site, loss, study=HEADLINE):
    """ECE in per cent, as chapter 8 left it."""
    folder = site.with_name("clone") / "figures" / study / "08_results" / "metrics"
    return json.loads((folder / f"{loss}.json").read_text())["ece_percent"]


def drawn_ece(site, loss):
    """ECE in per cent of the first seed, which the diagrams show, from the bins that chapter 7 left."""
    bins = pd.read_csv(site.with_name("clone") / "figures" / HEADLINE / "07_reliability/before-scaling.csv")
    bins = bins[bins.loss == loss]
    return 100 * (bins.confidence - bins.right).abs().sum() / bins.samples.sum()


def test_a_folder_that_holds_something_else_is_kept(site, tmp_path):
    (tmp_path / "notes").touch()
    said = call(site.with_name("clone"), *COMPENDIUM, "report", tmp_path, fails=True)
    assert "holds no report; name another folder" in said
    assert (tmp_path / "notes").exists()


def test_every_link_resolves_and_none_leaves_for_a_script_or_style(site):
    pages = sorted(site.glob("*.html"))
    assert len(pages) > 15
    for page in pages:
        html = page.read_text()
        assert not re.search(r"<(script|link|img|iframe)[^>]+(src|href)=[\"'](https?:)?//", html), page.name
        for target in re.findall(r"(?:href|src)=\"([^\"#?]+)[\"#?]", re.sub(r"(?s)<script>.*?</script>", "", html)):
            if not target.startswith(("http", "mailto:", "data:", "$")):
                assert (page.parent / unquote(target)).exists(), f"{page.name}: {target}"


def test_a_chapter_shows_its_parameters_once(site):
    html = (site / f"{HEADLINE}-10_evidence.html").read_text()
    assert "# Parameters" in html and "pictures then go to scratch/" not in html  # the defaults' comment


def test_the_opening_page_is_small_and_leads_with_the_headline_study(site):
    html = (site / "index.html").read_text()
    scripts = [site / source for source in re.findall(r'<script[^>]* src="([^"?]+)', html)]
    assert len(html.encode()) < 1e6 and sum(path.stat().st_size for path in scripts) + len(html.encode()) < 2.7e6
    assert "The answer, in the headline study" in html and "{{" not in re.sub(r"(?s)<script.*?</script>", "", html)
    first, cells, quick = (
        html.index(f"<h2>{title}") for title in ("The headline study", "The papers", "The quick study")
    )
    assert f">{known_ece(site, 'focal3'):.2f}" in html[first:cells]
    assert "With further trainings AdaFocal has" in html[first:cells]
    assert ">tree_lstm<" in html[cells:quick] and f">{known_ece(site, 'focal3', 'fashion'):.2f}" in html[quick:]
    captions = re.findall(r'caption-text">([^<]+)', html)
    assert captions[0].startswith(f"{HEADLINE}: ") and len(captions) == len(set(captions)) * 2 > 10  # side bar and page
    assert (site / "provenance.html").read_text().count("<tr") > 12
    assert len(list((site / "_downloads").rglob("*.csv"))) > 20


def test_the_reference_holds_every_public_function(site):
    html = (site / "reference.html").read_text()
    text = " ".join(re.sub(r"<[^>]+>", "", html).split())
    for path in (site.with_name("clone") / "src/focalcal").glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name[0] != "_":
                assert f'id="focalcal.{path.stem}.{node.name}"' in html, node.name
    assert "-(1 - p + p_j)^gamma log p [T, eq. 6]." in text and "|mean probability - share of labels| [H]" in text
    assert "``" not in text and "Alias for field" not in text


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
    assert cells.locator(column.format(7)).first.inner_text()  # what was run comes first
    cells.locator("table.dataTable thead th", has_text="verdict").get_by_role("button", name="Filter").click()
    page.get_by_role("dialog").get_by_role("button", name="match", exact=True).click()
    page.keyboard.press("Escape")
    verdicts = cells.locator(column.format(8)).all_inner_texts()
    assert len(verdicts) > 3 and set(verdicts) == {"match"}


def test_the_controls_move_the_figures(site, page):
    from playwright.sync_api import expect

    open_index(page, site)
    ece, temperature = page.locator("#reliability-1 svg text", has_text="ECE"), page.locator("#temperature")
    before = ece.text_content()
    temperature.fill("2.5")
    expect(ece).not_to_have_text(before)
    scaled = ece.text_content()
    assert float(scaled.split()[1]) < float(before.split()[1])
    page.locator("#loss-1").select_option("FLSD-53")
    expect(ece).not_to_have_text(scaled)
    page.locator("#loss-1").select_option("Focal, γ = 3")
    temperature.fill("1")
    page.wait_for_function(SHOWS_ECE, arg=["#reliability-1", drawn_ece(site, "focal3")])
    lines = page.locator("#chart-curves svg").inner_html()
    page.locator("#chart-curves select").first.select_option("Test ECE")
    page.wait_for_function(DRAWN_ANEW, arg=lines)


def test_a_second_loss_stands_beside_the_first(site, page):
    from playwright.sync_api import expect

    open_index(page, site)
    one, other, column = (
        page.locator("#reliability-1"),
        page.locator("#reliability-2"),
        page.locator("#chart-reliability"),
    )
    expect(other).to_be_hidden()
    assert one.locator("svg").bounding_box()["width"] > 0.95 * column.bounding_box()["width"]
    page.locator("#loss-2").select_option("AdaFocal")
    page.wait_for_function(SHOWS_ECE, arg=["#reliability-2", drawn_ece(site, "adafocal")])
    page.wait_for_function(SHOWS_ECE, arg=["#reliability-1", drawn_ece(site, "cross_entropy")])
    expect(one.locator("svg text", has_text="confident by")).to_have_text(
        re.compile("^over-confident by [0-9.]+ points$")
    )
    left, right = (place.locator("svg").bounding_box() for place in (one, other))
    assert left["y"] == right["y"] and left["x"] + left["width"] <= right["x"] + 1
    samples = one.locator("svg .mark-text text", has_text=re.compile("^[0-9]+$")).all_text_contents()
    assert sum(map(int, samples)) == 10_000
    page.locator("#loss-2").select_option("none")
    expect(other).to_be_hidden()


@pytest.mark.parametrize(("scheme", "chosen"), [("dark", "auto"), ("dark", "light"), ("light", "dark")])
def test_tables_follow_the_theme(site, page, scheme, chosen):
    page.emulate_media(color_scheme=scheme)
    open_index(page, site)
    page.evaluate("chosen => document.body.dataset.theme = chosen", chosen)
    dark = "dark" in (chosen, scheme if chosen == "auto" else "")
    background, text = page.evaluate(COLOURS, "table-numbers")  # each the sum of red, green and blue
    assert background < 150 and text > 500 if dark else background > 600 > text
    icons = page.evaluate("getComputedStyle(document.documentElement).getPropertyValue('--dtcc-button-icon_color')")
    assert ("white" in icons) == dark


def test_the_keyboard_suffices(site, page):
    from playwright.sync_api import expect

    open_index(page, site)
    table = page.locator("#table-numbers")
    table.get_by_role("button", name="value: Activate to sort").press("Enter")
    page.wait_for_selector("th[aria-sort=ascending]")
    table.get_by_role("button", name="Filter").last.press("Enter")
    page.get_by_role("dialog").get_by_role("button", name="sst").press("Enter")
    page.keyboard.press("Escape")
    assert set(table.locator("table.dataTable tbody tr td:last-child").all_inner_texts()) == {"sst"}
    ece = page.locator("#chart-reliability svg text", has_text="ECE")
    before = ece.text_content()
    page.get_by_role("slider", name="Temperature").press("ArrowRight")
    expect(ece).not_to_have_text(before)
    page.locator("#chart-curves").get_by_role("combobox", name="Loss").focus()
    page.keyboard.type("FLSD")
    expect(page.locator("#chart-curves svg .mark-line path")).to_have_count(1)


@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (1280, "light")])
def test_no_page_needs_sideways_scrolling(site, page, width, scheme):
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": 800})
    for path in sorted(site.glob("*.html")):
        page.goto(f"file://{path}")
        assert page.evaluate("document.documentElement.scrollWidth") <= width, path.name


def test_after_make_results_it_is_built_of_what_is_there(site):
    """Last, since it takes away from the clone what only `make everything` and `make artifacts` leave."""
    clone = site.with_name("clone")
    for folder in (clone / "artifacts").iterdir():
        if folder.name not in ("fashion", HEADLINE, "stripped"):
            shutil.rmtree(folder)
    less = site.with_name("less")
    assert "WARNING" not in (said := call(clone, *COMPENDIUM, "report", less)), said
    pages = {path.name for path in less.glob("*.html")}
    assert "fashion-08_results.html" in pages and not any(page.startswith(("sst", "papers")) for page in pages)
    assert ".ipynb" not in re.sub(r"(?s)<script.*?</script>", "", (less / "index.html").read_text())
