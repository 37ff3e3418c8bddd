"""A dataset of the Hub on this machine's own loop: its files can be listed and read in pieces, and it fails at will."""

import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qs

COMMIT = "c0ffee" + 34 * "0"
RANGE = re.compile(r"bytes=(\d+)-(\d*)")


@dataclass
class DatasetHub:
    """What lies there, and what was asked.

    Attributes:
        repo: Its only dataset.
        files: Contents by name.
        ranges: File, first byte and number of bytes of every piece that was read.
        failing: Whether a request for a piece is answered by 503; called with its number.
        address: Of the server.
    """

    repo: str
    files: dict[str, bytes]
    ranges: list[tuple[str, int, int]] = field(default_factory=list)
    failing: Callable[[int], bool] = lambda _number: False
    address: str = ""
    asked: int = 0


@contextmanager
def serve(repo: str, files: dict[str, Path]) -> Iterator[DatasetHub]:
    """Serve a dataset of these files, as long as the block lasts."""
    hub = DatasetHub(repo, {name: path.read_bytes() for name, path in files.items()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: DatasetHub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        hub, path = self.hub, self.path.partition("?")[0]
        resolve = re.fullmatch(rf"/datasets/{hub.repo}/resolve/[^/]+/(.+)", path)
        if resolve and resolve[1] in hub.files:
            self._file(resolve[1])
        elif path in (f"/api/datasets/{hub.repo}", f"/api/datasets/{hub.repo}/revision/{COMMIT}"):
            names = [{"rfilename": name} for name in hub.files]
            self._json({"id": hub.repo, "sha": COMMIT, "private": False, "siblings": names, "tags": []})
        elif tree := re.fullmatch(rf"/api/datasets/{hub.repo}/tree/[^/]+(?:/(.*))?", path):
            below = f"{tree[1]}/" if tree[1] else ""
            entries = [entry for name in hub.files for entry in self._entries(name) if entry["path"].startswith(below)]
            if "recursive=true" not in self.path.lower():
                entries = [entry for entry in entries if "/" not in entry["path"].removeprefix(below)]
            unique = list({entry["path"]: entry for entry in entries}.values())
            self._json(unique or {"error": "no such entry"}, 200 if unique else 404, {"X-Error-Code": "EntryNotFound"})
        elif path == "/":
            self._json({})
        else:
            self._json({"error": "not found"}, 404, {"X-Error-Code": "EntryNotFound"})

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if re.fullmatch(rf"/api/datasets/{self.hub.repo}/paths-info/[^/]+", self.path):
            asked = json.loads(body)["paths"] if body.startswith(b"{") else parse_qs(body.decode()).get("paths", [])
            every = {entry["path"]: entry for name in self.hub.files for entry in self._entries(name)}
            self._json([every[name] for name in asked if name in every])
        else:
            self._json({"error": "not found"}, 404)

    def _entries(self, name: str) -> list[dict[str, Any]]:
        """The file and the folders it lies in."""
        content, folders = self.hub.files[name], list(PurePosixPath(name).parents)[:-1]
        file = {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
        return [*({"type": "directory", "path": str(each), "size": 0, "oid": "0" * 40} for each in folders), file]

    def _file(self, name: str) -> None:
        content, status = self.hub.files[name], 200
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
        if found := RANGE.fullmatch(self.headers.get("Range") or ""):
            self.hub.asked += 1
            if self.hub.failing(self.hub.asked):
                self._json({"error": "busy"}, 503)
                return
            first, last = int(found[1]), min(int(found[2] or len(content) - 1), len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            content, status = content[first : last + 1], 206
            self.hub.ranges.append((name, first, len(content)))
        self._send(content, status, headers)

    def _json(self, value: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._send(json.dumps(value).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def _send(self, content: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Nothing is printed."""
