"""Read small JSON files that may come from an untrusted source, and check them against a pydantic model."""

from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from sslkit.files.run_reader import read_regular


class StrictModel(BaseModel):
    """A model whose fields keep their JSON types: no unknown keys, no conversions, finite numbers only."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


Model = TypeVar("Model", bound=BaseModel)


def read_json(file: Path, model: type[Model], max_bytes: int) -> Model:
    """Read a regular file of at most ``max_bytes`` bytes.

    Raises:
        OSError: The file is missing, or is not a regular file.
        ValueError: It is too large, not JSON, or does not fit the model; names the key and its value.
    """
    content = read_regular(file, max_bytes + 1)
    if len(content) > max_bytes:
        raise ValueError(f"more than {max_bytes} bytes")
    try:
        return model.model_validate_json(content)
    except ValidationError as error:
        raise ValueError(first_mistake(error)) from None


def first_mistake(error: ValidationError) -> str:
    """The first mistake that pydantic found, such as ``scaler scale cannot be 'x': input should be a valid number``."""
    item = error.errors(include_url=False)[0]
    where = " ".join(map(str, item["loc"]))[:200]
    if item["type"] == "missing":
        return f"has no {where}"
    reason = item["msg"][:1].lower() + item["msg"][1:200]
    return f"{where} cannot be {item['input']!r:.50}: {reason}" if where else reason
