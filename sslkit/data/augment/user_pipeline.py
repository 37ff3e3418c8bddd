"""A pipeline of the user's own as data: read, checked and recorded by content. Nothing here runs a transform."""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import BaseModel, ConfigDict, model_validator

from sslkit.errors import first_line

SUFFIXES = (".yaml", ".yml", ".json")
MAX_BYTES = 100_000
MAX_VALUES = 5_000  # in a pipeline, anchors of YAML written out
NAME = "__class_fullname__"
HOW = "write it by A.save(pipeline, FILE, data_format='yaml')"
# Arguments of transforms that are files or code.
NOT_DATA = ("font_path", "read_fn", "reference_images", "reference_data", "templates")
CROPS = ("RandomResizedCrop", "RandomSizedCrop")
TARGETS = ("bbox_params", "keypoint_params", "additional_targets")


class UserPipeline(BaseModel):
    """A serialised albumentations pipeline: ``[views.transforms]`` of a resolved recipe.

    Attributes:
        pipeline: Canonical JSON of what `albumentations.to_dict` returns, without the version.
        pipeline_sha256: Digest of ``pipeline``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    pipeline: str
    pipeline_sha256: str = ""

    @model_validator(mode="after")
    def _canonical(self) -> Self:
        text = canonical_json(self.pipeline)
        digest = hashlib.sha256(text.encode()).hexdigest()
        if self.pipeline_sha256 not in ("", digest):
            raise ValueError("pipeline_sha256 is not the digest of pipeline; leave it out to accept the pipeline")
        object.__setattr__(self, "pipeline", text)
        object.__setattr__(self, "pipeline_sha256", digest)
        return self

    def transforms(self) -> list[dict[str, Any]]:
        """The outermost transforms, each with its arguments, its name under ``__class_fullname__``."""
        outermost: dict[str, Any] = json.loads(self.pipeline)["transform"]
        return list(outermost["transforms"])

    def crops(self) -> list[str]:
        """The random resized crops in it."""
        return [name for name in self.class_names() if name in CROPS]

    def class_names(self) -> list[str]:
        """The class of every transform and composition, without the module."""
        return [short_name(each[NAME]) for each in _nodes(json.loads(self.pipeline)["transform"])]


def read_pipeline(path: str, beside: Path | None = None) -> dict[str, str]:
    """Read a file that `albumentations.save` wrote, in YAML or JSON, as the table of a `UserPipeline`.

    A relative path is looked for in the working directory, then in the folder ``beside``, that of the recipe. Raises
    `ValueError`, whose message is a sentence, if there is no such file, or it is no pipeline.
    """
    files = [Path(path), *([beside / path] if beside else [])]
    file = next((each for each in files if each.is_file()), None)
    if file is None:
        looked = " and ".join(str(each.absolute()) for each in files)
        raise ValueError(f"{path}: no such file; looked for it at {looked}")
    try:
        if file.stat().st_size > MAX_BYTES:
            raise ValueError(f"more than {MAX_BYTES} bytes; no pipeline needs so many")
        return {"pipeline": canonical_json(file.read_text(encoding="utf-8"))}
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def canonical_json(text: str) -> str:
    """Pipeline in YAML or JSON as JSON, the same for equal pipelines; `ValueError` if it is none or has code."""
    try:
        tree = yaml.safe_load(text)  # of which JSON is a part
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a bad date is a ValueError
        raise ValueError(f"not readable as YAML or JSON: {first_line(error)}; {HOW}") from error
    if not isinstance(tree, dict) or not isinstance(tree.get("transform"), dict):
        raise ValueError(f"not a pipeline of albumentations; {HOW}")
    budget = [MAX_VALUES]
    plain = {"transform": _plain(tree["transform"], budget)}
    _check_outermost(plain["transform"])
    for node in _nodes(plain["transform"]):
        _check_node(node)
        node[NAME] = short_name(node[NAME])
    return json.dumps(plain, sort_keys=True, separators=(",", ":"))


def short_name(name: str) -> str:
    """A class name without albumentations' modules, as `albumentations.from_dict` reads it."""
    return name.rpartition(".")[2] if name.startswith("albumentations.") else name


def _plain(value: Any, budget: list[int]) -> Any:
    """A copy of plain data; counts its values down from ``budget``, so that nested YAML anchors end."""
    budget[0] -= 1
    if budget[0] < 0:
        raise ValueError(f"more than {MAX_VALUES} values; no pipeline needs so many")
    if isinstance(value, Mapping):
        return {str(key): _plain(each, budget) for key, each in value.items()}
    if isinstance(value, list):
        return [_plain(each, budget) for each in value]
    if value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value)):
        return value
    raise ValueError(f"holds {str(value)[:50]!r}; a pipeline is numbers, texts, lists and tables")


def _nodes(node: Any) -> Iterator[dict[str, Any]]:
    """Every table with a class name, and every entry of a list of transforms."""
    yield node
    for each in node.get("transforms") or []:
        yield from _nodes(each)


def _check_outermost(outermost: dict[str, Any]) -> None:
    name = outermost.get(NAME)
    if not isinstance(name, str) or short_name(name) != "Compose":
        raise ValueError(f"the outermost transform must be Compose, not {name!r}; {HOW}")
    if not isinstance(outermost.get("transforms"), list):
        raise ValueError(f"Compose has no list of transforms; {HOW}")


def _check_node(node: dict[str, Any]) -> None:
    if not isinstance(node, dict) or not isinstance(node.get(NAME), str):
        raise ValueError(f"a transform has no {NAME}; {HOW}")
    name = short_name(node[NAME])
    if name == "Lambda" or not name.isidentifier():
        raise ValueError(f"{name!r} is code, which a recipe never runs; take transforms that come with albumentations")
    if not isinstance(node.get("transforms", []), list):
        raise ValueError(f"{name}: transforms must be a list")
    if found := sorted(key for key in NOT_DATA if node.get(key) is not None):
        raise ValueError(f"{name} {found[0]}: names other files or code, which would not be recorded with the run")
    if found := sorted(key for key in TARGETS if node.get(key)):
        raise ValueError(f"{name} {found[0]}: views are images only; leave it out")
