"""The demo over HTTP and in a real browser: streaming, limits, hostile input."""

import asyncio
import dataclasses
import http.client
import json
import shutil
import socket
import threading
import time
import urllib.parse
from pathlib import Path

import numpy as np
import pytest
import soundfile

import ambijax
from ambijax import emotions, manifest
from tests import trained

uvicorn = pytest.importorskip("uvicorn")
pytest.importorskip("starlette")
from ambijax.demo import server  # noqa: E402

pytestmark = pytest.mark.skipif(not (trained.TINY / "model.safetensors").exists(), reason="not in this checkout")
EVIL = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return ambijax.load(trained.make(tmp_path_factory.mktemp("lora") / "run", "--config.data.max_tokens=24"))


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    return trained.wavs(tmp_path_factory.mktemp("wav"), (1.3,))[0]


@pytest.fixture(scope="module")
def address(model, clip):
    """host:port of a running demo with two examples; the second one's transcript is hostile."""
    one = manifest.Utterance("one", clip.name, "It was a long day.", "s", 0, {"anger": 3, "neutral": 1})
    examples = [one, dataclasses.replace(one, id="two", transcript=EVIL)]
    corpus = manifest.Corpus(clip.parent, tuple(examples))
    app = server.Demo(model, EVIL, corpus, examples).app(["127.0.0.1", "localhost"])
    listening = socket.create_server(("127.0.0.1", 0))
    running = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
    thread = threading.Thread(target=lambda: asyncio.run(running.serve([listening])), daemon=True)
    thread.start()
    yield f"127.0.0.1:{listening.getsockname()[1]}"
    running.should_exit = True
    thread.join(30)
    listening.close()


def request(address: str, method: str, path: str, body: bytes = b"", **headers: str) -> tuple[int, dict, bytes]:
    connection = http.client.HTTPConnection(address, timeout=600)
    connection.request(method, path, body, headers)
    answer = connection.getresponse()
    found = answer.status, dict(answer.getheaders()), answer.read()
    connection.close()
    return found


def test_a_clip_becomes_a_stream_that_ends_in_the_prediction(address, model, clip):
    said = "It was a long day."
    path = "/predict?" + urllib.parse.urlencode({"transcript": said})
    status, headers, body = request(address, "POST", path, clip.read_bytes())
    assert status == 200
    assert headers["content-type"] == "application/x-ndjson"
    *lines, last = map(json.loads, body.splitlines())
    assert last == {"done": True}
    assert len(lines) == 6  # 24 tokens, four at a time
    expected = model.predict(clip, said)
    assert lines[-1]["reasoning"] == expected.reasoning
    np.testing.assert_allclose([*lines[-1]["distribution"].values()], [*expected.distribution.values()], atol=1e-5)


def test_the_page_is_served_and_loads_nothing_else(address):
    status, headers, body = request(address, "GET", "/")
    assert status == 200
    assert headers["content-security-policy"].startswith("default-src 'none'; script-src 'self'")
    assert b"http://" not in body
    assert b"https://" not in body
    about = json.loads(request(address, "GET", "/about")[2])
    assert about["labels"] == list(emotions.CREMAD)
    assert about["examples"][0]["votes"] == {"anger": 3, "neutral": 1}
    assert request(address, "GET", "/examples/0")[2][:4] == b"RIFF"


def long_clip(directory: Path) -> bytes:
    soundfile.write(directory / "long.wav", np.random.default_rng(0).normal(size=31 * 8000) * 0.1, 8000)
    return (directory / "long.wav").read_bytes()


def silent(directory: Path) -> bytes:
    soundfile.write(directory / "silent.wav", np.zeros(16000), 16000)
    return (directory / "silent.wav").read_bytes()


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (lambda d: b"GIF89a" * 100, 422, "this is not a sound file that can be read here; try wav, flac, ogg or mp3"),
        (lambda d: b"", 422, "this is not a sound file"),
        (long_clip, 422, "the clip lasts 31 s; the model hears 30 s at most"),
        (silent, 422, "the clip: silent, every sample is 0"),
        (lambda d: b"\0" * (server.MAX_BYTES + 1), 413, "the file is larger than 16 MB; send a shorter clip"),
    ],
    ids=["gif", "empty", "long", "silent", "large"],
)
def test_what_cannot_be_heard_gets_one_message(address, tmp_path, body, status, message):
    found, headers, answer = request(address, "POST", "/predict", body(tmp_path))
    assert found == status
    error = json.loads(answer)["error"]
    assert error.startswith(message)
    assert "/tmp" not in error
    assert "content-security-policy" in headers


def test_strangers_are_refused(address, clip):
    assert request(address, "GET", "/about", Host="rebound.example")[0] == 400
    assert request(address, "POST", "/predict", clip.read_bytes(), Origin="http://elsewhere.example")[0] == 403
    for path in ("/examples/2", "/examples/-1", "/examples/..%2f..%2fetc%2fpasswd", "/page.py", "/../server.py"):
        assert request(address, "GET", path)[0] == 404


def test_a_browser_that_goes_away_does_not_block_the_next(address, clip):
    host, port = address.split(":")
    body = clip.read_bytes()
    for _ in range(2):
        with socket.create_connection((host, int(port))) as gone:
            gone.sendall(
                f"POST /predict HTTP/1.1\r\nHost: {address}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
            )
            gone.recv(100)  # it has begun
    assert request(address, "POST", "/predict", body)[2].endswith(b'{"done": true}\n')


# --- in the browser


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not chromium:
        pytest.skip("needs Chromium: apt-get install chromium")
    fakes = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream", "--no-sandbox"]
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=chromium, args=fakes)
        yield opened
        opened.close()


@pytest.fixture
def page(browser, address):
    """The demo's page; an error in its scripts, or a breach of its content policy, fails the test."""
    opened = browser.new_page()
    opened.set_default_timeout(300_000)  # a busy machine compiles for minutes
    complaints = []
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.on(
        "console", lambda m: complaints.append(m.text) if m.type == "error" and "Failed to load" not in m.text else 0
    )
    opened.goto(f"http://{address}/")
    opened.wait_for_selector("#examples button:nth-child(2)")
    yield opened
    assert opened.title() == "How would people hear this?"
    opened.close()
    assert not complaints


def shown(page) -> dict[str, int]:
    """The bars when the prediction is done: label -> percent."""
    page.wait_for_selector("#state:has-text('entropy')", timeout=600_000)
    return {
        bar.locator("> span").inner_text(): int(bar.locator("b").inner_text()[:-2])
        for bar in page.locator(".bar").all()
    }


def test_an_example_is_shown_with_its_listeners(page, model, clip):
    page.click("#examples button:nth-child(1)")
    expected = model.predict(clip, "It was a long day.")
    assert shown(page) == {label: round(100 * p) for label, p in expected.distribution.items()}
    assert page.locator("#transcript").input_value() == "It was a long day."
    widths = [bar.get_attribute("style") for bar in page.locator(".bar .human").all()]
    assert widths[0] == "width: 75%;"
    words = page.locator("#reasoning").inner_text().replace(":", "").split()
    assert words == expected.reasoning.replace(":", "").split()
    assert page.locator("#play").is_enabled()


def test_hostile_words_stay_words(page):
    assert page.locator("#title").inner_text() == EVIL
    assert EVIL in page.locator("#examples").inner_text()
    assert page.locator("img").count() == 0


def test_a_dropped_file_with_a_hostile_name(page, clip):
    page.set_input_files(
        "#file", [{"name": EVIL.replace("/", "") + ".wav", "mimeType": "audio/wav", "buffer": clip.read_bytes()}]
    )
    assert sum(shown(page).values()) in range(97, 104)
    assert "onerror" in page.locator("#name").inner_text()


def test_a_text_file_gets_one_clear_message(page, clip):
    page.set_input_files("#file", [{"name": "notes.txt", "mimeType": "text/plain", "buffer": b"hello"}])
    page.wait_for_selector("#problem:visible")
    assert page.locator("#problem").inner_text().startswith("this is not a sound file")
    page.set_input_files("#file", clip)  # and the page goes on
    shown(page)
    assert not page.locator("#problem").is_visible()


def test_a_demo_that_has_ended_is_said(page, clip):
    page.route("**/examples/0", lambda route: route.abort())
    page.route("**/predict*", lambda route: route.abort())
    for act in (
        lambda: page.click("#examples button:nth-child(1)"),
        lambda: page.set_input_files("#file", clip),
    ):
        act()
        page.wait_for_selector("#problem:visible")
        assert page.locator("#problem").inner_text() == "The demo does not answer; is it still running?"
        page.evaluate("problem('')")


def test_a_recording_is_heard(page):
    page.click("#record")
    page.wait_for_selector("#record:has-text('Stop')")
    time.sleep(1.5)
    page.click("#record")
    assert sum(shown(page).values()) in range(97, 104)
    assert page.locator("#name").inner_text() == "recording"
