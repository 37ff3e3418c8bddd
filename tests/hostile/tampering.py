"""Change the files of a run folder, as someone who shares it could."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def rewrite(file: Path, change: Callable[[Any], Any]) -> None:
    file.write_text(json.dumps(change(json.loads(file.read_text()))))


def resign(checkpoint: Path) -> None:
    """Rewrite the manifest so that it matches the changed files."""
    files = {}
    for file in checkpoint.iterdir():
        if file.name != "manifest.json":
            content = file.read_bytes()
            files[file.name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (checkpoint / "manifest.json").write_text(json.dumps({"format": 1, "files": files}))


def contents(folder: Path) -> dict[str, bytes]:
    """The content of every file below a folder, to check that nothing was written."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}
