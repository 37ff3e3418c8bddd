"""sslkit: self-supervised pretraining of timm image encoders.

    run = sslkit.train("quickstart", {"train.epochs": 2})
    plan = sslkit.plan_run("photos", hours=0.5)
    run = sslkit.train(plan.recipe, "runs/photos")

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
    from sslkit.engine import Run
    from sslkit.errors import UserError
    from sslkit.plan.make_plan import Plan
    from sslkit.python_api import plan_run, train
    from sslkit.recipe.resolve import Recipe, load_recipe

__version__ = "0.1.0"
__all__ = ["Plan", "Recipe", "Run", "UserError", "load_recipe", "plan_run", "train"]

_HOMES = {"Run": "engine", "UserError": "errors", "Plan": "plan.make_plan"}
_HOMES |= {"plan_run": "python_api", "train": "python_api", "Recipe": "recipe.resolve", "load_recipe": "recipe.resolve"}
_ROOMS = ("adapt", "evaluate", "publish", "report", "methods", "parts", "data")


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"sslkit.{name}")
    if name in _HOMES:
        return getattr(importlib.import_module(f"sslkit.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'sslkit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES, *_ROOMS})  # also those that are not imported yet
