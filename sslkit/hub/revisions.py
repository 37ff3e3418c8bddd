"""Encoders of the Hugging Face Hub, each at one commit: what was resolved first is what is loaded and named."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
from huggingface_hub import hf_hub_download, model_info, try_to_load_from_cache
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

from sslkit.errors import UserError
from sslkit.hub.availability import why_not
from sslkit.hub.untrusted import check_model, read_encoder_config, tensor_shapes

PREFIXES = ("hf_hub:", "hf-hub:")
NAME = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")
COMMIT = re.compile(r"[0-9a-f]{40}")
CONFIG, WEIGHTS = "config.json", "model.safetensors"
SECONDS = 10.0  # that the Hub may take to say which commit is newest
# Of timm's configuration, what would have it load something else than these weights.
ELSEWHERE = ("hf_hub_filename", "custom_load", "file", "url", "state_dict", "source")


@dataclass(frozen=True)
class Pinned:
    """An encoder of the Hub at a commit.

    Attributes:
        source: timm's name for it.
        revision: The commit, forty hexadecimal digits.
        description: What to call it in tables.
        folder: Its files.
    """

    source: str
    revision: str
    description: str
    folder: Path


def is_hub_name(name: str) -> bool:
    """Whether it is ``hf_hub:user/repo``, perhaps with ``@revision``."""
    return name.startswith(PREFIXES)


def pin(name: str) -> Pinned:
    """Resolve a name to the commit it has now (or had when it was cached, offline), and look at what lies there.

    Raises:
        UserError: No such name, no connection, or no encoder that may be built; see `sslkit.hub.untrusted`.
    """
    found = NAME.fullmatch(name.removeprefix(PREFIXES[0]).removeprefix(PREFIXES[1]))
    if found is None:
        raise UserError(f"{name}: a repository of the Hub is written hf_hub:user/name or hf_hub:user/name@revision")
    repo = found["repo"]
    try:
        revision, (config_file, weights) = _fetch(repo, found["revision"] or "main", (CONFIG, WEIGHTS))
    except Exception as error:  # a network makes the Hub's client raise anything
        raise UserError(f"{name}: its {CONFIG} and {WEIGHTS} cannot be had: {_first_line(error)}{why_not()}") from error
    config = read_encoder_config(config_file.parent)
    if elsewhere := [key for key in ELSEWHERE if config.preprocessing.get(key)]:
        raise UserError(f"{name}: its {CONFIG} sets {elsewhere[0]!r}, which would load other weights than its own")
    check_model(config, tensor_shapes(weights), name)
    described = f"hf_hub:{repo}@{revision[:12]}"
    return Pinned(f"hf-hub:{repo}@{revision}", revision, described, config_file.parent)


def pin_timm(name: str) -> tuple[str, dict[str, Any]]:
    """The commit at which timm's own weights of a model lie now, and the arguments that have timm load that one.

    Nothing and none where timm has them from elsewhere, or the Hub cannot be asked: timm then does what it can.
    """
    try:
        config: Any = timm.get_pretrained_cfg(name)
        revision, _ = _fetch(config.hf_hub_id, "main", (config.hf_hub_filename or WEIGHTS,))
    except Exception:  # whatever it is, timm will meet it too, and its word is passed on
        return "", {}
    return revision, {"pretrained_cfg_overlay": {"hf_hub_id": f"{config.hf_hub_id}@{revision}", "url": ""}}


def _fetch(repo: str, revision: str, names: Sequence[str]) -> tuple[str, list[Path]]:
    """Files of one commit. The Hub's client asks for a branch anew with every file, so it is given the commit."""
    commit = revision if COMMIT.fullmatch(revision) else _newest(repo, revision, names[0])
    files = [Path(hf_hub_download(repo, name, revision=commit)) for name in names]
    if commit != revision:
        # Nothing is fetched, for it is there; the cache learns which commit the branch had, for when there is no Hub.
        hf_hub_download(repo, names[0], revision=revision)
    return commit, files


def _newest(repo: str, revision: str, file: str) -> str:
    """The commit of a branch or tag; of the cache's one, where the Hub does not answer."""
    try:
        return str(model_info(repo, revision=revision, timeout=SECONDS).sha)
    except (RepositoryNotFoundError, RevisionNotFoundError):
        raise
    except Exception:  # whatever a network raises
        if isinstance(cached := try_to_load_from_cache(repo, file, revision=revision), str):
            return Path(cached).parent.name
        raise


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
