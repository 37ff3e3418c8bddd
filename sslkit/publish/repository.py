"""Publish a run on the Hugging Face Hub: write a folder, then send it as one commit, so nothing on the Hub is lost."""

import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import constants

from sslkit.errors import UserError, check_path
from sslkit.files.atomic import refuse_links, sha256_of, write_file, write_text
from sslkit.publish.encoder_folder import check_license, new_folder
from sslkit.publish.export import check_run, write_export
from sslkit.publish.hub_upload import CHECKSUMS, PULL_REQUEST, HubUpload, parse_checksums
from sslkit.publish.model_card import CURVES

REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
REVISION = re.compile(r"(?=.{1,200}$)[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)*")


@dataclass(frozen=True)
class Published:
    """A published encoder.

    Attributes:
        folder: The files that were sent.
        files: Their names and sizes in bytes.
        commit: Commit on the Hub; empty after a dry run.
        url: Address of the repository; empty after a dry run.
        is_new: Whether the commit is new; False if the Hub already had all files.
        replaced_card: Last commit with a manually written card that was replaced; else empty.
        loads_in_timm: Whether ``timm.create_model`` can load the encoder.
    """

    folder: str
    files: dict[str, int]
    loads_in_timm: bool
    commit: str = ""
    url: str = ""
    is_new: bool = False
    replaced_card: str = ""


def publish_run(
    run: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str = "main",
    license_id: str = "apache-2.0",
    dry_run: bool = False,
) -> Published:
    """Publish a run's newest encoder with a model card, as one commit.

    The repository ``user/name`` and the branch ``revision`` are created if needed; a pull request such as ``refs/pr/1``
    must exist. If ``private``, a public repository is refused. A dry run only writes the files, to ``RUN/publish``, or
    to a temporary folder if the run folder is read-only.

    Raises:
        UserError: There is no such run, a name is invalid, the files were changed manually, or the token is refused.
        PublishError: The Hub cannot be reached, is busy, or has other bytes than were sent.
    """
    run = _check_arguments(run, repo_id, revision)
    check_license(license_id)
    folder = _writable_parent(run) / "publish"
    _refuse_changes(folder, repo_id)
    is_branch = revision != "main" and not PULL_REQUEST.fullmatch(revision)  # a pull request is merged into main
    source = f"hf_hub:{repo_id}@{revision}" if is_branch else f"hf_hub:{repo_id}"
    with new_folder(folder) as temporary:
        curves = run / "pictures" / CURVES
        if curves.is_file():
            write_file(temporary / CURVES, [curves.read_bytes()])
        exported = write_export(run, temporary, folder, source, license_id, curves=curves.is_file())
        checksums = "".join(f"{sha256_of(file)}  {file.name}\n" for file in sorted(temporary.iterdir()))
        write_text(temporary / CHECKSUMS, checksums)
    files = {file.name: file.stat().st_size for file in sorted(folder.iterdir())}
    if dry_run:
        return Published(str(folder), files, exported["loads_in_timm"])
    upload = HubUpload(repo_id, revision, folder)
    upload.prepare(private=private)
    before = upload.newest_commit()
    replaced = before if upload.has_manual_card(before) else ""
    commit = upload.send(sorted(files)).oid
    upload.verify(commit)
    url = f"{constants.ENDPOINT}/{repo_id}"
    return Published(str(folder), files, exported["loads_in_timm"], commit, url, commit != before, replaced)


def _check_arguments(run: str | Path, repo_id: str, revision: str) -> Path:
    check_path(run, "RUN")
    run = Path(run)
    if not REPO_ID.fullmatch(repo_id) or ".." in repo_id or "--" in repo_id or repo_id.endswith(".git"):
        raise UserError(f"--repo-id: must be user/name of letters, digits, '-', '_' and '.', not {repo_id!r:.100}")
    if not REVISION.fullmatch(revision) or ".." in revision or revision.endswith((".lock", ".")):
        raise UserError(f"--revision: must be a branch or a pull request such as refs/pr/1, not {revision!r:.100}")
    check_run(run)
    refuse_links(run)
    return run


def _writable_parent(run: Path) -> Path:
    """The run folder, or a temporary folder if it is read-only."""
    if os.access(run, os.W_OK):
        return run
    try:
        return Path(tempfile.mkdtemp(prefix="sslkit-"))
    except OSError as error:
        raise UserError(f"{run}: is read-only, and no temporary folder can be created: {error}") from error


def _refuse_changes(folder: Path, repo_id: str) -> None:
    """Raise `UserError` if a file in the folder was edited or added by hand, such as the model card."""
    if not folder.is_dir():
        return
    try:
        file = folder / CHECKSUMS
        checksums = parse_checksums(file.read_text(encoding="utf-8")) if file.is_file() else {}
        others = (entry for entry in sorted(folder.iterdir()) if entry != file)
        changed = [each for each in others if not each.is_file() or checksums.get(each.name) != sha256_of(each)]
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: cannot be read: {error}") from error
    if changed:
        raise UserError(
            f"{changed[0]}: was changed or added manually, and publishing replaces the folder; move it away, "
            f"or send the folder as it is with `hf upload {repo_id} {folder}`"
        )
