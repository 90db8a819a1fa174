"""A chat endpoint on loopback that behaves as a test tells it to, and remembers who asked what and when."""

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

GOLD = """Keywords: soft voice, slow speech
Step 1 Text Analysis: The words state a plain fact and leave the feeling open.
Step 2 Audio Analysis: Volume is low and pitch falls; a slight tension remains in the tone.
Step 3 Synthesis: The whole mostly sounds sad, with a trace of anger."""


def completion(text: str | None, *, finish: str = "stop", refusal: str | None = None) -> dict:
    """The body of a 200."""
    message = {"role": "assistant", "content": text, "refusal": refusal}
    return {
        "object": "chat.completion",
        "choices": [{"index": 0, "message": message, "finish_reason": finish}],
        "usage": {"prompt_tokens": 600, "completion_tokens": 200, "prompt_tokens_details": {"audio_tokens": 20}},
    }


def error(status: int, message: str, code: str | None = None, headers: dict | None = None) -> tuple:
    return status, {"error": {"message": message, "type": code, "code": code}}, headers or {}


class Call:
    """One request as the server saw it."""

    def __init__(self, body: dict, headers: dict, nth: int):
        self.body, self.headers, self.nth = body, headers, nth
        self.arrived = time.monotonic()
        self.answered = False
        self.text = json.dumps(body["messages"], ensure_ascii=False)
        self.role = "judge" if body["model"] == "judge-model" else "writer"
        self.item = re.search(r"item-\d+", self.text).group()
        self.key = headers.get("idempotency-key")


def good(call: Call) -> dict:
    """A server that always helps."""
    return completion(GOLD if call.role == "writer" else "CONSISTENT")


class ChatServer:
    """`reply(call)` returns a dict (200), (status, dict, headers), bytes (a raw 200 body), 'drop', 'hang' or 'drip'."""

    def __init__(self, reply: Callable[[Call], object]):
        self.calls: list[Call] = []
        self.reply = reply
        self._lock = threading.Lock()
        self._closing = threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.serve(self, body)

            def log_message(self, *arguments: object) -> None:
                del arguments

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128  # the default of 5 resets connections when many workers start at once

        self._http = Server(("127.0.0.1", 0), Handler)
        self._http.handle_error = lambda *_: None  # clients are killed while they read
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()

    def serve(self, handler: BaseHTTPRequestHandler, body: dict) -> None:
        with self._lock:
            call = Call(body, {k.lower(): v for k, v in handler.headers.items()}, 0)
            call.nth = sum(c.item == call.item and c.role == call.role for c in self.calls)
            self.calls.append(call)
        reply = self.reply(call)
        if reply == "drop":
            handler.close_connection = True
            return
        if reply == "hang":
            self._closing.wait(30)
            handler.close_connection = True
            return
        if reply == "drip":  # a byte now and then: no single read ever times out
            handler.send_response(200)
            handler.send_header("Content-Length", "1000")
            handler.end_headers()
            while not self._closing.wait(0.1):
                handler.wfile.write(b" ")
            return
        status, content, headers = reply if isinstance(reply, tuple) else (200, reply, {})
        raw = content if isinstance(content, bytes) else json.dumps(content).encode()
        handler.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(raw)), **headers}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(raw)
        call.answered = status == 200

    def of(self, item: str, role: str = "writer") -> list[Call]:
        return [call for call in self.calls if call.item == item and call.role == role]

    def close(self) -> None:
        self._closing.set()
        self._http.shutdown()
        self._http.server_close()


@contextmanager
def serving(reply: Callable[[Call], object] = good) -> Iterator[ChatServer]:
    server = ChatServer(reply)
    try:
        yield server
    finally:
        server.close()
