"""Wheels built and installed as users do, into folders of their own."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]


def run(command: list[str], cwd: Path, *, timeout: float = 280, **extra: str) -> str:
    """What a command prints; fails with what it complains of."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **extra}
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=timeout, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def build_wheel(project: Path, folder: Path) -> Path:
    """The project's wheel, built by pip in an environment of its own."""
    run([*PIP, "wheel", "--no-deps", "--wheel-dir", str(folder), str(project)], folder)
    [wheel] = folder.glob("*.whl")
    return wheel


def install(wheel: Path, folder: Path) -> Path:
    """The folder a wheel is installed to, without what it depends on."""
    run([*PIP, "install", "--no-deps", "--target", str(folder), str(wheel)], folder.parent)
    return folder
