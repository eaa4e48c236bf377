"""The report in a browser: offline, on a screen and a phone, in dark mode, and printed."""

import re
from pathlib import Path
from typing import Any, Literal

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect

from montessori_report.compare_page import render_runs
from montessori_report.html import Page as Report
from montessori_report.run_page import render_report
from montessori_report.study_page import study_page
from support.reports import HOSTILE, write_run, write_study

EXAMPLES = 130  # per iteration: several pages
expect.set_options(timeout=30_000)
PAGES = ("report", *(pytest.param(name, marks=pytest.mark.slow) for name in ("runs", "study")))
"""The report of a run has parts of every kind."""


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Report]:
    folder = tmp_path_factory.mktemp("pages")
    texts = [f"Write number {n} about rivers & <lakes>." for n in range(EXAMPLES)]
    rich = write_run(folder / "rich", iterations=2, examples=EXAMPLES, texts=[*HOSTILE, *texts])
    other = write_run(folder / "other", warmup={"learning_rate": 2e-5})
    return {
        "report": render_report(rich),
        "runs": render_runs([rich, other]),
        "study": study_page(*write_study(folder / "study"), folder / "study"),
    }


@pytest.fixture(scope="module")
def written(reports: dict[str, Report], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("written")
    for name, report in reports.items():
        (folder / f"{name}.html").write_text(report.html, encoding="utf-8")
    return {name: folder / f"{name}.html" for name in reports}


class Visit:
    """An open page, and its errors."""

    def __init__(self, browser: Browser, path: Path, **options: Any) -> None:
        self.troubles: list[str] = []
        self.context = browser.new_context(**({"viewport": {"width": 1300, "height": 900}} | options))
        self.page: Page = self.context.new_page()
        self.page.on("console", lambda message: self.troubles.append(f"console: {message.type} {message.text}"))
        self.page.on("pageerror", lambda error: self.troubles.append(f"error: {error}"))
        self.page.on("dialog", lambda dialog: (self.troubles.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        self.page.on(
            "request", lambda request: self.troubles.append(request.url) if request.url != path.as_uri() else None
        )
        self.page.goto(path.as_uri())
        expect(self.page.locator(".plot:not(:has(.main-svg))")).to_have_count(0)  # all figures are drawn

    def __enter__(self) -> "Visit":
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("scheme", ["light", pytest.param("dark", marks=pytest.mark.slow)])
def test_page_has_no_errors_and_is_accessible(
    browser: Browser, written: dict[str, Path], name: str, scheme: Literal["light", "dark"]
) -> None:
    with Visit(browser, written[name], color_scheme=scheme) as visit:
        for folded in visit.page.locator("details.response").all()[:3]:
            folded.locator("summary").click()
        found = Axe().run(visit.page).response["violations"]
        serious = [(one["id"], one["nodes"][0]["html"]) for one in found if one["impact"] in ("serious", "critical")]
        assert not serious
        assert visit.troubles == []


@pytest.mark.slow
@pytest.mark.parametrize("name", PAGES)
def test_page_fits_a_phone(browser: Browser, written: dict[str, Path], name: str) -> None:
    with Visit(browser, written[name], viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True) as visit:
        assert visit.page.evaluate("document.documentElement.scrollWidth") == 360
        wide = visit.page.evaluate(
            "[...document.querySelectorAll('main figure, main .model, main .cards > div, main .scroll, .pager, .filter')]"
            ".filter((part) => part.getBoundingClientRect().right > 360.5).map((part) => part.outerHTML.slice(0, 80))"
        )
        assert wide == []
        assert visit.troubles == []


@pytest.mark.slow
def test_examples_can_be_searched_sorted_paged(browser: Browser, written: dict[str, Path]) -> None:
    with Visit(browser, written["report"]) as visit:
        page, rows = visit.page, visit.page.locator(".listing tbody tr")
        output, pager = page.locator(".explorer output"), page.locator(".pager span")
        expect(output).to_have_text(f"{2 * EXAMPLES} examples")
        expect(pager).to_have_text("Page 1 of 6")
        without_script = rows.all_inner_texts()
        page.get_by_role("button", name="Next").click()
        expect(pager).to_have_text("Page 2 of 6")
        assert not set(rows.all_inner_texts()) & set(without_script)
        page.get_by_role("button", name="Previous").click()
        assert rows.all_inner_texts() == without_script  # the script shows the same rows

        search = page.get_by_label("Search")
        search.fill("RIVERS number 121")  # not on the first page; words in any order
        expect(rows).to_have_count(2)
        expect(output).to_have_text(f"2 of {2 * EXAMPLES} examples")
        expect(rows.first).to_contain_text("Write number 121 about rivers & <lakes>.")
        search.fill("no such word")
        expect(rows).to_have_count(0)
        search.fill("")

        header = page.locator("th", has_text="Against student")
        values = page.locator(".listing td[data-label='Against student']")
        for direction in ("ascending", "descending"):
            header.get_by_role("button").click()
            assert header.get_attribute("aria-sort") == direction
            shown = [float(text.replace("−", "-").replace(",", "")) for text in values.all_inner_texts()]
            assert shown == sorted(shown, reverse=direction == "descending")
        page.evaluate("for (let i = 0; i < 5; i++) document.querySelector('.pager button[value=\"1\"]').click()")
        expect(values.last).to_have_text("–")  # not measured, so last in either order
        assert visit.troubles == []


@pytest.mark.guarantee("script in the report")
def test_hostile_text_stays_text(browser: Browser, written: dict[str, Path]) -> None:
    with Visit(browser, written["report"]) as visit:
        page = visit.page
        for text in HOSTILE:
            page.get_by_label("Search").fill(text.split()[0])
            for folded in page.locator(".explorer details").all()[:2]:
                folded.locator("summary").click()
        page.get_by_label("Search").fill("onerror=alert(1)>")
        expect(page.locator(".listing tbody tr")).not_to_have_count(0)
        assert (
            page.locator(".listing tbody").evaluate("(body) => body.querySelectorAll('img, script, svg, a').length")
            == 0
        )
        assert visit.troubles == []


@pytest.mark.slow
@pytest.mark.parametrize("name", PAGES)
def test_figure_data_downloads_from_page(
    browser: Browser, written: dict[str, Path], reports: dict[str, Report], name: str
) -> None:
    with Visit(browser, written[name]) as visit:
        for button in (visit.page.locator(".download").first, visit.page.locator(".download").last):
            with visit.page.expect_download() as download:
                button.click()
            slug = download.value.suggested_filename.removesuffix(".csv")
            assert Path(download.value.path()).read_text(encoding="utf-8") == reports[name].data[slug]


@pytest.mark.slow
def test_page_prints_with_every_figure(browser: Browser, written: dict[str, Path], tmp_path: Path) -> None:
    with Visit(browser, written["report"], color_scheme="dark") as visit:
        visit.page.pdf(path=tmp_path / "report.pdf", format="A4")
        printed = (tmp_path / "report.pdf").read_bytes()
        assert printed.startswith(b"%PDF")
        assert len(re.findall(rb"/Type /Page\b", printed)) > 8
        title, figure = visit.page.locator(".xtitle").first, visit.page.locator(".main-svg").first
        on_screen = title.evaluate("(text) => getComputedStyle(text).fill"), figure.bounding_box()
        visit.page.evaluate("dispatchEvent(new Event('beforeprint'))")
        expect(title).to_have_css("fill", "rgb(68, 68, 68)")  # dark on white paper
        expect(figure).to_have_attribute("width", "640")
        visit.page.evaluate("dispatchEvent(new Event('afterprint'))")
        expect(title).to_have_css("fill", on_screen[0])
        expect(figure).not_to_have_attribute("width", "640")
        assert figure.bounding_box() == on_screen[1]
        assert visit.troubles == []


def test_first_examples_show_without_javascript(browser: Browser, written: dict[str, Path]) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(written["report"].as_uri())
    expect(page.locator(".listing tbody tr")).to_have_count(50)
    expect(page.get_by_label("Search")).to_be_hidden()
    expect(page.locator(".download").first).to_be_hidden()
    context.close()


@pytest.mark.slow
def test_figures_follow_colour_mode(browser: Browser, written: dict[str, Path]) -> None:
    with Visit(browser, written["report"], color_scheme="light") as visit:
        title = visit.page.locator(".xtitle").first
        light = title.evaluate("(text) => getComputedStyle(text).fill")
        visit.page.emulate_media(color_scheme="dark")
        expect(title).not_to_have_css("fill", light)
        assert visit.troubles == []
