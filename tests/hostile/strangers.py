"""What whoever made a run folder can do to its files."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def rewrite(file: Path, change: Callable[[Any], Any]) -> None:
    file.write_text(json.dumps(change(json.loads(file.read_text()))))


def resign(checkpoint: Path) -> None:
    """Make the manifest agree with whatever the files are now, as whoever made them can."""
    files = {}
    for file in checkpoint.iterdir():
        if file.name != "manifest.json":
            content = file.read_bytes()
            files[file.name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (checkpoint / "manifest.json").write_text(json.dumps({"format": 1, "files": files}))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, to see afterwards that nothing was written."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}
