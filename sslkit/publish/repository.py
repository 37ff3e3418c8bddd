"""Publish a run's encoder on the Hugging Face Hub: the files are first written to a folder, then sent as one commit.

Publishing again adds a commit, so nothing on the Hub is lost.
"""

import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import constants

from sslkit.errors import UserError, check_path
from sslkit.files.atomic import atomic_folder, refuse_links, sha256_of, write_file, write_text
from sslkit.publish.card import CURVES, model_card
from sslkit.publish.export import export_encoder
from sslkit.publish.hub_upload import CARD, CHECKSUMS, PULL_REQUEST, HubUpload, parse_checksums
from sslkit.publish.redaction import public_recipe, refuse_tokens

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
    """Publish a run's newest encoder with a model card, as one commit.

    The folder ``RUN/publish`` is written again each time, and has exactly the files that are sent: configuration,
    weights, resolved recipe, card, curves if there is ``RUN/pictures/curves.png``, and checksums. If its files were
    changed manually, it is not touched and an error is raised. If the run folder is read-only, a temporary folder is
    used.

    Args:
        run: Run folder.
        repo_id: ``user/name``; created if it does not exist.
        private: Whether to create a private repository. An existing public one is then refused.
        revision: Branch, created from ``main`` if it does not exist, or a pull request such as ``refs/pr/1``.
        license_id: SPDX id of the licence of the weights.
        dry_run: Write the folder only.

    Raises:
        UserError: There is no such run, a name is invalid, the folder was changed manually, or the token may not write
            to the repository.
        PublishError: The Hub cannot be reached, is busy, or has other bytes than were sent.
    """
    run = _check_arguments(run, repo_id, revision)
    folder = _writable_parent(run) / "publish"
    _refuse_changes(folder, repo_id)
    is_branch = revision != "main" and not PULL_REQUEST.fullmatch(revision)  # a pull request is merged into main
    source = f"hf_hub:{repo_id}@{revision}" if is_branch else f"hf_hub:{repo_id}"
    by_timm = _write_folder(run, folder, source, license_id)
    files = {file.name: file.stat().st_size for file in sorted(folder.iterdir())}
    if dry_run:
        return Published(str(folder), files, "", "", False, "", by_timm)
    upload = HubUpload(repo_id, revision, folder)
    upload.prepare(private=private)
    before = upload.newest_commit()
    replaces_card = upload.has_manual_card(before)
    commit = upload.send(sorted(files)).oid
    upload.verify(commit)
    is_new, replaced = commit != before, before if replaces_card else ""
    return Published(str(folder), files, commit, f"{constants.ENDPOINT}/{repo_id}", is_new, replaced, by_timm)


def _check_arguments(run: str | Path, repo_id: str, revision: str) -> Path:
    check_path(run, "RUN")
    run = Path(run)
    if not REPO_ID.fullmatch(repo_id) or ".." in repo_id or "--" in repo_id or repo_id.endswith(".git"):
        raise UserError(f"--repo-id: must be user/name of letters, digits, '-', '_' and '.', not {repo_id!r:.100}")
    if not REVISION.fullmatch(revision) or ".." in revision or revision.endswith((".lock", ".")):
        raise UserError(f"--revision: must be a branch or a pull request such as refs/pr/1, not {revision!r:.100}")
    if not (run / "recipe.toml").is_file():
        raise UserError(f"{run}: not a run folder (no recipe.toml)")
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
    """Raise `UserError` if the folder's files were changed manually, such as an improved card."""
    if not folder.is_dir():
        return
    try:
        text = (folder / CHECKSUMS).read_text(encoding="utf-8") if (folder / CHECKSUMS).is_file() else ""
        checksums = parse_checksums(text)
        changed = [
            entry.name
            for entry in sorted(folder.iterdir())
            if entry.name != CHECKSUMS and (not entry.is_file() or checksums.get(entry.name) != sha256_of(entry))
        ]
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: cannot be read: {error}") from error
    if changed:
        raise UserError(
            f"{folder / changed[0]}: was changed or added manually, and publishing replaces the folder; move it away, "
            f"or send the folder as it is with `hf upload {repo_id} {folder}`"
        )


def _write_folder(run: Path, folder: Path, source: str, license_id: str) -> bool:
    """Write the folder atomically; returns whether timm can load the encoder."""
    try:
        with atomic_folder(folder) as temporary:
            exported = export_encoder(run, temporary, license_id)
            curves = run / "pictures" / CURVES
            if curves.is_file():
                write_file(temporary / CURVES, [curves.read_bytes()])
            recipe, _ = public_recipe(run / "recipe.toml")
            config = (temporary / "config.json").read_text(encoding="utf-8")
            tag = re.search(r'"tag": "(\w+)"', config)
            card = model_card(recipe, run, source, tag[1] if tag else "", license_id, curves=curves.is_file())
            write_text(temporary / CARD, card)
            checksums = "".join(f"{sha256_of(file)}  {file.name}\n" for file in sorted(temporary.iterdir()))
            write_text(temporary / CHECKSUMS, checksums)
            refuse_tokens(temporary, f"{run / 'recipe.toml'} or {run / 'results.jsonl'}")
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror or error}") from error
    return bool(exported["loads_in_timm"])
