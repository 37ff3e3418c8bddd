"""A Hugging Face Hub of a few repositories on this machine's own loop: commits, files and what is asked of them."""

import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

FILE = re.compile(r"/(?P<repo>[\w.-]+/[\w.-]+)/resolve/(?P<revision>[\w.-]+)/(?P<file>[\w./-]+)")
MODEL = re.compile(r"/api/models/(?P<repo>[\w.-]+/[\w.-]+)(?:/revision/(?P<revision>[\w.-]+))?")


@dataclass
class Hub:
    """What lies there.

    Attributes:
        repos: Commits of each repository, the oldest first, each a name and files.
        asked: Method and path of every request.
        before_answer: Called with each path before it is answered; may commit.
        address: Of the server.
    """

    repos: dict[str, list[tuple[str, dict[str, bytes]]]] = field(default_factory=dict)
    asked: list[tuple[str, str]] = field(default_factory=list)
    before_answer: Callable[[str], None] = lambda path: None
    address: str = ""

    def commit(self, repo: str, files: dict[str, bytes] | Path) -> str:
        """Replace a repository's files by those; the name of the commit."""
        if isinstance(files, Path):
            files = {file.name: file.read_bytes() for file in files.iterdir() if file.is_file()}
        commits = self.repos.setdefault(repo, [])
        sums = {name: hashlib.sha1(content).hexdigest() for name, content in files.items()}
        name = hashlib.sha1(json.dumps([repo, len(commits), sums]).encode()).hexdigest()
        commits.append((name, dict(files)))
        return name

    def at(self, repo: str, revision: str | None) -> tuple[str, dict[str, bytes]] | None:
        """The commit that a revision names."""
        commits = self.repos.get(repo, [])
        if revision in (None, "main"):
            return commits[-1] if commits else None
        return next((commit for commit in commits if commit[0] == revision), None)

    def environment(self, home: Path) -> dict[str, str]:
        """What a process needs that is to take this for the Hub; the Hub's client reads it when it is imported."""
        return {
            "HF_ENDPOINT": self.address,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }


@contextmanager
def serving() -> Iterator[Hub]:
    """An empty Hub, served until the end of the block."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = self.path.partition("?")[0]
        self.hub.asked.append((self.command, path))
        self.hub.before_answer(path)
        if found := FILE.fullmatch(path):
            self.give_file(**found.groupdict())
        elif found := MODEL.fullmatch(path):
            self.give_model(**found.groupdict())
        else:
            self.refuse("EntryNotFound")

    def give_file(self, repo: str, revision: str, file: str) -> None:
        commit = self.hub.at(repo, revision)
        if commit is None:
            self.refuse("RevisionNotFound" if repo in self.hub.repos else "RepoNotFound")
        elif file not in commit[1]:
            self.refuse("EntryNotFound", commit[0])
        else:
            content = commit[1][file]
            self.give(content, {"X-Repo-Commit": commit[0], "ETag": f'"{hashlib.sha1(content).hexdigest()}"'})

    def give_model(self, repo: str, revision: str | None) -> None:
        commit = self.hub.at(repo, revision)
        if commit is None:
            self.refuse("RevisionNotFound" if repo in self.hub.repos else "RepoNotFound")
            return
        said: dict[str, Any] = {"id": repo, "modelId": repo, "sha": commit[0], "private": False, "tags": []}
        said["siblings"] = [{"rfilename": name} for name in commit[1]]
        self.give(json.dumps(said).encode(), {"Content-Type": "application/json"})

    def give(self, content: bytes, headers: dict[str, str]) -> None:
        """The whole, or what a range asks for."""
        start = int((re.match(r"bytes=(\d+)-", self.headers.get("Range", "")) or [0, 0])[1])
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[start:])

    def refuse(self, code: str, commit: str = "") -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", code)
        if commit:
            self.send_header("X-Repo-Commit", commit)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing: `Hub.asked` has it."""
