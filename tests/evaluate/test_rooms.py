"""Imports inside sslkit.evaluate go down only: root files, then features, then the kinds of evaluation."""

from pathlib import Path

from test_layers import imports_of

import sslkit.evaluate

ROOT = Path(sslkit.evaluate.__file__).parent
ROOMS = {"": 0, "features": 1, "probes": 2, "label_free": 2, "detection": 2}


def test_imports_inside_go_down_only() -> None:
    upward = []
    for file in ROOT.rglob("*.py"):
        own = file.relative_to(ROOT).parts[0] if file.parent != ROOT else ""
        if file == ROOT / "__init__.py":
            continue
        for module in imports_of(file):
            parts = module.split(".")
            if parts[:2] == ["sslkit", "evaluate"]:
                target = parts[2] if len(parts) > 3 else ""
                if target != own and ROOMS[target] >= ROOMS[own]:
                    upward.append(f"{file.relative_to(ROOT)} imports {module}")
    assert not upward, upward
