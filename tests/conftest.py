"""Small real data and recipes shared by the tests."""

import contextlib
import importlib
import io
import os
import tempfile

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # every test compares CPU numbers
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["SSLKIT_CACHE"] = (cache := tempfile.TemporaryDirectory(prefix="sslkit-features-")).name
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tensors here are too small for threads to pay

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import sslkit  # sets thread waiting before torch starts threads
from sslkit.cli import main
from sslkit.data.sources.image_source import DataConfig, open_source
from sslkit.methods import METHODS
from sslkit.recipe.resolve import Recipe, build_recipe

assert sslkit.__version__


def small_recipe(name: str = "moco_v3", model: str = "test_vit", /, **tables: dict[str, Any]) -> Recipe:
    """A recipe that trains in seconds on the bundled images."""
    options: dict[str, dict[str, Any]] = {
        "moco_v1": {"queue_size": 96, "dim": 16, "bn_groups": 2},
        "moco_v2": {"queue_size": 96, "dim": 16, "bn_groups": 2},
        "moco_v3": {"hidden_dim": 32, "dim": 16},
        "simclr": {"dim": 16},
        "byol": {"hidden_dim": 32, "dim": 16},
        "swav": {"hidden_dim": 32, "dim": 16, "prototypes": 12, "freeze_prototypes_steps": 2},
        "instdisc": {"dim": 16, "negatives": 24},
        "end_to_end": {"dim": 16, "bn_groups": 2},
        "memory_bank": {"dim": 16, "negatives": 24},
    }
    base: dict[str, dict[str, Any]] = {
        "method": {"name": name, **(options[name] if name in METHODS else {})},
        "backbone": {"name": model},
        "data": {"path": "builtin:fashion_mnist", "split": "test", "workers": 0},
        "views": {
            "policy": "small_gray",
            "size": 32,
            **({"small_crops": 2, "small_size": 16} if name == "swav" else {}),
        },
        "train": {"epochs": 1, "batch_size": 32, "max_steps": 6, "log_every": 1},
        "checkpoint": {"every_minutes": 0},
        "schedule": {"warmup_epochs": 0},
    }
    if name == "swav":
        base["views"] |= {"small_crops": 2, "small_size": 32, "small_scale": [0.1, 0.4]}
    for table, keys in tables.items():
        base[table] = {**base.get(table, {}), **keys}
    return build_recipe(base, name="test recipe")


@pytest.fixture(scope="session")
def class_folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty real pictures as PNG files in a folder per class."""
    root = tmp_path_factory.mktemp("classes")
    source = open_source(DataConfig(path="builtin:fashion_mnist", split="test"))
    for index, label in enumerate(source.labels()[:40]):
        folder = root / label.replace("/", "-")
        folder.mkdir(exist_ok=True)
        Image.fromarray(source.read(index)).save(folder / f"picture_test_{index:03d}.png")
    return root


def cli_error(arguments: list[str]) -> str:
    """What a command prints that refuses its input: one line, exit code 2, no traceback."""
    printed = io.StringIO()
    with contextlib.redirect_stderr(printed), pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2, printed.getvalue()
    text = printed.getvalue()
    assert text.count("\n") == 1, text
    assert text.startswith("sslkit: "), text
    return text.strip()


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """Exit code, output and error output of a command."""
    try:
        main(list(words))
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    printed = capsys.readouterr()
    return code, printed.out, printed.err


@pytest.fixture(scope="session")
def garments() -> Iterator[Any]:
    """The program that renders pictures for detection."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
        yield importlib.import_module("garments")


@pytest.fixture(scope="session")
def rendered(garments: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder in VOC's or COCO's format: 24 pictures to learn from and 6 to score on, two classes."""
    folders: dict[str, Path] = {}

    def folder_of(layout: str) -> Path:
        if layout not in folders:
            folders[layout] = tmp_path_factory.mktemp("rendered") / layout
            garments.render(folders[layout], layout, {"train": 24, "val": 6}, side=64, seed=3, classes=2)
        return folders[layout]

    return folder_of
