"""A run's encoder as a repository of the Hub: made ready in a folder first, then sent as one commit.

Nothing on the Hub is ever lost: publishing again adds a commit. A transfer that broke is taken up by the same command,
for the Hub keeps the large files that arrived.
"""

import hashlib
import json
import re
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    HfApi,
    constants,
    get_hf_file_metadata,
    get_token,
    hf_hub_download,
    hf_hub_url,
)
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils.tqdm import disable_progress_bars

from sslkit.durable import refuse_links, sha256_of, whole_folder
from sslkit.errors import RunError, UserError
from sslkit.parts.hub import is_reachable
from sslkit.publish.card import CURVES, model_card
from sslkit.publish.export import export_encoder
from sslkit.recipe import load_recipe

REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
REVISION = re.compile(r"[A-Za-z0-9][\w.-]{0,199}")
SUMS = "SHA256SUMS"
WEIGHTS = "model.safetensors"
WAITS = (1.0, 5.0)  # seconds before each further try, unless the Hub says how long; its client has tries of its own
LONGEST_WAIT = 60.0
BUSY = (408, 425, 429, 500, 502, 503, 504)

Answer = TypeVar("Answer")


class PublishError(RunError):
    """The Hub did not take it; the folder is ready and the same command goes on."""


@dataclass(frozen=True)
class Published:
    """What was published.

    Attributes:
        folder: The files as they were sent.
        files: Their names and sizes in bytes.
        commit: The commit on the Hub; empty after a dry run.
        url: Its address; empty after a dry run.
        loads_in_timm: Whether ``timm.create_model`` can load it.
    """

    folder: str
    files: dict[str, int]
    commit: str
    url: str
    loads_in_timm: bool


def publish_run(
    run: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str = "main",
    license_id: str = "apache-2.0",
    dry_run: bool = False,
) -> Published:
    """Publish a run's newest encoder, with a model card of its record, as one commit.

    The folder ``RUN/publish`` is made anew and holds exactly what is sent: configuration, weights, resolved recipe,
    card, a picture of the curves if ``RUN/pictures`` has one, and checksums.

    Args:
        run: Run folder.
        repo_id: ``user/name``; made if it is not there.
        private: Whether only its owner may see it. A public repository is refused then, not changed.
        revision: Branch; made from ``main`` if it is not there.
        license_id: SPDX id of the weights' licence.
        dry_run: Make the folder and ask nobody.

    Raises:
        UserError: No such run, an impossible name, or a repository that cannot be written with this token.
        PublishError: The Hub cannot be reached, stayed busy, or holds other bytes than were sent.
    """
    run = Path(run)
    if not REPO_ID.fullmatch(repo_id) or ".." in repo_id or "--" in repo_id or repo_id.endswith(".git"):
        raise UserError(f"--repo-id: must be user/name of letters, digits, '-', '_' and '.', not {repo_id!r:.100}")
    if not REVISION.fullmatch(revision):
        raise UserError(f"--revision: must be the name of a branch, not {revision!r:.100}")
    if not (run / "recipe.toml").is_file():
        raise UserError(f"{run}: not a run folder (no recipe.toml)")
    refuse_links(run)
    folder = run / "publish"
    by_timm = _make_ready(run, folder, repo_id, license_id)
    files = {file.name: file.stat().st_size for file in sorted(folder.iterdir())}
    if dry_run:
        return Published(str(folder), files, "", "", by_timm)
    sender = _Sender(repo_id, revision, folder)
    sender.prepare(private=private)
    commit = sender.send(sorted(files))
    sender.compare(commit.oid)
    return Published(str(folder), files, commit.oid, f"{constants.ENDPOINT}/{repo_id}", by_timm)


def _make_ready(run: Path, folder: Path, repo_id: str, license_id: str) -> bool:
    """Fill the folder, whole or not at all; whether timm can load it."""
    try:
        with whole_folder(folder) as aside:
            proof = export_encoder(run, aside, license_id)
            curves = run / "pictures" / CURVES
            if curves.is_file():
                shutil.copy(curves, aside / CURVES)
            recipe = load_recipe(run / "recipe.toml")
            config = (aside / "config.json").read_text(encoding="utf-8")
            tag = re.search(r'"tag": "(\w+)"', config)
            card = model_card(
                recipe, run, f"hf_hub:{repo_id}", tag[1] if tag else "", license_id, curves=curves.is_file()
            )
            (aside / "README.md").write_text(card, encoding="utf-8")
            sums = "".join(f"{sha256_of(file)}  {file.name}\n" for file in sorted(aside.iterdir()))
            (aside / SUMS).write_text(sums, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error}") from error
    return bool(proof["loads_in_timm"])


class _Sender:
    """One publication's talk with the Hub, in which every failure becomes a sentence that says what to do next."""

    def __init__(self, repo_id: str, revision: str, folder: Path) -> None:
        self.repo_id, self.revision, self.folder = repo_id, revision, folder
        self.ready = f"; {folder} is ready, and the same command goes on from here"
        if constants.HF_HUB_OFFLINE:
            raise PublishError(f"HF_HUB_OFFLINE is set, so the Hub was not asked{self.ready}")
        if not get_token():
            raise UserError(f"the Hub wants to know who publishes: run `hf auth login` or set HF_TOKEN{self.ready}")
        if not is_reachable():
            raise PublishError(f"the Hub, {constants.ENDPOINT}, cannot be reached from here{self.ready}")
        disable_progress_bars()
        self.api = HfApi(library_name="sslkit")

    def prepare(self, *, private: bool) -> None:
        """See that repository and branch are there, and no more public than asked for."""
        self._ask(lambda: self.api.create_repo(self.repo_id, private=private or None, exist_ok=True))
        if private and not self._ask(lambda: self.api.model_info(self.repo_id)).private:
            raise UserError(
                f"--private: {self.repo_id} is there already and public, and nothing was sent; make it private in its "
                f"settings first, or publish under another name{self.ready}"
            )
        if self.revision != "main":
            self._ask(lambda: self.api.create_branch(self.repo_id, branch=self.revision, exist_ok=True))

    def send(self, names: list[str]) -> CommitInfo:
        """All files as one commit; those that the Hub has already are not sent again."""
        return self._ask(
            lambda: self.api.create_commit(
                self.repo_id,
                # Made anew at every try: the client changes them.
                [CommitOperationAdd(name, str(self.folder / name)) for name in names],
                commit_message="Publish an encoder with sslkit",
                revision=self.revision,
            )
        )

    def compare(self, commit: str) -> None:
        """See that the commit's weights are those that were sent: by the Hub's checksum, or else by its bytes."""
        address = hf_hub_url(self.repo_id, WEIGHTS, revision=commit)
        etag = self._ask(lambda: get_hf_file_metadata(address, token=get_token())).etag
        file = self.folder / WEIGHTS
        if etag in (sha256_of(file), _git_name(file)):
            return
        with tempfile.TemporaryDirectory() as cache:
            came = self._ask(lambda: hf_hub_download(self.repo_id, WEIGHTS, revision=commit, cache_dir=cache))
            if sha256_of(Path(came)) == sha256_of(file):
                return
        raise PublishError(
            f"{self.repo_id}: the Hub gives other bytes for {WEIGHTS} of commit {commit} than were sent; "
            f"do not use it{self.ready}"
        )

    def _ask(self, question: Callable[[], Answer]) -> Answer:
        """The Hub's answer, after some patience with a busy one or a broken line."""
        for wait in (*WAITS, None):
            try:
                return question()
            except LocalTokenNotFoundError as error:
                raise UserError(f"the Hub wants a token: run `hf auth login` or set HF_TOKEN{self.ready}") from error
            except HfHubHTTPError as error:
                if wait is None or error.response.status_code not in BUSY:
                    raise self._sentence(error) from error
                time.sleep(_asked_to_wait(error, wait))
            except Exception as error:  # of which library a broken line's is depends on the version
                if isinstance(error, ValueError) and not isinstance(error, json.JSONDecodeError):
                    # The client's own word for a card that the Hub refuses.
                    raise UserError(f"{self.repo_id}: {_first_line(error)}{self.ready}") from error
                if wait is None:
                    raise PublishError(f"{self.repo_id}: the line broke: {_first_line(error)}{self.ready}") from error
                time.sleep(wait)
        raise AssertionError("the last try returns or raises")

    def _sentence(self, error: HfHubHTTPError) -> RunError | UserError:
        status = error.response.status_code
        if status == 401:
            return UserError(
                f"{self.repo_id}: the Hub does not accept the token (missing, wrong or expired); "
                f"run `hf auth login` or set HF_TOKEN anew{self.ready}"
            )
        if status == 403:
            return UserError(
                f"{self.repo_id}: this token may not write there; use your own name before the slash, or a token with "
                f"the right to write{self.ready}"
            )
        if isinstance(error, RepositoryNotFoundError) or status == 404:
            return UserError(f"{self.repo_id} [{self.revision}]: not there for this token{self.ready}")
        if status in BUSY:
            return PublishError(f"{self.repo_id}: the Hub is busy (status {status}){self.ready}")
        return PublishError(f"{self.repo_id}: the Hub answered {status}: {_first_line(error)}{self.ready}")


def _asked_to_wait(error: HfHubHTTPError, default: float) -> float:
    """Seconds that the Hub asked to be left alone, within reason."""
    with suppress(ValueError):
        return min(max(float(error.response.headers.get("Retry-After", default)), 0.0), LONGEST_WAIT)
    return default


def _git_name(file: Path) -> str:
    """Git's name of a file's content, which the Hub gives where a file is not a large one."""
    digest = hashlib.sha1(b"blob %d\0" % file.stat().st_size, usedforsecurity=False)
    with file.open("rb") as stream:
        while block := stream.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:200]
