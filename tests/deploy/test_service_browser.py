"""The page of the service in a real browser: images are dropped on it, and their overlays appear."""

import base64
from collections.abc import Iterator
from pathlib import Path

import pytest

from dinov2.deploy.service import Answering
from tests.browser import browser as browser  # a fixture
from tests.deploy.service_stand_ins import FINGERPRINT, Served, png, served, stand_in_model
from tests.tasks.predictor_stand_ins import BLUE, RED

playwright = pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")

TOKEN = "s3cret"
DROP = """([name, data]) => {
    const bytes = Uint8Array.from(atob(data), letter => letter.charCodeAt(0));
    const transfer = new DataTransfer();
    transfer.items.add(new File([bytes], name, { type: "image/png" }));
    document.getElementById("drop").dispatchEvent(new DragEvent("drop", { dataTransfer: transfer, bubbles: true }));
}"""


@pytest.fixture(scope="module")
def service() -> Iterator[Served]:
    with served(stand_in_model(), Answering(version="line 3", token=TOKEN)) as running:
        yield running


@pytest.mark.parametrize("width", [1280, 390])
def test_images_are_dropped_and_overlays_appear(
    browser: "playwright.Browser", service: Served, tmp_path: Path, width: int
) -> None:
    page = browser.new_page(viewport={"width": width, "height": 900})
    said: list[str] = []
    asked: list[str] = []
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("dialog", lambda dialog: (said.append(dialog.message), dialog.dismiss()))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(service.url)
    page.wait_for_selector("#model:not(:empty)")
    assert page.inner_text("#model") == f"model line 3, fingerprint {FINGERPRINT[:12]}"

    name = "<img src=x onerror=alert(1)>.png"
    assert not page.is_visible("#token")
    page.evaluate(DROP, [name, base64.b64encode(png(RED)).decode()])
    page.wait_for_selector("figure.bad")
    assert page.inner_text("figure.bad").startswith(f"{name}: the header Authorization")
    assert page.is_visible("#token")
    page.fill("#token", TOKEN)
    page.evaluate(DROP, [name, base64.b64encode(png(RED)).decode()])
    page.wait_for_selector("figure img")
    assert page.inner_text("figure:has(img) figcaption") == f"{name}: red 1.00"

    (tmp_path / "blue.png").write_bytes(png(BLUE))
    (tmp_path / "text.png").write_text("no image")
    page.set_input_files("#files", [tmp_path / "blue.png", tmp_path / "text.png"])
    page.locator("figure.bad").nth(1).wait_for()
    captions = page.evaluate("[...document.querySelectorAll('figcaption')].map(x => x.textContent)")
    assert captions[0] == "blue.png: blue 1.00"
    assert captions[1].startswith("text.png: not an image that can be read")
    sizes = page.evaluate("[...document.images].map(image => [image.complete, image.naturalWidth])")
    assert len(sizes) == 2
    assert all(complete and natural > 100 for complete, natural in sizes)
    page.evaluate("document.querySelectorAll('details').forEach(entry => entry.open = true)")
    assert FINGERPRINT in page.inner_text("pre >> nth=0")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert said == []
    assert {url for url in asked if not url.startswith(("data:", service.url))} == set()
    page.close()
