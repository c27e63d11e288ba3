"""The report of a real run in a real browser: headless Chromium, at two widths, light and dark."""

import itertools
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Request, sync_playwright

from chaos_tests.conftest import StartScenario
from chaos_tests.scenario import first_member
from tests.services.fixtures import left_out

pytestmark = pytest.mark.chaos

WIDTHS = (390, 1280)
SCHEMES = ("light", "dark")
FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
FIGURES = {
    "headline": ".tile",
    "loss": "svg path.curve",
    "nodes": "svg rect.member",
    "goodput": ".track i",
    "failures": ".failure-card .stack i",
    "checkpoints": "svg path.curve",
    "throughput": "svg path.curve",
    "mixture": ".track i",
    "configuration": "td",
    "definitions": "dt",
}
"""What each section must have: a selector by the section's id."""
TEXT_TOO_WIDE = """() => [...document.querySelectorAll('svg text')].filter(text => {
  const outer = text.ownerSVGElement.getBoundingClientRect(), inner = text.getBoundingClientRect();
  return inner.width && (inner.left < outer.left - 1 || inner.right > outer.right + 1);
}).map(text => text.textContent)"""
OVERLAPS = """() => [...document.querySelectorAll('svg')].flatMap(svg => {
  const found = [...svg.querySelectorAll('text')].map(each => [each.textContent, each.getBoundingClientRect()]);
  return found.flatMap(([one, a], index) => found.slice(index + 1).filter(([, b]) => a.width && b.width &&
    a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 2 && b.top < a.bottom - 2).map(([other]) => [one, other]));
})"""


@pytest.fixture
def chromium() -> Iterator[Browser]:
    """A headless Chromium."""
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        left_out("the report in a browser, since chromium is not installed")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=list(FLAGS))
        yield browser
        browser.close()


def test_report_of_a_run_with_a_kill_and_a_join(
    start: StartScenario, reference_digest: str, chromium: Browser
) -> None:
    """The page of a disturbed run opens without errors or requests, each section has its figures, and nothing is cut off."""
    run = start("elastic.nodes_max=3", "telemetry.price_per_hour=3.0")
    for node in ("node-0", "node-1", "node-2", "node-3"):
        run.fleet.start(node)
    run.until_step(9, nodes=3)
    lost = first_member(run.generation())
    run.fleet.kill(lost)
    run.until_step(16, nodes=3)
    run.finish()
    run.check_whole(reference_digest)
    out = run.directory / "report.html"
    command = [sys.executable, "-m", "elastic_pt", "report", run.store.url, "--out", str(out)]
    told = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    assert told.returncode == 0, told.stderr
    for width, scheme in itertools.product(WIDTHS, SCHEMES):
        look(chromium, out, width, scheme, lost)


def look(browser: Browser, out: Path, width: int, scheme: str, lost: str) -> None:
    """Open the page, check it, and leave a picture beside it."""
    page = browser.new_page(viewport={"width": width, "height": 900})
    page.emulate_media(color_scheme="dark" if scheme == "dark" else "light")
    troubles: list[str] = []
    requests: list[str] = []

    def note(message: ConsoleMessage) -> None:
        troubles.append(message.text)

    def count(request: Request) -> None:
        requests.append(request.url)

    page.on("console", note)
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on("request", count)
    page.goto(out.as_uri())
    page.screenshot(path=str(out.with_name(f"report-{width}-{scheme}.png")), full_page=True)
    assert troubles == []
    assert requests == [out.as_uri()]
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for section, figure in FIGURES.items():
        shown = page.locator(f"#{section} {figure}").locator("visible=true")
        assert shown.count() > 0, (width, scheme, section)
    assert page.evaluate(TEXT_TOO_WIDE) == []
    assert page.evaluate(OVERLAPS) == []
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, ground[4:-1].split(","))) < 200) == (scheme == "dark")
    assert page.locator(".failure-card").count() == 1
    assert f"lost {lost}" in page.locator(".failure-card .cause").inner_text()
    page.close()
