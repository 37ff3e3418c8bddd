"""Every command in README and docs: all are read by the real command line, and those that a CPU can do are run.

Run, they get words that make them small, in a folder that has what the pages speak of: photographs in class folders,
and runs. What is only read says why below.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import typer
from PIL import Image

from sslkit.cli import app
from sslkit.data.sources.image_source import DataConfig, open_source
from sslkit.recipe.resolve import find_recipe, shipped_recipes
from sslkit.recipe.schema import TABLES

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(?:bash|sh)\n(.*?)^```", flags=re.M | re.S)
KNOWN_WORDS: tuple[str, ...] = ()  # that look like a recipe's name and are not one
LAUNCHERS = ("accelerate", "torchrun")

# By how a command begins, what makes it small enough for a CPU.
TINY = "--set train.max_steps=2 --set train.batch_size=8 --set data.workers=0 --set train.log_every=1"
SMALL = {
    "pretrain mocov3_vits": f"{TINY} --set backbone.name=test_vit --set backbone.img_size=32 --set views.size=32 "
    "--set 'backbone.args={num_heads=2}'",
    "pretrain mocov3_continue": TINY,
    "pretrain --method moco_v2": TINY.replace(
        "batch_size=8", "batch_size=16"
    ),  # as many BN groups as eight images have
    "submit": "--dry-run",
    "doctor --method moco_v2": "--set train.batch_size=16 --set data.workers=0",
    "pretrain": TINY,
    "doctor": "--set train.batch_size=8 --set data.workers=0",
    "eval finetune": "--epochs 1",
    "eval sweep": "--epochs 1",
}
# What is only read: the words it has, and why.
ONLY_READ = {
    "mocov3_vitb": "a ViT-B's work",
    "mocov2_r50": "eight GPUs",
    "--num_processes 8": "eight GPUs",
    "--standalone --nproc_per_node 8": "eight GPUs",
    "--node_rank 0": "waits for a second machine; tests/cluster has two",
    "--machine_rank 0": "waits for a second machine; tests/cluster reads its file",
    "mocov3_continue": "downloads weights",
    "bench mocov3_vits": "a ViT-S's work on 224 pixels; tests/profiling runs it small",
    "doctor mocov3_vits": "a ViT-S's work on 224 pixels; tests/doctor runs it small",
    "eval detect": "minutes to hours; tests/evaluate runs it small",
    "--format detectron2": "needs a ResNet's run; tests/publish has it",
    "import moco_v2_800ep": "the authors' file is not here; tests/publish makes one",
    "--method simsiam": "needs the plugin; tests/examples installs and runs it",
    "LABELLED_FOLDER": "stands for the reader's own",
    "resnet50.a1_in1k": "downloads weights; tests/adapt runs it small",
    "resnet18.a1_in1k": "downloads weights; tests/adapt runs it small",
    "replay runs/mine": "needs a run that was stopped by an alarm; tests/engine has it",
    "runs/simclr": "needs a SimCLR run of one's own; tests/evaluate has it",
    "flowers": "ten minutes of a ViT on a CPU; tests/evaluate runs each small",
}


@dataclass(frozen=True)
class Command:
    """One line of a page's block.

    Attributes:
        page: Its file.
        words: Those of sslkit's own command line, without what launches it.
        launcher: The words before, if there are any.
    """

    page: str
    words: tuple[str, ...]
    launcher: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        return shlex.join([*self.launcher, *self.words])


def commands() -> list[Command]:
    """All that call sslkit, in the order of the pages."""
    found = []
    for page in PAGES:
        for block in BLOCK.findall(page.read_text(encoding="utf-8")):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                words = words[1:] if words[:1] == ["ACCELERATE_USE_CPU=true"] else words
                if words[:1] == ["sslkit"]:
                    found.append(Command(page.name, tuple(words[1:])))
                elif words and words[0] in LAUNCHERS and "-m" in words:
                    at = words.index("-m") + 1
                    own = ["pretrain"] if words[at] == "sslkit.pretrain" else []
                    found.append(Command(page.name, (*own, *words[at + 1 :]), tuple(words[: at + 1])))
    return found


def test_pages_have_commands() -> None:
    assert len(commands()) > 30


@pytest.mark.parametrize("command", commands(), ids=lambda command: f"{command.page}: {command.text}")
def test_the_command_line_knows_it(command: Command) -> None:
    group: Any = typer.main.get_command(app)
    words = list(command.words)
    while hasattr(group, "commands") and (words or not group.invoke_without_command):
        assert words, f"{command.text}: names no command"
        assert words[0] in group.commands, words[0]
        group = group.commands[words.pop(0)]
    # Raises on an option that is not there or wants another kind of value.
    given = group.make_context("sslkit", words).params
    recipe = given.get("recipe") or (given.get("name") if group.name == "show" else "")
    if recipe:
        find_recipe(recipe)


def inline_commands() -> list[tuple[str, str]]:
    """Page and text of the commands in its prose, which may have places to fill in."""
    return [
        (page.name, span.replace("\n", " "))
        for page in PAGES
        for span in re.findall(r"(?<!`)`(sslkit [^`]+)`(?!`)", page.read_text(encoding="utf-8"))
    ]


def test_prose_names_commands_options_and_recipes_that_exist() -> None:
    assert len(inline_commands()) > 30
    for page, text in inline_commands():
        group: Any = typer.main.get_command(app)
        words = [word for word in re.split(r"[\s=]+", text)[1:] if word not in ("...", "…")]
        while hasattr(group, "commands") and words and not words[0].startswith("-"):
            assert words[0] in group.commands, f"{page}: {text}"
            group = group.commands[words.pop(0)]
        options = {name for parameter in group.params for name in (*parameter.opts, *parameter.secondary_opts)}
        for word in words:
            assert not word.startswith("--") or word in {*options, "--help"}, f"{page}: {text}"
        if words and group.params and group.params[0].name == "recipe" and re.fullmatch(r"[a-z][\w./]*", words[0]):
            find_recipe(words[0])


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_prose_names_recipes_and_files_that_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    families = {name.split("_")[0] for name in shipped_recipes()}
    for name in re.findall(r"`(\w+)`", text):
        if "_" in name and name.split("_")[0] in families and name not in KNOWN_WORDS:
            assert name in shipped_recipes(), f"`{name}`"
    for path in re.findall(r"`((?:sslkit|tests|docs|benchmarks|recipes|shared)/[\w/.-]+)", text):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", text):
        assert (page.parent / path).exists(), path


def test_nobody_is_told_to_install_sslkit_from_a_registry() -> None:
    """It is not there yet: in a checkout the extras are ``.[detect]`` and the like."""
    for file in [*PAGES, *(ROOT / "sslkit").rglob("*.py")]:
        assert not re.search(r"pip install [^\n`]*sslkit\[", file.read_text(encoding="utf-8")), file


def why_only_read(command: Command) -> str:
    return next((why for words, why in ONLY_READ.items() if words in command.text), "")


@cache
def place(root: Path) -> Path:
    """A folder with photographs and runs under the names that pages use."""
    source = open_source(DataConfig(path="builtin:fashion_mnist", split="test"))
    for index, label in enumerate(source.labels()[:200]):
        folder = root / "photos" / label.replace("/", "-")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(source.read(index)).resize((48, 48)).save(folder / f"{index}.jpg")
    (root / "tiles").mkdir()
    for index in range(4):
        pixels = np.random.default_rng(index).integers(0, 2**16, (13, 32, 32), dtype=np.uint16)
        tifffile.imwrite(root / "tiles" / f"{index}.tif", pixels, photometric="minisblack", planarconfig="separate")
    shutil.copytree(ROOT / "recipes", root / "recipes")
    sslkit(root, "pretrain", "quickstart", *TINY.split(), "--output", "runs/quickstart")
    sslkit(root, "export", "runs/quickstart", "my-encoder")
    for name in ("folder-of-class-folders", "sorted-photos"):
        (root / name).symlink_to("photos")
    for name in ("a", "b", "c", "photos"):
        shutil.copytree(root / "runs" / "quickstart", root / "runs" / name)
    sslkit(root, "eval", "knn", "runs/a", "--data", "builtin:fashion_mnist")
    shutil.copy(root / "runs" / "a" / "results.jsonl", root / "runs" / "b" / "results.jsonl")
    return root


def sslkit(root: Path, *words: str, launcher: tuple[str, ...] = ("-m", "sslkit")) -> None:
    """Run a command there; it must end well."""
    start = [sys.executable, *launcher] if launcher[0] == "-m" else [str(Path(sys.executable).parent / launcher[0])]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "COLUMNS": "120"}
    env["PYTHONPATH"] = f"{ROOT}:{env.get('PYTHONPATH', '')}"
    rest = () if launcher[0] == "-m" else launcher[1:]
    done = subprocess.run([*start, *rest, *words], cwd=root, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{shlex.join(words)}: {done.stderr[-2000:]}"


@pytest.mark.slow
@pytest.mark.timeout(900)  # the first one makes the place
@pytest.mark.parametrize(
    "command",
    [command for command in commands() if not why_only_read(command)],
    ids=lambda command: f"{command.page}: {command.text}",
)
def test_it_runs(command: Command, tmp_path_factory: pytest.TempPathFactory) -> None:
    root = place(tmp_path_factory.getbasetemp())
    line = " ".join(command.words)
    extra = next((words for start, words in SMALL.items() if line.startswith(start)), "")
    if line == "doctor":
        extra = ""
    words = [*command.words, *shlex.split(extra)]
    if command.words[0] == "pretrain":
        words += ["--output", f"runs/{len(list((root / 'runs').iterdir()))}"]
    launcher = command.launcher or ("-m", "sslkit")
    own = words[1:] if command.launcher and launcher[-1] == "sslkit.pretrain" else words
    sslkit(root, *own, launcher=launcher)


def shell_lines() -> list[tuple[str, str]]:
    """Page and line of all that stands in a block for a shell, indented blocks too."""
    blocks = re.compile(r"^ *```(?:bash|sh)\n(.*?)^ *```", flags=re.M | re.S)
    return [
        (page.name, line)
        for page in PAGES
        for block in blocks.findall(page.read_text(encoding="utf-8"))
        for line in block.splitlines()
    ]


def test_other_commands_name_what_exists() -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.M)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for page, line in shell_lines():
        for target in re.findall(r"\bmake ([\w-]+)", line):
            assert target in targets, f"{page}: {line}"
        for path in re.findall(r"\b(?:benchmarks|tests|docs)/[\w/.-]+", line):
            assert (ROOT / path).exists(), f"{page}: {line}"
        for extra in re.findall(r"(?:sslkit|\.)\[([\w,]+)\]", line):
            assert set(extra.split(",")) <= project["optional-dependencies"].keys(), f"{page}: {line}"


def toml_blocks() -> list[tuple[str, str]]:
    """Page and text of every piece of a recipe."""
    blocks = re.compile(r"^```toml\n(.*?)^```", flags=re.M | re.S)
    found = [(page.name, block) for page in PAGES for block in blocks.findall(page.read_text(encoding="utf-8"))]
    return [(page, block) for page, block in found if "--8<--" not in block]


def keys_of(table: str) -> set[str]:
    return {field.alias or name for name, field in TABLES[table].model_fields.items()}


@pytest.mark.parametrize(("page", "block"), toml_blocks(), ids=lambda word: word.splitlines()[0])
def test_pieces_of_recipes_have_keys_that_exist(page: str, block: str) -> None:
    for table, values in tomllib.loads(block).items():
        assert set(values) <= keys_of(table), f"{page}: [{table}]"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_keys_of_recipes_that_pages_name_exist(page: Path) -> None:
    """As in ``[train] micro_batch``; what ``[method]`` has is another for each."""
    for table, key in re.findall(r"\[(\w+)\] (\w+)", page.read_text(encoding="utf-8")):
        if table in TABLES:
            assert key in {field.alias or name for name, field in TABLES[table].model_fields.items()}, (
                f"[{table}] {key}"
            )


def test_nothing_is_only_read_for_no_reason() -> None:
    texts = [command.text for command in commands()]
    assert not [words for words in ONLY_READ if not any(words in text for text in texts)]
