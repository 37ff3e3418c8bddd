"""A run's encoder as a repository of the Hub: made ready in a folder first, then sent as one commit.

Nothing on the Hub is ever lost: publishing again adds a commit. A transfer that broke is taken up by the same command,
for the Hub keeps the large files that arrived.
"""

import hashlib
import json
import math
import os
import re
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from logging import ERROR
from pathlib import Path
from typing import TypeVar

from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    HfApi,
    constants,
    get_hf_file_metadata,
    get_session,
    get_token,
    hf_hub_download,
    hf_hub_url,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import logging
from huggingface_hub.utils.tqdm import disable_progress_bars

from sslkit.errors import RunError, UserError, check_path
from sslkit.files.atomic import refuse_links, sha256_of, whole_folder, write_file, write_text
from sslkit.hub.availability import is_reachable
from sslkit.publish.card import CURVES, model_card
from sslkit.publish.export import export_encoder
from sslkit.publish.redaction import public_recipe, refuse_tokens

REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
REVISION = re.compile(r"(?=.{1,200}$)[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)*")
PULL_REQUEST = re.compile(r"refs/pr/\d+")  # there already, or not to be made by us
SUMS = "SHA256SUMS"
WEIGHTS = "model.safetensors"
CARD = "README.md"
WAITS = (1.0, 5.0)  # seconds before each further try, unless the Hub says how long; its client has tries of its own
LONGEST_WAIT = 60.0
SILENCE = 120.0  # seconds without a byte after which a line counts as broken; the client would wait for ever
BUSY = (408, 425, 429, 500, 502, 503, 504)
OVERTAKEN = (409, 412)  # somebody else committed in the same moment; nothing is lost by committing after them

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
        is_new: Whether that commit was made now; not if the Hub had all files already.
        replaced_card: Commit that has the card written by hand that this one replaced; else empty.
        loads_in_timm: Whether ``timm.create_model`` can load it.
    """

    folder: str
    files: dict[str, int]
    commit: str
    url: str
    is_new: bool
    replaced_card: str
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
    card, a picture of the curves if ``RUN/pictures`` has one, and checksums. One with changes by hand is left alone.
    Where the run cannot be written to, the folder is made in the system's folder for temporary files.

    Args:
        run: Run folder.
        repo_id: ``user/name``; made if it is not there.
        private: Whether only its owner may see it. A public repository is refused then, not changed.
        revision: Branch, made from ``main`` if it is not there, or a pull request, ``refs/pr/1``.
        license_id: SPDX id of the weights' licence.
        dry_run: Make the folder and ask nobody.

    Raises:
        UserError: No such run, an impossible name, a folder changed by hand, or a repository that cannot be written
            with this token.
        PublishError: The Hub cannot be reached, stayed busy, or holds other bytes than were sent.
    """
    check_path(run, "RUN")
    run = Path(run)
    if not REPO_ID.fullmatch(repo_id) or ".." in repo_id or "--" in repo_id or repo_id.endswith(".git"):
        raise UserError(f"--repo-id: must be user/name of letters, digits, '-', '_' and '.', not {repo_id!r:.100}")
    if not REVISION.fullmatch(revision) or ".." in revision or revision.endswith((".lock", ".")):
        raise UserError(f"--revision: must be the name of a branch, or refs/pr/ and a number, not {revision!r:.100}")
    if not (run / "recipe.toml").is_file():
        raise UserError(f"{run}: not a run folder (no recipe.toml)")
    refuse_links(run)
    folder = _place_to_write(run) / "publish"
    _refuse_changes(folder, repo_id)
    is_named = revision != "main" and not PULL_REQUEST.fullmatch(revision)  # a merged request is on main
    source = f"hf_hub:{repo_id}@{revision}" if is_named else f"hf_hub:{repo_id}"
    by_timm = _make_ready(run, folder, source, license_id)
    files = {file.name: file.stat().st_size for file in sorted(folder.iterdir())}
    if dry_run:
        return Published(str(folder), files, "", "", False, "", by_timm)
    sender = _Sender(repo_id, revision, folder)
    sender.prepare(private=private)
    before = sender.newest_commit()
    by_hand = sender.has_card_by_hand(before)
    commit = sender.send(sorted(files)).oid
    sender.compare(commit)
    is_new, replaced = commit != before, before if by_hand else ""
    return Published(str(folder), files, commit, f"{constants.ENDPOINT}/{repo_id}", is_new, replaced, by_timm)


def _place_to_write(run: Path) -> Path:
    """The run folder; a temporary one for a run on a read-only disk, which is left alone."""
    if os.access(run, os.W_OK):
        return run
    try:
        return Path(tempfile.mkdtemp(prefix="sslkit-"))
    except OSError as error:
        raise UserError(f"{run}: cannot be written to, and no folder for temporary files either: {error}") from error


def _refuse_changes(folder: Path, repo_id: str) -> None:
    """See that the folder is as we made it: somebody may have bettered the card in it."""
    if not folder.is_dir():
        return
    try:
        sums = _sums((folder / SUMS).read_text(encoding="utf-8")) if (folder / SUMS).is_file() else {}
        strange = [
            entry.name
            for entry in sorted(folder.iterdir())
            if entry.name != SUMS and (not entry.is_file() or sums.get(entry.name) != sha256_of(entry))
        ]
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: cannot be read: {error}") from error
    if strange:
        raise UserError(
            f"{folder / strange[0]}: was changed or added by hand, and publishing makes the folder anew; move it "
            f"away, or send the folder as it is: `hf upload {repo_id} {folder}`"
        )


def _sums(text: str) -> dict[str, str]:
    """The checksum of each file by its name, as ``sha256sum`` writes them."""
    pairs = (line.split(None, 1) for line in text.splitlines())
    return {pair[1]: pair[0] for pair in pairs if len(pair) == 2}


def _make_ready(run: Path, folder: Path, source: str, license_id: str) -> bool:
    """Fill the folder, whole or not at all; whether timm can load it."""
    try:
        with whole_folder(folder) as aside:
            proof = export_encoder(run, aside, license_id)
            curves = run / "pictures" / CURVES
            if curves.is_file():
                write_file(aside / CURVES, [curves.read_bytes()])
            recipe, _ = public_recipe(run / "recipe.toml")
            config = (aside / "config.json").read_text(encoding="utf-8")
            tag = re.search(r'"tag": "(\w+)"', config)
            card = model_card(recipe, run, source, tag[1] if tag else "", license_id, curves=curves.is_file())
            write_text(aside / CARD, card)
            sums = "".join(f"{sha256_of(file)}  {file.name}\n" for file in sorted(aside.iterdir()))
            write_text(aside / SUMS, sums)
            refuse_tokens(aside, f"{run / 'recipe.toml'} or {run / 'results.jsonl'}")
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror or error}") from error
    return bool(proof["loads_in_timm"])


class _Sender:
    """One publication's talk with the Hub, in which every failure becomes a sentence that says what to do next."""

    def __init__(self, repo_id: str, revision: str, folder: Path) -> None:
        self.repo_id, self.revision, self.folder = repo_id, revision, folder
        self.ready = f"; {folder} is ready, and the same command goes on from here"
        if constants.HF_HUB_OFFLINE:
            raise PublishError(f"HF_HUB_OFFLINE is set, so the Hub was not asked{self.ready}")
        token = get_token()
        if not token:
            raise UserError(f"the Hub wants to know who publishes: run `hf auth login` or set HF_TOKEN{self.ready}")
        if not re.fullmatch(r"[!-~]+", token):
            raise UserError(f"HF_TOKEN, or what `hf auth login` kept, has signs that no token has{self.ready}")
        if not is_reachable():
            raise PublishError(f"the Hub, {constants.ENDPOINT}, cannot be reached from here{self.ready}")
        disable_progress_bars()
        logging.set_verbosity(ERROR)  # what is tried again and succeeds is nobody's concern
        self.api = HfApi(library_name="sslkit")

    def prepare(self, *, private: bool) -> None:
        """See that repository and branch are there, and no more public than asked for."""
        self._ask(lambda: self.api.create_repo(self.repo_id, private=private or None, exist_ok=True))
        if private and not self._ask(lambda: self.api.model_info(self.repo_id)).private:
            raise UserError(
                f"--private: {self.repo_id} is there already and public, and nothing was sent; make it private in its "
                f"settings first, or publish under another name{self.ready}"
            )
        if self.revision != "main" and not PULL_REQUEST.fullmatch(self.revision):
            self._ask(lambda: self.api.create_branch(self.repo_id, branch=self.revision, exist_ok=True))

    def newest_commit(self) -> str:
        """The branch's, before ours."""
        return self._ask(lambda: self.api.model_info(self.repo_id, revision=self.revision)).sha or ""

    def has_card_by_hand(self, commit: str) -> bool:
        """Whether a commit has a card that no publication wrote, one in which more is said than a licence."""
        card = self._content(CARD, commit)
        if card is None or not re.sub(rb"\A---\r?\n.*?^---\s*", b"", card, flags=re.DOTALL | re.MULTILINE).strip():
            return False
        sums = _sums((self._content(SUMS, commit) or b"").decode(errors="replace"))
        return sums.get(CARD) != hashlib.sha256(card).hexdigest()

    def _content(self, name: str, commit: str) -> bytes | None:
        """A small file of a commit; None where it has none of that name."""

        def content() -> bytes | None:
            with tempfile.TemporaryDirectory() as cache, suppress(EntryNotFoundError):
                return Path(hf_hub_download(self.repo_id, name, revision=commit, cache_dir=cache)).read_bytes()
            return None

        return self._ask(content)

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
        self.ready = f"; commit {commit} was made, and the same command checks it again"
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
            f"do not use it, and publish again from {self.folder}"
        )

    def _ask(self, question: Callable[[], Answer]) -> Answer:
        """The Hub's answer, after some patience with a busy one or a broken line."""
        for wait in (*WAITS, None):
            try:
                get_session().timeout = SILENCE
                return question()
            except LocalTokenNotFoundError as error:
                raise UserError(f"the Hub wants a token: run `hf auth login` or set HF_TOKEN{self.ready}") from error
            except HfHubHTTPError as error:
                if wait is None or error.response.status_code not in (*BUSY, *OVERTAKEN):
                    raise self._sentence(error) from error
                time.sleep(_asked_to_wait(error, wait))
            except Exception as error:  # of which library a broken line's is depends on the version
                if isinstance(error, ValueError) and not isinstance(error, json.JSONDecodeError):
                    # The client's own word for a card that the Hub refuses.
                    raise UserError(f"{self.repo_id}: {_in_a_line(error)}{self.ready}") from error
                if wait is None:
                    what = "the line broke"
                    if isinstance(error, ValueError | TypeError | LookupError | AttributeError):
                        what = f"{constants.ENDPOINT} does not answer as the Hub does (is a proxy in between?)"
                    raise PublishError(f"{self.repo_id}: {what}: {_in_a_line(error)}{self.ready}") from error
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
                f"the right to write{_own_words(error)}{self.ready}"
            )
        if isinstance(error, RepositoryNotFoundError) or status == 404:
            return UserError(f"{self.repo_id} [{self.revision}]: not there for this token{self.ready}")
        if status in BUSY:
            return PublishError(f"{self.repo_id}: the Hub is busy (status {status}){self.ready}")
        if status in OVERTAKEN:
            return PublishError(f"{self.repo_id}: others keep writing to it (status {status}){self.ready}")
        said = _own_words(error) or f": {_in_a_line(error)}"
        return PublishError(f"{self.repo_id}: the Hub answered {status}{said}{self.ready}")


def _asked_to_wait(error: HfHubHTTPError, default: float) -> float:
    """Seconds that the Hub asked to be left alone, within reason; it may say how many, or until when."""
    asked = error.response.headers.get("Retry-After", "")
    seconds = default
    with suppress(ValueError, OverflowError):
        seconds = (
            float(asked) if re.match(r"\s*[\d.]", asked) else parsedate_to_datetime(asked).timestamp() - time.time()
        )
    return min(max(seconds, 0.0), LONGEST_WAIT) if math.isfinite(seconds) else default


def _git_name(file: Path) -> str:
    """Git's name of a file's content, which the Hub gives where a file is not a large one."""
    digest = hashlib.sha1(b"blob %d\0" % file.stat().st_size, usedforsecurity=False)
    with file.open("rb") as stream:
        while block := stream.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _own_words(error: HfHubHTTPError) -> str:
    """What the Hub itself said of it, if anything."""
    said = " ".join(str(getattr(error, "server_message", None) or "").split())
    return f" (the Hub says: {said:.200})" if said else ""


def _in_a_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
