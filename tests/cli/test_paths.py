"""Paths that cannot be written down, in every place of every command and of the functions behind them."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import cli_error, small_recipe

import sslkit
from sslkit.cli import main
from sslkit.data.sources.image_source import DataConfig, open_source
from sslkit.engine.replay import replay_step
from sslkit.errors import UserError, check_path
from sslkit.evaluate import load_encoder
from sslkit.publish import export_detectron2, export_encoder, import_checkpoint, publish_run
from sslkit.recipe.resolve import build_recipe, load_recipe
from sslkit.report import draw_curves, read_runs, write_views

KINDS = {
    "not UTF-8": ("caf\udce9", "caf\\xe9 is not valid UTF-8"),
    "NUL": ("caf\0e", "caf\\u0000e has a NUL character"),
    "line break": ("caf\ne", "caf\\ne has a line break"),
}
RENAME = "; rename the file or folder, and give its new name"

# X stands for the path, RUN for a run folder, DATA for images of classes, NEW for what is not there yet.
COMMANDS = [
    *("pretrain X", "pretrain RECIPE --output X", "pretrain RECIPE --output NEW --resume X"),
    "pretrain RECIPE --output NEW --data X",
    *(f"pretrain RECIPE --output NEW --set {key}=X" for key in ("data.path", "data.data_dir", "data.data_files")),
    "pretrain RECIPE --output NEW --set monitor.data=X",
    "pretrain RECIPE --output NEW --set backbone.pretrained=local-dir:X",
    *("doctor RECIPE --data X", "bench RECIPE --data X", "recipes show X", "recipes show RECIPE --set data.path=X"),
    *("views RECIPE --data X --output NEW", "views RECIPE --output X", "submit RECIPE --output X --dry-run"),
    *("data check X", "prepare X NEW", "prepare DATA X"),
    *("eval knn X --data DATA", "eval knn RUN --data X", "eval knn RUN --data DATA --baseline X"),
    *(
        "eval linear RUN --data X",
        "eval sweep RUN --data X",
        "eval finetune RUN --data X",
        "eval diagnose RUN --data X",
    ),
    *("eval finetune RUN --data DATA --labels X", "eval detect RUN --data X", "eval diagnose X --data DATA"),
    *("eval compare X", "report X", "report RUN --output X", "report RUN --data X --output NEW", "watch X --once"),
    *("export X NEW", "export RUN X", "export RUN X --format detectron2", "import X NEW", "import FILE X"),
    *("publish X --repo-id me/x --dry-run", "replay X"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, class_folders: Path) -> Path:
    """A folder with a recipe, a run, its images, and a file and folder of every kind of bad name."""
    root = tmp_path_factory.mktemp("paths")
    data = shutil.copytree(class_folders, root / "data")
    recipe = small_recipe("simclr", "test_resnet", data={"path": str(data), "split": "train"}, train={"max_steps": 1})
    (root / "recipe.toml").write_text(recipe.to_toml())
    sslkit.train(recipe, root / "run")
    shutil.copy(root / "run/encoder/model.safetensors", root / "weights.safetensors")
    return root


def files(folder: Path) -> dict[str, bytes]:
    return {str(each): each.read_bytes() if each.is_file() else b"" for each in sorted(folder.rglob("*"))}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_refuses_it_and_writes_nothing(
    command: str, kind: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    word, fault = KINDS[kind]
    given = {"RECIPE": "recipe.toml", "RUN": "run", "DATA": "data", "NEW": "new", "FILE": "weights.safetensors"}
    words = [given.get(each, each).replace("X", word) for each in command.split()]
    before = files(place)
    said = cli_error(words)
    assert fault + RENAME in said, said
    assert files(place) == before


FUNCTIONS: dict[str, Callable[[Any, Path], object]] = {
    "train, output": lambda bad, root: sslkit.train(load_recipe(root / "recipe.toml"), root / bad),
    "train, resume": lambda bad, root: sslkit.train(load_recipe(root / "recipe.toml"), root / "new", resume=bad),
    "load_recipe": lambda bad, root: load_recipe(root / bad),
    "build_recipe": lambda bad, root: build_recipe(
        load_recipe(root / "recipe.toml").as_tables() | {"data": {"path": bad}}),
    "open_source": lambda bad, root: open_source(DataConfig(path=bad)),
    "build_recipe, mix": lambda bad, root: build_recipe(
        load_recipe(root / "recipe.toml").as_tables() | {"data": {"mix": [{"path": "data"}, {"path": bad}]}}
    ),
    "open_source, files": lambda bad, root: open_source(DataConfig(path="parquet", data_files=["a.parquet", bad])),
    "load_encoder": lambda bad, root: load_encoder(bad),
    "export_encoder": lambda bad, root: export_encoder(root / "run", root / bad),
    "export_encoder, run": lambda bad, root: export_encoder(root / bad, root / "new"),
    "export_detectron2": lambda bad, root: export_detectron2(root / "run", root / bad),
    "import_checkpoint": lambda bad, root: import_checkpoint(root / "weights.safetensors", root / bad),
    "publish_run": lambda bad, root: publish_run(root / bad, "me/x", dry_run=True),
    "read_runs": lambda bad, root: read_runs([root / bad]),
    "draw_curves": lambda bad, root: draw_curves(root / bad),
    "write_views": lambda bad, root: write_views(load_recipe(root / "recipe.toml"), "x", root / bad),
    "replay_step": lambda bad, root: replay_step(root / bad),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_function_refuses_it_by_the_same_sentence(function: str, kind: str, place: Path) -> None:
    word, fault = KINDS[kind]
    before = files(place)
    with pytest.raises(UserError) as caught:
        FUNCTIONS[function](word, place)
    assert fault + RENAME in str(caught.value)
    assert files(place) == before


@pytest.mark.parametrize("path", ["photos", "München/日本 2", "a'b\"c$d", "x" * 300, "", " ", "hf_hub:me/x@main"])
def test_other_paths_pass(path: str) -> None:
    check_path(path, "--data")


def test_words_that_are_no_paths_may_have_line_breaks(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["recipes", "show", str(place / "recipe.toml"), "--set", 'reference.note="""a\nb"""'])
    assert ended.value.code == 0
    assert "note" in capsys.readouterr().out


def test_bytes_that_are_not_utf8_are_fine_within_the_data(place: Path, tmp_path: Path) -> None:
    """Names of images and of classes."""
    picture = next((place / "data").rglob("*.png"))
    for name in ("caf\udce9", "b"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for index in range(4):
            shutil.copy(picture, tmp_path / "data" / name / f"\udce9{index}.png")
    recipe = small_recipe(
        "simclr",
        "test_resnet",
        data={"path": str(tmp_path / "data"), "split": "train"},
        train={"max_steps": 1, "batch_size": 4},
    )
    assert sslkit.train(recipe, tmp_path / "run").step == 1
    assert sslkit.train(recipe, tmp_path / "run").step == 1


def test_a_run_may_be_called_from_within_a_folder_of_such_a_name(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own path is then plain, and pages show the name in ASCII."""
    run = shutil.copytree(place / "run", tmp_path / "caf\udce9")
    monkeypatch.chdir(run)
    with pytest.raises(SystemExit) as ended:
        main(["report", ".", "--no-gallery"])
    assert ended.value.code == 0
    assert "caf\\xe9" in (run / "report.html").read_text()
