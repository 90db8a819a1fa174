"""The demo's requests: the page, its examples, and a clip that becomes a stream of predictions.

    GET  /                   the page; /page.css, /page.js
    GET  /about              class words, limits, and the examples with the votes of their listeners
    GET  /examples/3         the sound of an example
    POST /predict?transcript=...   the body is a sound file; the answer is a JSON object a line, as the model writes

Starlette serves it (with uvicorn, two small pure Python packages): what is needed is five routes and a stream. Nothing
the browser sends becomes a file name, a path or HTML, and the page loads nothing from elsewhere.
"""

import asyncio
import dataclasses
import json
import tempfile
from collections.abc import AsyncIterator, Sequence
from importlib import resources
from urllib.parse import urlsplit

import numpy as np
from starlette.applications import Starlette
from starlette.concurrency import iterate_in_threadpool, run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from ambijax import audio
from ambijax.errors import DataError
from ambijax.listener import Model
from ambijax.manifest import Corpus, Utterance

MAX_BYTES = 16 * 2**20  # 30 s of 48 kHz stereo in 32-bit floats are 11.5 MB
MAX_WORDS = 500  # characters of a transcript
SECURITY = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "media-src 'self' blob:; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


@dataclasses.dataclass(frozen=True)
class Demo:
    """What the page shows, and the model behind it, which hears one clip at a time."""

    model: Model
    title: str
    corpus: Corpus
    examples: Sequence[Utterance]
    turn: asyncio.Lock = dataclasses.field(default_factory=asyncio.Lock)

    def app(self, hosts: list[str]) -> Starlette:
        """The application; requests under another host name than `hosts` are refused ('*' allows all)."""
        routes = [
            Route("/", _file("page.html", "text/html")),
            Route("/page.css", _file("page.css", "text/css")),
            Route("/page.js", _file("page.js", "text/javascript")),
            Route("/about", self.about),
            Route("/examples/{number:int}", self.example),
            Route("/predict", self.predict, methods=["POST"]),
        ]
        # A page elsewhere that points its own name at this machine is refused by the name.
        return Starlette(routes=routes, middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=hosts)])

    async def about(self, request: Request) -> Response:
        examples = [{"transcript": u.transcript, "votes": u.votes} for u in self.examples]
        limits = {"bytes": MAX_BYTES, "seconds": audio.SECONDS, "characters": MAX_WORDS}
        labels = self.model.setting.vocabulary.labels
        about = {"title": self.title, "labels": labels, "examples": examples, "limits": limits}
        return JSONResponse(about, headers=SECURITY)

    async def example(self, request: Request) -> Response:
        number = request.path_params["number"]
        if number >= len(self.examples):
            return _refuse(404, "no such example")
        return FileResponse(self.corpus.path(self.examples[number]), media_type="audio/wav", headers=SECURITY)

    async def predict(self, request: Request) -> Response:
        origin = request.headers.get("origin")
        if origin and urlsplit(origin).netloc != request.headers.get("host"):
            return _refuse(403, "this page does not belong to the demo")
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > MAX_BYTES:
                return _refuse(413, f"the file is larger than {MAX_BYTES // 2**20} MB; send a shorter clip")
        transcript = request.query_params.get("transcript", "")[:MAX_WORDS]
        try:
            sound = await run_in_threadpool(_decode, bytes(body))
        except DataError as error:
            return _refuse(422, str(error))
        lines = self._lines(sound, transcript)
        return StreamingResponse(lines, media_type="application/x-ndjson", headers=SECURITY)

    async def _lines(self, sound: np.ndarray, transcript: str) -> AsyncIterator[str]:
        async with self.turn:  # given back, too, when the browser goes away half-way
            async for prediction in iterate_in_threadpool(self.model.stream(sound, transcript)):
                yield json.dumps(dataclasses.asdict(prediction)) + "\n"
        yield json.dumps({"done": True}) + "\n"


def _decode(body: bytes) -> np.ndarray:
    """An upload as samples; its name is never used."""
    import soundfile

    with tempfile.NamedTemporaryFile(prefix="ambijax-") as file:
        file.write(body)
        file.flush()
        try:
            about = soundfile.info(file.name)
        except soundfile.SoundFileError:
            raise DataError("this is not a sound file that can be read here; try wav, flac, ogg or mp3") from None
        if about.duration > audio.SECONDS:
            raise DataError(f"the clip lasts {about.duration:.0f} s; the model hears {audio.SECONDS} s at most")
        try:
            return audio.load(file.name)
        except DataError as error:
            raise DataError(str(error).replace(file.name, "the clip")) from None


def _refuse(status: int, reason: str) -> Response:
    return JSONResponse({"error": reason}, status, headers=SECURITY)


def _file(name: str, media_type: str) -> object:
    content = (resources.files("ambijax") / "demo" / name).read_text(encoding="utf-8")

    async def serve(request: Request) -> Response:
        return Response(content, media_type=media_type, headers=SECURITY)

    return serve
