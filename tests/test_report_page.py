"""The report's page in a real browser: the system's Chromium, driven by playwright; skipped where either is missing."""

import re
import shutil
import time
from pathlib import Path

import pytest

from tests import made_runs as runs
from tests.test_report import HOSTILE, _write

playwright = pytest.importorskip("playwright.sync_api", reason="needs pip install -e '.[browser]'")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium, for example apt-get install chromium")


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--mute-audio"])
        yield chromium
        chromium.close()


class Visit:
    """A page opened from its file, and everything that went out or went wrong meanwhile."""

    def __init__(self, browser, path: Path, **options) -> None:
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page = browser.new_context(offline=True, **options).new_page()
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())

    def until(self, condition: str) -> None:
        """Waits for a JavaScript condition; playwright's own way of it is what the page's policy forbids."""
        deadline = time.monotonic() + 20
        while not self.page.evaluate(condition):
            assert time.monotonic() < deadline, condition
            time.sleep(0.02)

    def ids(self) -> list[str]:
        return self.page.locator("#clips h3").all_text_contents()

    def numbers(self, what: str) -> list[float]:
        return [float(re.search(what, text)[1]) for text in self.page.locator("#clips header").all_text_contents()]


@pytest.fixture(scope="module")
def thousand(browser, tmp_path_factory) -> Visit:
    """The report of a run on a thousand clips."""
    root = tmp_path_factory.mktemp("thousand")
    _write([runs.run(root / "run", runs.corpus(root / "corpus", 1000, speakers=25))], root / "out")
    visit = Visit(browser, root / "out/index.html")
    yield visit
    assert visit.complaints == []  # a violation of the policy would be one
    assert all(url.startswith("file://") for url in visit.requests)


@pytest.fixture
def fresh(thousand) -> Visit:
    thousand.page.get_by_role("button", name="Clear").click()
    thousand.until("document.getElementById('count').textContent.includes('of 1000')")
    return thousand


def test_a_thousand_clips_are_shown_a_page_at_a_time(fresh):
    page = fresh.page
    assert page.locator("#count").text_content() == "1–12 of 1000 clips"
    assert page.locator(".clip canvas").count() == 2 * 12
    assert page.evaluate("document.querySelectorAll('*').length") < 10_000
    first = fresh.ids()
    page.locator("#next").click()
    assert page.locator("#count").text_content() == "13–24 of 1000 clips"
    assert not set(first) & set(fresh.ids())
    page.locator("#previous").click()
    assert fresh.ids() == first


def test_sorting(fresh):
    page = fresh.page
    entropy = r"entropy ([\d.]+)"
    page.locator("#sort").select_option("entropy-down")
    down = fresh.numbers(entropy)
    assert down == sorted(down, reverse=True)
    page.locator("#sort").select_option("entropy-up")
    assert max(fresh.numbers(entropy)) <= min(down)
    page.locator("#sort").select_option("js-down")
    worst = fresh.numbers(r"([\d.]{4})$")  # the last figure of a header is the trained model's JS
    assert worst == sorted(worst, reverse=True)
    page.locator("#system").select_option(label="base")
    worst = fresh.numbers(r"JS([\d.]{4})")
    assert worst == sorted(worst, reverse=True)
    page.locator("#sort").select_option("speaker")
    assert {re.search(r"speaker (\w+)", t)[1] for t in page.locator("#clips .meta").all_text_contents()} == {"s0"}


def test_filtering(fresh):
    page = fresh.page
    page.locator("#speaker").select_option("s7")
    assert page.locator("#count").text_content() == "1–12 of 40 clips"
    page.locator("#class").select_option(label="fear")
    assert all(text == "fear" for text in page.locator("#clips .label.majority").all_text_contents())
    page.get_by_role("button", name="Clear").click()
    page.locator("#js-least").fill("0.2")
    page.locator("#js-most").fill("0.3")
    assert all(0.195 <= js <= 0.305 for js in fresh.numbers(r"([\d.]{4})$"))
    page.get_by_role("button", name="Clear").click()
    page.locator("#entropy-least").fill("2")
    assert min(fresh.numbers(r"entropy ([\d.]+)")) >= 2
    page.locator("#find").fill("clip0123")
    assert set(fresh.ids()) <= {"clip0123"}
    page.locator("#find").fill("no such clip")
    assert page.locator("#count").text_content() == "No clip fits."


def test_playing_and_seeking(fresh):
    page = fresh.page
    page.evaluate("player.addEventListener('playing', () => { window.played = player.src; })")
    page.get_by_role("button", name="Play clip").first.click()
    fresh.until("window.played && player.currentTime > 0")
    assert page.evaluate("window.played").endswith(".wav")
    fresh.until("player.ended")
    slider = page.get_by_role("slider").nth(1)
    slider.focus()
    page.keyboard.press("ArrowRight")  # takes the player over and moves it
    fresh.until("player.currentTime > 0.1")
    assert float(slider.get_attribute("aria-valuenow")) == pytest.approx(0.2)


def test_a_dot_leads_to_its_clip(fresh):
    page = fresh.page
    dot = page.locator('[id="points-1"] use').nth(5)
    wanted = dot.locator("title").text_content().split(":")[0]
    dot.dispatch_event("click")
    assert fresh.ids() == [wanted]


def test_the_group_of_a_step(fresh):
    page = fresh.page
    assert page.locator("#group option").count() == 24
    page.locator("#group").select_option("23")
    assert "step 999" in page.locator("#rollout").text_content()
    assert page.locator("#rollout tbody tr").count() == 3
    assert "curated" in page.locator("#rollout tbody").text_content()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_nothing_is_wider_than_the_screen_and_text_can_be_read(browser, thousand, width, scheme):
    path = Path(thousand.page.url.removeprefix("file://"))
    visit = Visit(browser, path, viewport={"width": width, "height": 800}, color_scheme=scheme)
    assert visit.page.evaluate("document.documentElement.scrollWidth") <= width
    ink, paper = (
        visit.page.evaluate(f"getComputedStyle(document.body).{name}.match(/[0-9.]+/g).slice(0, 3).map(Number)")
        for name in ("color", "backgroundColor")
    )
    assert _contrast(ink, paper) > 7  # WCAG AAA
    assert visit.complaints == []
    visit.page.close()


def test_what_was_dark_is_printed_in_ink_with_every_picture(browser, thousand):
    visit = Visit(browser, Path(thousand.page.url.removeprefix("file://")), color_scheme="dark")
    undrawn = "[...document.querySelectorAll('.mel')].filter((canvas) => canvas.width === 300).length"
    assert visit.page.evaluate(undrawn) == 0  # also those out of view
    for theme in ("light", "dark"):
        visit.page.locator("#theme").click()
        assert visit.page.locator("html").get_attribute("data-theme") == theme
    visit.page.emulate_media(media="print")
    ink = visit.page.evaluate("getComputedStyle(document.body).color.match(/[0-9.]+/g).slice(0, 3).map(Number)")
    assert _contrast(ink, [255, 255, 255]) > 7  # browsers leave the page's background out
    visit.page.close()


def _contrast(a: list[float], b: list[float]) -> float:
    """Contrast ratio of two sRGB colours (WCAG 2.1)."""

    def luminance(color: list[float]) -> float:
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (x / 255 for x in color)]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_hostile_text_is_shown_and_does_nothing(browser, tmp_path):
    corpus = runs.corpus(tmp_path / "corpus", 6, hostile=HOSTILE)
    _write([runs.run(tmp_path / "run", corpus, hostile=HOSTILE)], tmp_path / "out")
    visit = Visit(browser, tmp_path / "out/index.html")
    assert visit.page.locator("#clips .said").first.text_content().endswith(f"{HOSTILE}”")
    assert HOSTILE in visit.page.locator("#clips h3").first.text_content()
    assert "high pitch</script>" in visit.page.locator(".steps").first.text_content()
    assert visit.page.evaluate("window.taken") is None
    assert visit.page.locator("img").count() == 0
    assert visit.page.locator("script").count() == 2
    assert visit.complaints == []


def test_the_policy_stops_what_is_injected_all_the_same(browser, thousand):
    """Were a fence broken, the policy would still stand: scripts, handlers, styles, requests."""
    page = Visit(browser, Path(thousand.page.url.removeprefix("file://"))).page
    page.evaluate("""() => {
      const script = document.createElement('script');
      script.textContent = 'window.taken = 1';
      document.body.append(script);
      const injected = '<img src=x onerror="window.taken = 2"><b onclick="window.taken = 3" id=b>b</b>';
      document.body.insertAdjacentHTML('beforeend', injected);
      document.getElementById('b').click();
    }""")
    assert page.evaluate("fetch('https://example.org').then(() => 'sent', () => 'refused')") == "refused"
    assert page.evaluate("window.taken") is None
