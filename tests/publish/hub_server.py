"""A Hugging Face Hub of a few repositories on this machine's own loop: it takes commits and gives files.

It speaks as much of the documented protocol as the real client asks for, to publish and to load, and fails where a
test wants it to.
"""

import base64
import hashlib
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
FILE = re.compile(rf"/{REPO}/resolve/(?P<revision>[\w.%-]+)/(?P<file>[\w./-]+)")
MODEL = re.compile(rf"/api/models/{REPO}(?:/revision/(?P<revision>[\w.%-]+))?")
PREUPLOAD = re.compile(rf"/api/models/{REPO}/preupload/(?P<revision>[\w.%-]+)")
COMMIT = re.compile(rf"/api/models/{REPO}/commit/(?P<revision>[\w.%-]+)")
BRANCH = re.compile(rf"/api/models/{REPO}/branch/(?P<revision>[\w.%-]+)")
LFS = re.compile(rf"/{REPO}\.git/info/lfs/objects/batch")
STORE = re.compile(r"/store/(?P<oid>[0-9a-f]{64})")
LARGE = 100_000  # bytes from which a file is a large one


@dataclass(frozen=True)
class Fault:
    """What goes wrong with one answer.

    Attributes:
        status: Answered instead, if not 0.
        headers: Sent with it, or with the answer.
        cut: Bytes of the body after which the line is dropped, if not negative.
        said: Sent with the status, as JSON.
        silent: Seconds before anything is answered.
    """

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    cut: int = -1
    said: dict[str, Any] | None = None
    silent: float = 0.0


@dataclass
class Hub:
    """What lies there.

    Attributes:
        repos: Commits of each repository, the oldest first, each a name and files.
        branches: The newest commit of each branch but main, by repository and name.
        private: Repositories that are.
        store: Large files that arrived, by SHA-256.
        token: The only one that may write; empty: any.
        asked: Method and path of every request.
        before_answer: Called with each path before it is answered; may commit.
        faults: Called with method and path; what goes wrong, or None.
        address: Of the server.
    """

    repos: dict[str, list[tuple[str, dict[str, bytes]]]] = field(default_factory=dict)
    branches: dict[tuple[str, str], str] = field(default_factory=dict)
    private: set[str] = field(default_factory=set)
    store: dict[str, bytes] = field(default_factory=dict)
    token: str = ""
    asked: list[tuple[str, str]] = field(default_factory=list)
    before_answer: Callable[[str], None] = lambda path: None
    faults: Callable[[str, str], Fault | None] = lambda method, path: None
    address: str = ""

    def commit(self, repo: str, files: dict[str, bytes] | Path, branch: str = "main") -> str:
        """Replace a repository's files by those; the name of the commit."""
        if isinstance(files, Path):
            files = {file.name: file.read_bytes() for file in files.iterdir() if file.is_file()}
        commits = self.repos.setdefault(repo, [])
        sums = {name: hashlib.sha1(content).hexdigest() for name, content in files.items()}
        name = hashlib.sha1(json.dumps([repo, len(commits), sums]).encode()).hexdigest()
        if branch == "main":
            commits.append((name, dict(files)))
        else:
            commits.insert(0, (name, dict(files)))
            self.branches[repo, branch] = name
        return name

    def at(self, repo: str, revision: str | None) -> tuple[str, dict[str, bytes]] | None:
        """The commit that a revision names."""
        commits = self.repos.get(repo, [])
        if revision in (None, "main"):
            return commits[-1] if commits else None
        revision = self.branches.get((repo, str(revision)), revision)
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

    def do_POST(self) -> None:
        self.answer()

    def do_PUT(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = self.path.partition("?")[0]
        self.hub.asked.append((self.command, path))
        self.hub.before_answer(path)
        self.fault = self.hub.faults(self.command, path) or Fault()
        if self.fault.cut >= 0 and self.command in ("POST", "PUT"):
            self.rfile.read(self.fault.cut)
            self.drop()
            return
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        time.sleep(self.fault.silent)
        if self.fault.said is not None:
            self.say(self.fault.said, status=self.fault.status)
        elif self.fault.status:
            self.refuse("", status=self.fault.status)
        elif self.command in ("POST", "PUT") and not self.may_write():
            self.refuse("", status=401)
        elif self.command in ("POST", "PUT"):
            self.take(path)
        elif found := FILE.fullmatch(path):
            self.give_file(**_plain(found))
        elif found := MODEL.fullmatch(path):
            self.give_model(**_plain(found))
        else:
            self.refuse("EntryNotFound")

    def may_write(self) -> bool:
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        return not self.hub.token or given == self.hub.token or self.path.startswith("/store/")

    def take(self, path: str) -> None:
        """Requests that write."""
        if path == "/api/repos/create":
            self.make_repo(**json.loads(self.body))
        elif path == "/api/validate-yaml":
            self.say({"errors": [], "warnings": []})
        elif found := BRANCH.fullmatch(path):
            self.make_branch(**_plain(found))
        elif found := PREUPLOAD.fullmatch(path):
            self.preupload(**_plain(found))
        elif LFS.fullmatch(path):
            self.offer()
        elif found := STORE.fullmatch(path):
            self.keep(**found.groupdict())
        elif found := COMMIT.fullmatch(path):
            self.take_commit(**_plain(found))
        else:
            self.refuse("EntryNotFound")

    def make_repo(self, name: str, organization: str, visibility: str = "public", **_rest: Any) -> None:
        repo = f"{organization}/{name}"
        said = {"url": f"{self.hub.address}/{repo}"}
        if repo in self.hub.repos:
            self.say(said, status=409)
            return
        self.hub.commit(repo, {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"})
        if visibility == "private":
            self.hub.private.add(repo)
        self.say(said)

    def make_branch(self, repo: str, revision: str) -> None:
        if (repo, revision) in self.hub.branches:
            self.say({}, status=409)
            return
        self.hub.branches[repo, revision] = self.hub.repos[repo][-1][0]
        self.say({})

    def preupload(self, repo: str, revision: str) -> None:
        commit = self.hub.at(repo, revision)
        if commit is None:
            self.refuse("RevisionNotFound" if repo in self.hub.repos else "RepoNotFound")
            return
        told = []
        for file in json.loads(self.body)["files"]:
            there = commit[1].get(file["path"])
            mode = "lfs" if file["size"] >= LARGE else "regular"
            told.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False})
            if there is not None:
                told[-1]["oid"] = _sha256(there) if mode == "lfs" else _git_name(there)
        self.say({"files": told})

    def offer(self) -> None:
        told = []
        for large in json.loads(self.body)["objects"]:
            told.append(dict(large))
            if large["oid"] not in self.hub.store:
                told[-1]["actions"] = {"upload": {"href": f"{self.hub.address}/store/{large['oid']}"}}
        self.say({"transfer": "basic", "objects": told})

    def keep(self, oid: str) -> None:
        if _sha256(self.body) != oid:
            self.refuse("", status=422)
            return
        self.hub.store[oid] = self.body
        self.say({})

    def take_commit(self, repo: str, revision: str) -> None:
        commit = self.hub.at(repo, revision)
        if commit is None:
            self.refuse("RevisionNotFound" if repo in self.hub.repos else "RepoNotFound")
            return
        files = dict(commit[1])
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.store[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        name = self.hub.commit(repo, files, revision)
        self.say({"success": True, "commitOid": name, "commitUrl": f"{self.hub.address}/{repo}/commit/{name}"})

    def give_file(self, repo: str, revision: str, file: str) -> None:
        commit = self.hub.at(repo, revision)
        if commit is None:
            self.refuse("RevisionNotFound" if repo in self.hub.repos else "RepoNotFound")
        elif file not in commit[1]:
            self.refuse("EntryNotFound", commit[0])
        else:
            content = commit[1][file]
            headers = {"X-Repo-Commit": commit[0], "ETag": f'"{_git_name(content)}"'}
            if len(content) >= LARGE:
                headers |= {"X-Linked-Etag": f'"{_sha256(content)}"', "X-Linked-Size": str(len(content))}
            self.give(content, headers)

    def give_model(self, repo: str, revision: str | None) -> None:
        commit = self.hub.at(repo, revision)
        if commit is None:
            self.refuse("RevisionNotFound" if repo in self.hub.repos else "RepoNotFound")
            return
        said: dict[str, Any] = {"id": repo, "modelId": repo, "sha": commit[0], "private": repo in self.hub.private}
        said |= {"tags": [], "siblings": [{"rfilename": name} for name in commit[1]]}
        self.say(said)

    def say(self, said: dict[str, Any], status: int = 200) -> None:
        content = json.dumps(said).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def give(self, content: bytes, headers: dict[str, str]) -> None:
        """The whole, or what a range asks for."""
        start = int((re.match(r"bytes=(\d+)-", self.headers.get("Range", "")) or [0, 0])[1])
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        for name, value in (headers | self.fault.headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        if self.command == "GET":
            end = len(content) if self.fault.cut < 0 else start + self.fault.cut
            self.wfile.write(content[start:end])
            if end < len(content):
                self.drop()

    def drop(self) -> None:
        """Break the line."""
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)
        self.close_connection = True

    def refuse(self, code: str, commit: str = "", status: int = 404) -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        for name, value in self.fault.headers.items():
            self.send_header(name, value)
        if commit:
            self.send_header("X-Repo-Commit", commit)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing: `Hub.asked` has it."""


def _plain(found: re.Match[str]) -> dict[str, Any]:
    """What a path names; the client writes a branch's slashes as %2F."""
    return {key: value and unquote(value) for key, value in found.groupdict().items()}


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _git_name(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
