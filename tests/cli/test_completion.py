"""Completion after Tab: what each shell is offered, in a process that imports neither PyTorch nor pydantic."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sslkit.cli.completion import complete_method, complete_recipe
from sslkit.methods import all_methods
from sslkit.recipe.resolve import shipped_recipes

SLOW = ("torch", "pydantic", "numpy", "datasets", "timm", "accelerate", "huggingface_hub", "pyarrow")
LOCATIONS = {
    "bash": ".bash_completions/sslkit.sh",
    "zsh": ".zfunc/_sslkit",
    "fish": ".config/fish/completions/sslkit.fish",
}


def completed(folder: Path, shell: str, line: str) -> list[str]:
    """The lines that the shell's script gets for a command line whose last word is incomplete."""
    words = line.split(" ")
    asked = {"COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
    if shell != "bash":
        asked = {"_TYPER_COMPLETE_ARGS": line, "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    environment = {**os.environ, **asked, "_SSLKIT_COMPLETE": f"complete_{shell}", "COLUMNS": "60"}
    command = [sys.executable, "-X", "importtime", "-m", "sslkit"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment, check=True)
    assert " typer\n" in done.stderr
    assert not [name for name in SLOW if f" {name}\n" in done.stderr]
    return [line for line in done.stdout.splitlines() if line]


def test_names_are_those_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.toml").touch()
    assert complete_method("") == sorted(all_methods())
    assert complete_method("sw") == ["swav"]
    offered = dict(complete_recipe(""))
    assert set(offered) == {*shipped_recipes(), "mine.toml"}
    assert offered["mocov3_vits"] == "MoCo v3, ViT-S/16 with 12 heads, 300 epochs of ImageNet-1k"


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("sslkit pretrain mocov3_v", ["mocov3_vit_small_cpu", "mocov3_vitb", "mocov3_vitl", "mocov3_vits"]),
        ("sslkit pretrain m --method moco_v3 --method sw", ["swav"]),
        pytest.param("sslkit recipes show own", ["own.toml"], marks=pytest.mark.full),
        pytest.param("sslkit pretrain folder/o", [], marks=pytest.mark.full),  # bash completes files then
        pytest.param("sslkit report fol", [], marks=pytest.mark.full),
        pytest.param("sslkit eval kn", ["knn"], marks=pytest.mark.full),
        pytest.param("sslkit pretrain --ho", ["--hours"], marks=pytest.mark.full),
    ],
)
def test_bash_is_offered(tmp_path: Path, line: str, offered: list[str]) -> None:
    (tmp_path / "own.toml").touch()
    assert completed(tmp_path, "bash", line) == offered


def test_zsh_and_fish_get_descriptions_of_one_line(tmp_path: Path) -> None:
    lines = completed(tmp_path, "fish", "sslkit pretrain ")
    assert [line.partition("\t")[0] for line in lines] == list(shipped_recipes())
    assert "quickstart\tQuickstart: MoCo v2 on the bundled Fashion-MNIST subset" in lines
    offered = completed(tmp_path, "zsh", "sslkit pretrain quickstart_")
    assert "\n".join(offered).startswith('_arguments \'*: :(("quickstart_long":')
    assert completed(tmp_path, "zsh", "sslkit pretrain folder/o") == ["_files"]


@pytest.mark.parametrize("shell", ["bash", pytest.param("zsh", marks=pytest.mark.full), "fish"])
def test_it_is_installed_and_works(tmp_path: Path, shell: str) -> None:
    home = {**os.environ, "HOME": str(tmp_path), "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    command = [sys.executable, "-m", "sslkit", "--install-completion", shell]
    done = subprocess.run(command, capture_output=True, text=True, env=home, check=True)
    file = tmp_path / LOCATIONS[shell]
    assert f"{shell} completion installed in {file}" in done.stdout
    assert f"_SSLKIT_COMPLETE=complete_{shell}" in file.read_text(encoding="utf-8")
    if shell != "bash" or (bash := shutil.which("bash")) is None:
        return
    program = tmp_path / "sslkit"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m sslkit "$@"\n', encoding="utf-8")
    program.chmod(0o755)
    script = "source ~/.bashrc; COMP_WORDS=(sslkit pretrain quickst) COMP_CWORD=2; _sslkit_completion sslkit"
    script += '; complete -p sslkit; printf "%s\\n" "${COMPREPLY[@]}"'
    path = {**home, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([bash, "--norc", "-c", script], capture_output=True, text=True, env=path, check=True)
    assert done.stdout.splitlines() == [
        "complete -o default -F _sslkit_completion sslkit",
        "quickstart",
        "quickstart_long",
    ]
