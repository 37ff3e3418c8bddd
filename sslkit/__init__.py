"""sslkit: self-supervised pretraining of timm image encoders.

    recipe = sslkit.load_recipe("mocov3_vits", ["data.path=photos"])
    run = sslkit.train(recipe, "runs/photos")

Names are imported on first use, so that ``sslkit --help`` does not import PyTorch.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

# Keeps albumentations from asking a server for updates at import.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
# By default, waiting OpenMP threads spin and take the cores from data workers: up to ten times slower on CPUs.
# PyTorch reads this when it is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

if TYPE_CHECKING:
    from sslkit.engine import Run, train
    from sslkit.errors import UserError
    from sslkit.recipe.resolve import Recipe, load_recipe

__version__ = "0.1.0"
__all__ = ["Recipe", "Run", "UserError", "load_recipe", "train"]

_HOMES = {"Run": "engine", "train": "engine", "UserError": "errors"}
_HOMES |= {"Recipe": "recipe.resolve", "load_recipe": "recipe.resolve"}


def __getattr__(name: str) -> Any:
    if name in ("adapt", "evaluate", "publish", "report", "methods", "parts", "data"):
        return importlib.import_module(f"sslkit.{name}")
    if name in _HOMES:
        return getattr(importlib.import_module(f"sslkit.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'sslkit' has no attribute {name!r}")
