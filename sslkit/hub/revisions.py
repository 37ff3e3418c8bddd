"""Encoders on the Hugging Face Hub, resolved to a commit before they are loaded."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
from huggingface_hub import hf_hub_download, model_info, try_to_load_from_cache
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

from sslkit.errors import UserError, first_line
from sslkit.hub.availability import unavailable_reason
from sslkit.hub.untrusted import check_model, read_encoder_config, tensor_shapes

PREFIXES = ("hf_hub:", "hf-hub:")
NAME = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")
COMMIT = re.compile(r"[0-9a-f]{40}")
CONFIG, WEIGHTS = "config.json", "model.safetensors"
TIMEOUT = 10.0  # seconds, to resolve a revision
# Keys of timm's configuration that make it load other weights.
OTHER_WEIGHTS = ("hf_hub_filename", "custom_load", "file", "url", "state_dict", "source")


@dataclass(frozen=True)
class HubEncoder:
    """An encoder on the Hub at a commit: timm's name for it, the commit, its name in tables and its files."""

    source: str
    revision: str  # 40 hexadecimal digits
    description: str
    folder: Path


def is_hub_name(name: str) -> bool:
    """Whether the name starts with ``hf_hub:``."""
    return name.startswith(PREFIXES)


def resolve_hub_encoder(name: str) -> HubEncoder:
    """Resolve ``hf_hub:user/repo`` or ``hf_hub:user/repo@revision`` to a commit, download it and check it.

    Offline, the newest commit is the one that was cached last. Raises `UserError` if there is no such repository or no
    connection, or if the encoder fails the checks of `sslkit.hub.untrusted`.
    """
    match = NAME.fullmatch(name.removeprefix(PREFIXES[0]).removeprefix(PREFIXES[1]))
    if match is None:
        raise UserError(f"{name}: write a repository of the Hub as hf_hub:user/name or hf_hub:user/name@revision")
    repo = match["repo"]
    try:
        revision, (config_file, weights) = _download(repo, match["revision"] or "main", (CONFIG, WEIGHTS))
    except Exception as error:  # the Hub's client raises many types
        reason = f"{first_line(error)}{unavailable_reason()}"
        raise UserError(f"{name}: its {CONFIG} and {WEIGHTS} cannot be downloaded: {reason}") from error
    config = read_encoder_config(config_file.parent)
    if keys := [key for key in OTHER_WEIGHTS if config.preprocessing.get(key)]:
        raise UserError(f"{name}: its {CONFIG} sets {keys[0]!r}, which would load weights from elsewhere")
    check_model(config, tensor_shapes(weights), name)
    return HubEncoder(f"hf-hub:{repo}@{revision}", revision, f"hf_hub:{repo}@{revision[:12]}", config_file.parent)


def resolve_timm_weights(name: str) -> tuple[str, dict[str, Any]]:
    """The newest commit of timm's pretrained weights, and the arguments with which timm loads that commit.

    Empty if the weights are not on the Hub or the Hub cannot be reached; timm then loads what it can.
    """
    try:
        config: Any = timm.get_pretrained_cfg(name)
        revision, _ = _download(config.hf_hub_id, "main", (config.hf_hub_filename or WEIGHTS,))
    except Exception:  # timm will raise it again, with its own message
        return "", {}
    return revision, {"pretrained_cfg_overlay": {"hf_hub_id": f"{config.hf_hub_id}@{revision}", "url": ""}}


def _download(repo: str, revision: str, names: Sequence[str]) -> tuple[str, list[Path]]:
    """Download files of one commit. The Hub's client would resolve a branch again for every file."""
    commit = revision if COMMIT.fullmatch(revision) else _newest_commit(repo, revision, names[0])
    files = [Path(hf_hub_download(repo, name, revision=commit)) for name in names]
    if commit != revision:
        # The file is already there: this only stores the branch's commit in the cache, for use without the Hub.
        hf_hub_download(repo, names[0], revision=revision)
    return commit, files


def _newest_commit(repo: str, revision: str, file: str) -> str:
    """The commit of a branch or tag; from the cache if the Hub does not answer."""
    try:
        return str(model_info(repo, revision=revision, timeout=TIMEOUT).sha)
    except (RepositoryNotFoundError, RevisionNotFoundError):
        raise
    except Exception:  # network errors have many types
        if isinstance(cached := try_to_load_from_cache(repo, file, revision=revision), str):
            return Path(cached).parent.name
        raise
