"""A hub on loopback: what creating a repository and uploading to it need of the Hugging Face hub's interface."""

import base64
import contextlib
import http.server
import json
import threading
from collections.abc import Iterator

TOKEN = "hf_canary_0123456789"


class Hub:
    """What the server was sent."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}  # path -> content
        self.created: list[dict] = []
        self.requests: list[str] = []
        self.refuse = 0  # a status to answer everything with


@contextlib.contextmanager
def serve() -> Iterator[tuple[Hub, str]]:
    """Yields (hub, address)."""
    hub = Hub()
    blobs: dict[str, bytes] = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _answer(self, content: object = None, status: int = 200) -> None:
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") == "chunked":
                body = b""
                while size := int(self.rfile.readline(), 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
                return body
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))

        def do_GET(self) -> None:
            hub.requests.append(f"GET {self.path}")
            self._answer({"error": "not found"}, 404)

        def do_PUT(self) -> None:
            hub.requests.append(f"PUT {self.path}")
            blobs[self.path.rsplit("/", 1)[1]] = self._body()
            self._answer()

        def do_POST(self) -> None:
            hub.requests.append(f"POST {self.path}")
            body = self._body()
            if hub.refuse or self.headers.get("Authorization") != f"Bearer {TOKEN}":
                return self._answer({"error": f"no rights for {self.headers.get('Authorization')}"}, hub.refuse or 401)
            address = f"http://{self.headers['Host']}"
            if self.path == "/api/repos/create":
                hub.created.append(json.loads(body))
                return self._answer({"url": f"{address}/me/x", "name": "me/x", "id": "me/x"})
            if "/preupload/" in self.path:
                files = [
                    {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular"}
                    for f in json.loads(body)["files"]
                ]
                return self._answer({"files": [f | {"shouldIgnore": False} for f in files]})
            if self.path.endswith("/info/lfs/objects/batch"):
                objects = [
                    o | {"actions": {"upload": {"href": f"{address}/blob/{o['oid']}"}}}
                    for o in json.loads(body)["objects"]
                ]
                return self._answer({"transfer": "basic", "objects": objects})
            if "/commit/" in self.path:
                for line in map(json.loads, body.splitlines()):
                    value = line["value"]
                    if line["key"] == "file":
                        hub.files[value["path"]] = base64.b64decode(value["content"])
                    elif line["key"] == "lfsFile":
                        hub.files[value["path"]] = blobs[value["oid"]]
                return self._answer({"commitUrl": f"{address}/me/x/commit/1", "commitOid": "1" * 40})
            return self._answer({"errors": [], "warnings": []})  # the check of the card's header

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
