"""The pictures of the documentation, from a run: `python docs/pictures.py runs/tiny`.

They are what Chromium shows of the run's report and demo, two pixels a point. Needs Chromium and
`pip install -e '.[report,demo,browser]'`.

    images/tiny_lab.png, tiny_lab_dark.png      votes and read-outs of six clips; the README's
    images/report.png                           one clip in the report's gallery
    images/demo.png                             the demo after its second example
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image  # comes with matplotlib
from playwright.sync_api import Browser, Locator, Page, sync_playwright

IMAGES = Path(__file__).parent / "images"
POINTS = 860  # width of a page: about what GitHub gives a picture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="run directory of the tiny lab")
    run = parser.parse_args().run
    with sync_playwright() as playwright:
        chromium = shutil.which("chromium") or shutil.which("google-chrome")
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        with tempfile.TemporaryDirectory() as directory, serving(run) as demo:
            subprocess.run([sys.executable, "-m", "ambijax.report", run, "--out", directory], check=True)
            report = (Path(directory) / "index.html").as_uri()
            picture(figure(visit(browser, report)), "tiny_lab")
            picture(figure(visit(browser, report, "dark")), "tiny_lab_dark")
            picture(clip(visit(browser, report)), "report")
            picture(example(visit(browser, demo)), "demo")


@contextmanager
def serving(run: Path) -> Iterator[str]:
    """The demo's address."""
    command = [sys.executable, "-m", "ambijax.demo", "--model", run, "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        yield re.search(r"http://\S+", process.stdout.readline())[0]
    finally:
        process.terminate()
        process.wait()


def visit(browser: Browser, address: str, theme: str = "light") -> Page:
    page = browser.new_page(viewport={"width": POINTS, "height": 900}, color_scheme=theme, device_scale_factor=2)
    page.goto(address)
    return page


def figure(page: Page) -> Locator:
    """The figure alone, without its heading and caption: the README has its own."""
    return page.locator("figure:has-text('Votes and read-outs') svg").first


def clip(page: Page) -> Locator:
    """The most ambiguous clip."""
    page.locator("#sort").select_option("entropy-down")
    return page.locator("article.clip").first


def example(page: Page) -> Locator:
    page.locator("#examples button").nth(1).click()
    page.locator("#state:has-text('entropy')").wait_for(timeout=600_000)
    return page.locator("body")


def picture(what: Locator, name: str) -> None:
    what.scroll_into_view_if_needed()
    what.page.wait_for_timeout(500)  # bars move, canvases are drawn when they come into view
    what.screenshot(path=IMAGES / f"{name}.png")
    Image.open(IMAGES / f"{name}.png").quantize(128).save(IMAGES / f"{name}.png", optimize=True)
    what.page.close()


if __name__ == "__main__":
    main()
