"""The report in a real browser: what it shows, what it asks the network for, and how it fits a phone."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import dcafy
from dcafy.analysis.listening import ConnectionUsage, Effect, Usage
from dcafy.report import EpochLog, make_report, prepared_for

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install 'dcafy[dev]'")
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

pytestmark = [
    pytest.mark.skipif(BROWSER is None, reason="there is no Chromium: apt install chromium"),
    pytest.mark.xdist_group("browser"),
]

SECTIONS = {
    "answer": "In short",
    "training": "Training",
    "network": "The network",
    "words": "The words",
    "values": "Attention values",
    "where": "Where it looks",
    "connections": "Connections",
    "numbers": "Numbers",
}


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with everything in it: both dimensions, broken images, epochs, names that are markup."""
    root = tmp_path_factory.mktemp("report")
    images = root / "images"
    images.mkdir()
    for i in range(2):
        values = np.random.default_rng(i).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(values).save(images / f"<b>a long name of an image without any blanks{'x' * 60}{i}.png")
    (images / "<script>alert(1)<.png").write_bytes(b"broken")
    torch.manual_seed(0)
    model = dcafy.convert(dcafy.insert(torchvision.models.resnet18(), "cbam", init="paper"), verify=False)
    with torch.no_grad():
        for connection in dcafy.connections(model).values():
            connection.beta.fill_(0.5)
    over = dict.fromkeys(dcafy.connections(model), (0.1, 0.2))
    output = root / "report.html"
    how = prepared_for(model, image_size=64)
    curves = {"training loss": (2.0, 1.0), "loss": (2.0, 1.5), "top1": (0.1, 0.2)}
    effects = [Effect(loss, 0.0123, -loss / 10, 0.0012, 100) for loss in (0.1234, 0.0012, -0.1)]
    rows = [
        ConnectionUsage(name, "channel", 1.0, 0.5, 1 / 3, 0.2, 0.1 * (i % 9), 1.5, *(effects[i % 3],) * 3)
        for i, name in enumerate(over)
    ]
    usage = Usage(300, 1.0, 0.5, tuple(rows), *(effects[0],) * 3)
    log = EpochLog((1, 2), over, curves, usage)
    make_report(model, images, output, title="<i>title", how=how, epochs=log)
    return output


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        # In a container Chromium's own sandbox may not be had.
        opened = started.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield opened
        opened.close()


class Visit:
    """A page, and what it said and asked for while it was opened."""

    def __init__(self, browser: Any, path: Path, **options: Any) -> None:
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page = browser.new_page(**options)
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("dialog", lambda dialog: self.said.append(dialog.message) or dialog.dismiss())
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(path.as_uri())


SIZES = {"phone": {"width": 375, "height": 700}, "desk": {"width": 1280, "height": 900}}


@pytest.mark.parametrize(
    ("size", "scheme"),
    [
        ("phone", "light"),
        ("desk", "dark"),
        pytest.param("phone", "dark", marks=pytest.mark.slow),
        pytest.param("desk", "light", marks=pytest.mark.slow),
    ],
)
def test_page_is_whole_quiet_and_fits(browser: Any, report: Path, size: str, scheme: str) -> None:
    visit = Visit(browser, report, viewport=SIZES[size], color_scheme=scheme)
    page = visit.page
    for name, title in SECTIONS.items():
        assert page.locator(f"section#{name} h2").inner_text() == title
        assert page.locator(f"section#{name}").is_visible()
    assert visit.said == []
    assert [url for url in visit.asked if not url.startswith("data:")] == [report.as_uri()]
    assert page.evaluate("document.documentElement.scrollWidth") <= SIZES[size]["width"]
    assert page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    assert page.locator("section#values figure svg").count() == 16
    for text in page.locator("svg text:visible").all()[:20]:
        assert text.bounding_box()["height"] > 8  # legible
    # one of the two directions of the network, which is as wide as there is room for
    shown = [page.locator(f"figure.{kind} svg").is_visible() for kind in ("across", "down")]
    assert shown == [size == "desk", size == "phone"]
    colours = page.evaluate("[...document.querySelectorAll('.down .line')].map(line => line.getAttribute('stroke'))")
    assert set(colours) == {"#C2187A", "#8E8E93", "#56B4E9"}  # costs, within chance, better without
    # a number stands on one line
    numbers = page.evaluate(
        "[...document.querySelectorAll('td.number')].map(cell => { const all = document.createRange();"
        "all.selectNodeContents(cell); return new Set([...all.getClientRects()].map(r => r.top)).size })"
    )
    assert len(numbers) > 100
    assert page.locator("td.number", has_text="+0.1234 ± 0.0123").count() > 10
    assert set(numbers) == {1}
    drawing = "getComputedStyle(document.querySelector('figure > svg')).color"
    ink, paper = page.evaluate(f"[{drawing}, getComputedStyle(document.body).backgroundColor]")
    assert (brightness(ink) > brightness(paper)) is (scheme == "dark")
    page.close()


def brightness(colour: str) -> float:
    return sum(float(part) for part in colour.strip("rgb()").split(","))


def test_hover_focus_and_tap_tell_what_it_is(browser: Any, report: Path) -> None:
    visit = Visit(browser, report, viewport=SIZES["desk"])
    tip = visit.page.locator("#tip")
    assert not tip.is_visible()
    arc = visit.page.locator(".arc:visible").last
    arc.hover()
    assert tip.inner_text().startswith(arc.get_attribute("data-tip").partition("\n")[0])
    assert "β 0.5, contribution 33.3%, message share" in tip.inner_text()
    assert "cut: the loss changes by" in tip.inner_text()
    visit.page.mouse.move(0, 0)
    assert not tip.is_visible()
    visit.page.locator(".block:visible").first.focus()
    assert "channel attention, 64 channels" in tip.inner_text()
    visit.page.keyboard.press("Escape")
    assert not tip.is_visible()
    visit.page.close()
    visit = Visit(browser, report, viewport=SIZES["phone"], has_touch=True)
    visit.page.locator(".block:visible").nth(1).tap()
    box = visit.page.locator("#tip").bounding_box()
    assert box is not None
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 375
    assert visit.page.locator(".panel:target").count() == 0  # the first tap tells, the second one goes there
    visit.page.locator(".block:visible").nth(1).tap()
    assert visit.page.locator(".panel:target").count() == 1
    visit.page.close()


def test_words_are_explained_where_they_stand(browser: Any, report: Path) -> None:
    visit = Visit(browser, report, viewport=SIZES["phone"], has_touch=True)
    word = visit.page.locator("#connections a.term", has_text="message share")
    word.tap()
    assert visit.page.locator("#tip").inner_text().startswith("message share: ‖β·T̃‖")
    assert "#word" not in visit.page.url
    visit.page.close()


def test_tables_sort(browser: Any, report: Path) -> None:
    visit = Visit(browser, report, viewport=SIZES["desk"])
    table = visit.page.locator("#connections table").first
    before = table.locator("tbody tr td:first-child").all_inner_texts()
    share = table.locator("th button", has_text="message share")
    for order in (1, -1):
        share.click()
        shares = [float(text.rstrip("%")) for text in table.locator("tbody tr td:nth-child(6)").all_inner_texts()]
        assert shares == sorted(shares)[::order]
        assert len(set(shares)) > 3
    assert sorted(table.locator("tbody tr td:first-child").all_inner_texts()) == sorted(before)
    name = table.locator("th button", has_text="connection")
    name.click()
    assert table.locator("tbody tr td:first-child").all_inner_texts() == sorted(before)
    assert visit.said == []
    visit.page.close()


@pytest.mark.parametrize("size", SIZES)
def test_a_click_on_a_block_leads_to_its_values_and_its_row(browser: Any, report: Path, size: str) -> None:
    visit = Visit(browser, report, viewport=SIZES[size])
    block = visit.page.locator(".block:visible").nth(3)
    name = block.get_attribute("data-tip").partition("\n")[0]
    block.locator("circle").click()
    panel = visit.page.locator(".panel:target")
    assert panel.locator("b").inner_text() == name
    assert visit.page.locator("tr.chosen td:first-child").inner_text().startswith(name)
    panel.locator("a.to-row").click()
    assert visit.page.locator("tr:target td:first-child").inner_text().startswith(name)
    visit.page.close()


def test_maps_are_switched_and_shown_in_full(browser: Any, report: Path) -> None:
    visit = Visit(browser, report, viewport=SIZES["desk"], java_script_enabled=False)
    for kind in ("on", "off", "difference"):
        visit.page.locator(f"label[for=show-{kind}]").click()
        shown = {
            other: visit.page.locator(f".cams .{other}").first.is_visible() for other in ("on", "off", "difference")
        }
        assert shown == {other: other == kind for other in shown}
    small = visit.page.locator(".cams .difference img").first
    before = small.bounding_box()["width"]
    small.click()
    assert small.bounding_box()["width"] > 3 * before
    small.click()
    assert small.bounding_box()["width"] == before
    assert visit.page.locator("th button").count() == 0  # nothing to sort with
    assert visit.page.locator("a.term").first.get_attribute("title") is not None
    visit.page.close()


def test_data_can_be_saved(browser: Any, report: Path) -> None:
    visit = Visit(browser, report, accept_downloads=True)
    with visit.page.expect_download() as started:
        visit.page.locator("section#connections > a.download").first.click()
    saved = Path(started.value.path()).read_text(encoding="utf-8")
    assert started.value.suggested_filename == "connections.csv"
    assert len(saved.splitlines()) == 15
    assert saved.startswith("connection,source,target")
    visit.page.close()


def test_page_prints(browser: Any, report: Path) -> None:
    visit = Visit(browser, report)
    assert len(visit.page.pdf()) > 20_000
    visit.page.emulate_media(media="print")
    assert not visit.page.locator("nav").is_visible()
    visit.page.close()


def test_markup_in_names_is_shown_and_not_run(browser: Any, report: Path) -> None:
    visit = Visit(browser, report)
    assert visit.page.locator("h1").inner_text() == "<i>title"
    assert "<script>alert(1)<.png" in visit.page.locator("body").inner_text()
    assert visit.page.locator("script").count() == 1
    assert visit.said == []
    visit.page.close()


def test_the_checks_can_fail(browser: Any, report: Path, tmp_path: Path) -> None:
    text = report.read_text(encoding="utf-8")
    worse = tmp_path / "worse.html"
    bad = '<img src="http://localhost:9/x.png"><p style="width: 2000px">x</p><script>alert("run")</script></body>'
    worse.write_text(text.replace("</body>", bad), encoding="utf-8")
    visit = Visit(browser, worse, viewport=SIZES["phone"])
    assert len(visit.said) >= 2  # the page's own policy refuses the image and the script
    assert not any(said == "run" for said in visit.said)
    assert visit.page.evaluate("document.documentElement.scrollWidth") > 375
    visit.page.close()
