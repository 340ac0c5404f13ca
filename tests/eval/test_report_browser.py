"""The report in a real browser, without a network: it shows everything, says nothing on its console, asks for nothing.

See `tests.browser` for the browser.
"""

from pathlib import Path

import pytest
from report_stand_ins import make_images, make_results, make_retrieval, make_run

from dinov2.eval.report import write_report
from tests.browser import browser as browser  # a fixture

playwright = pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")

SIZES = {"desktop": (1280, 900), "phone": (390, 844)}
A4_WIDTH = 718  # pixels of the paper without its margins


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("report")
    run = make_run(root)
    paths = make_images(root / "more", 16)
    scores = [0.1 + 0.05 * number for number in range(16)]
    others = make_results(paths, scores, [0, 0, 1, 1] * 4, evaluator="linear", variants=("blocks=4 lr=0.1", "blocks=1"))
    others.write(root / "linear")
    make_retrieval(paths, [1, 3, 2, 9] * 4).write(root / "retrieval")
    return write_report(run, root / "report.html", results=[root / "linear", root / "retrieval"], pictures=paths[:1])


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_it_is_shown_whole_and_asks_for_nothing(
    browser: "playwright.Browser", report: Path, tmp_path: Path, size: str, dark: bool
) -> None:
    width, height = SIZES[size]
    context = browser.new_context(
        viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light", offline=True
    )
    page = context.new_page()
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("dialog", lambda dialog: (said.append(dialog.message), dialog.dismiss()))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(report.as_uri(), wait_until="load")

    images = page.evaluate("[...document.images].map(image => [image.complete, image.naturalWidth, image.alt])")
    assert len(images) >= 6
    assert all(complete and natural_width > 0 for complete, natural_width, _ in images)
    assert said == []
    assert [url for url in asked if not url.startswith(("data:", report.as_uri()))] == []

    assert page.evaluate("document.documentElement.scrollWidth") <= width  # nothing sticks out to the side
    charts = page.evaluate(
        "[...document.querySelectorAll('figure.chart > svg')].map(x => x.getBoundingClientRect().width)"
    )
    assert len(charts) >= 8
    assert min(charts) > 200
    edges = page.evaluate("[...document.querySelectorAll('figure.chart text')].map(text => text.getBBox().x)")
    assert min(edges) >= 0  # no label is cut off
    ground, ink = page.evaluate(
        "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
    )
    assert (brightness(ground) < brightness(ink)) == dark
    links = page.evaluate("[...document.links].map(link => link.getAttribute('href'))")
    assert links
    assert all(page.query_selector(link) is not None for link in links)

    page.evaluate("document.querySelectorAll('details').forEach(entry => entry.open = true)")
    tables = page.evaluate(  # one that needs to be scrolled hides numbers
        "[...document.querySelectorAll('.scroll:has(table)')].map(x => [x.scrollWidth - x.clientWidth, x.innerText])"
    )
    assert [text for hidden, text in tables if hidden > 0] == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    picture = tmp_path / f"{size}.png"
    page.screenshot(path=picture, full_page=True)
    assert picture.stat().st_size > 50_000
    context.close()


def test_it_prints_within_the_paper_and_unfolded(browser: "playwright.Browser", report: Path) -> None:
    page = browser.new_page(viewport={"width": A4_WIDTH, "height": 1000})
    page.goto(report.as_uri())
    page.emulate_media(media="print")
    assert page.evaluate("document.documentElement.scrollWidth") <= A4_WIDTH
    hidden = page.evaluate(
        "[...document.querySelectorAll('details')].filter(entry => entry.lastElementChild.offsetHeight === 0).length"
    )
    assert hidden == 0
    assert len(page.pdf(format="A4")) > 50_000
    page.close()


def brightness(colour: str) -> int:
    """Sum of the parts of ``rgb(r, g, b)``."""
    return sum(int(part) for part in colour.removeprefix("rgb(").removesuffix(")").split(","))
