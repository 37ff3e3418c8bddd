"""Upload of a folder to the Hugging Face Hub, with retries. The same command continues an interrupted upload."""

import hashlib
import json
import math
import re
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
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
)
from huggingface_hub.utils import logging
from huggingface_hub.utils.tqdm import disable_progress_bars

from sslkit.errors import RunError, UserError
from sslkit.files.atomic import sha256_of
from sslkit.hub.availability import unavailable_reason

PULL_REQUEST = re.compile(r"refs/pr/\d+")  # cannot be created here
CHECKSUMS = "SHA256SUMS"
WEIGHTS = "model.safetensors"
CARD = "README.md"
RETRY_DELAYS = (1.0, 5.0)  # seconds, unless the Hub gives one; the Hub's client also retries
MAX_RETRY_DELAY = 60.0
READ_TIMEOUT = 120.0  # seconds without a byte; the client has no timeout
BUSY = (408, 425, 429, 500, 502, 503, 504)
CONFLICT = (409, 412)  # another commit was made at the same time; the next try comes after it
NO_TOKEN = "publishing needs an access token: run `hf auth login` or set HF_TOKEN"
# Mistakes of the user, by the status of the Hub's answer.
MISTAKES = {
    401: "the Hub does not accept the token (missing, wrong or expired); run `hf auth login` or set HF_TOKEN again",
    403: "this token may not write there; use your own user name, or a token with write access",
    404: "does not exist, or this token cannot see it",
}

Answer = TypeVar("Answer")


class PublishError(RunError):
    """The upload to the Hub failed. The folder is complete, and the same command continues."""


class HubUpload:
    """The upload of a folder to one repository. All errors say what to do next."""

    def __init__(self, repo_id: str, revision: str, folder: Path) -> None:
        self.repo_id, self.revision, self.folder = repo_id, revision, folder
        self.next_step = f"; {folder} is ready, and the same command continues"
        token = get_token()
        if not token:
            raise UserError(f"{NO_TOKEN}{self.next_step}")
        if not re.fullmatch(r"[!-~]+", token):
            raise UserError(
                f"HF_TOKEN, or the token of `hf auth login`, has characters that no token has{self.next_step}"
            )
        if reason := unavailable_reason():
            raise PublishError(f"{reason.removeprefix('; ')}{self.next_step}")
        disable_progress_bars()
        logging.set_verbosity(ERROR)  # hides warnings about retries
        self.api = HfApi(library_name="sslkit")

    def prepare(self, *, private: bool) -> None:
        """Create the repository and the branch if needed; refuse a public repository if ``private``."""
        self._request(lambda: self.api.create_repo(self.repo_id, private=private or None, exist_ok=True))
        if private and not self._request(lambda: self.api.model_info(self.repo_id)).private:
            raise UserError(
                f"--private: {self.repo_id} already exists and is public, so nothing was sent; make it private in its "
                f"settings, or publish under another name{self.next_step}"
            )
        if self.revision != "main" and not PULL_REQUEST.fullmatch(self.revision):
            self._request(lambda: self.api.create_branch(self.repo_id, branch=self.revision, exist_ok=True))

    def newest_commit(self) -> str:
        """The newest commit of the branch."""
        return self._request(lambda: self.api.model_info(self.repo_id, revision=self.revision)).sha or ""

    def has_manual_card(self, commit: str) -> bool:
        """Whether a commit has a card with text that `publish_run` did not write."""
        card = self._content(CARD, commit)
        if card is None or not re.sub(rb"\A---\r?\n.*?^---\s*", b"", card, flags=re.DOTALL | re.MULTILINE).strip():
            return False
        checksums = parse_checksums((self._content(CHECKSUMS, commit) or b"").decode(errors="replace"))
        return checksums.get(CARD) != hashlib.sha256(card).hexdigest()

    def _content(self, name: str, commit: str) -> bytes | None:
        """A small file of a commit; None if there is no such file."""

        def content() -> bytes | None:
            with tempfile.TemporaryDirectory() as cache, suppress(EntryNotFoundError):
                return Path(hf_hub_download(self.repo_id, name, revision=commit, cache_dir=cache)).read_bytes()
            return None

        return self._request(content)

    def send(self, names: list[str]) -> CommitInfo:
        """Send the files as one commit. Files that the Hub already has are not sent again."""
        return self._request(
            lambda: self.api.create_commit(
                self.repo_id,
                # New objects at every try, since the client changes them.
                [CommitOperationAdd(name, str(self.folder / name)) for name in names],
                commit_message="Publish an encoder with sslkit",
                revision=self.revision,
            )
        )

    def verify(self, commit: str) -> None:
        """Check that the commit has the weights that were sent, by the Hub's checksum or by downloading them."""
        self.next_step = f"; commit {commit} was made, and the same command checks it again"
        address = hf_hub_url(self.repo_id, WEIGHTS, revision=commit)
        etag = self._request(lambda: get_hf_file_metadata(address, token=get_token())).etag
        expected = sha256_of(self.folder / WEIGHTS)
        if etag == expected:
            return
        with tempfile.TemporaryDirectory() as cache:
            found = self._request(lambda: hf_hub_download(self.repo_id, WEIGHTS, revision=commit, cache_dir=cache))
            if sha256_of(Path(found)) == expected:
                return
        raise PublishError(
            f"{self.repo_id}: {WEIGHTS} of commit {commit} on the Hub has other bytes than were sent; do not use it, "
            f"and publish again from {self.folder}"
        )

    def _request(self, request: Callable[[], Answer]) -> Answer:
        """Make a request; retry if the Hub is busy or the connection breaks."""
        for delay in (*RETRY_DELAYS, None):
            try:
                get_session().timeout = READ_TIMEOUT
                return request()
            except LocalTokenNotFoundError as error:
                raise UserError(f"{NO_TOKEN}{self.next_step}") from error
            except HfHubHTTPError as error:
                if delay is None or error.response.status_code not in (*BUSY, *CONFLICT):
                    raise self._error(error) from error
                time.sleep(_retry_delay(error, delay))
            except Exception as error:  # the type of a connection error depends on the version
                if isinstance(error, ValueError) and not isinstance(error, json.JSONDecodeError):
                    # Raised by the client for a card that the Hub does not accept.
                    raise UserError(f"{self.repo_id}: {_one_line(error)}{self.next_step}") from error
                if delay is None:
                    what = "the connection broke"
                    if isinstance(error, ValueError | TypeError | LookupError | AttributeError):
                        what = f"{constants.ENDPOINT} does not answer like the Hub (is there a proxy in between?)"
                    raise PublishError(f"{self.repo_id}: {what}: {_one_line(error)}{self.next_step}") from error
                time.sleep(delay)
        raise AssertionError("the last try returns or raises")

    def _error(self, error: HfHubHTTPError) -> RunError | UserError:
        status = error.response.status_code
        message = " ".join(str(getattr(error, "server_message", None) or "").split())
        told = f" (the Hub says: {message:.200})" if message else ""
        if status in MISTAKES:
            return UserError(f"{self.repo_id} [{self.revision}]: {MISTAKES[status]}{told}{self.next_step}")
        if status in BUSY:
            return PublishError(f"{self.repo_id}: the Hub is busy (status {status}){self.next_step}")
        if status in CONFLICT:
            return PublishError(f"{self.repo_id}: others keep writing to it (status {status}){self.next_step}")
        told = told or f": {_one_line(error)}"
        return PublishError(f"{self.repo_id}: the Hub answered with status {status}{told}{self.next_step}")


def parse_checksums(text: str) -> dict[str, str]:
    """The checksum of each file, from the format of ``sha256sum``."""
    pairs = (line.split(None, 1) for line in text.splitlines())
    return {pair[1]: pair[0] for pair in pairs if len(pair) == 2}


def _retry_delay(error: HfHubHTTPError, default: float) -> float:
    """Seconds to wait, from the Retry-After header (seconds or a date), at most `MAX_RETRY_DELAY`."""
    value = error.response.headers.get("Retry-After", "")
    try:
        is_number = re.match(r"\s*[\d.]", value)
        seconds = float(value) if is_number else parsedate_to_datetime(value).timestamp() - time.time()
    except (ValueError, OverflowError):
        return default
    return min(max(seconds, 0.0), MAX_RETRY_DELAY) if math.isfinite(seconds) else default


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
