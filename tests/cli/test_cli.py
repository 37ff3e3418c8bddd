"""The command line as a stranger types it: what it prints, its exit codes, and one sentence for every mistake."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from conftest import run, small_recipe

import sslkit
from sslkit.cli import app


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "run"
    sslkit.train(small_recipe("moco_v2", "test_resnet", train={"max_steps": 4}), folder)
    return folder


def test_pretrain_from_words_alone(capsys: pytest.CaptureFixture[str], class_folders: Path, tmp_path: Path) -> None:
    words = ["--method", "moco_v2", "--backbone", "test_resnet", "--data", str(class_folders)]
    small = ["--set", "train.batch_size=16", "--set", "views.size=32", "--set", "train.max_steps=2"]
    fewer = ["--set", "method.queue_size=64", "--set", "data.workers=0", "--output", str(tmp_path / "run")]
    code, out, _ = run(capsys, "pretrain", *words, *small, *fewer)
    assert code == 0
    assert "learning rate: base 0.001, not scaled with batch size" in out
    assert (tmp_path / "run" / "encoder" / "model.safetensors").is_file()


@pytest.mark.full
def test_knn_and_linear_print_baselines(
    capsys: pytest.CaptureFixture[str], trained: Path, class_folders: Path, tmp_path: Path
) -> None:
    for protocol in ("knn", "linear"):
        extra = ["--k", "3"] if protocol == "knn" else []
        code, out, _ = run(capsys, "eval", protocol, str(trained), "--data", str(class_folders), "--json", *extra)
        assert code == 0
        result = json.loads(out)
        assert [score["encoder"] for score in result["scores"]] == [str(trained), "random init", "raw pixels"]
        assert all(0 <= score["accuracy"] <= 1 for score in result["scores"])
        assert "40 images, 8 of them held out" in result["data"]
    rows = sslkit.Run(trained, 4).results()
    assert [row["evaluation"] for row in rows] == ["knn k=3 temperature=0.07", "linear logistic"]
    code, out, _ = run(
        capsys, "eval", "linear", str(trained), "--data", str(class_folders), "--protocol", "moco_v3", "--epochs", "2"
    )
    assert code == 0
    assert "raw pixels" in out
    code, out, _ = run(capsys, "eval", "knn", str(trained), "--data", str(class_folders), "--k", "3", "--layer", "1")
    assert code == 0


def test_finetune_says_what_it_does_and_judges(
    capsys: pytest.CaptureFixture[str], trained: Path, class_folders: Path
) -> None:
    words = ["--data", str(class_folders), "--labels", "1-shot", "--protocol", "swav", "--epochs", "1"]
    code, out, err = run(capsys, "eval", "finetune", str(trained), *words, "--head-layers", "1")
    assert code == 0
    assert "finetune swav, 1 epochs, 1-shot of the labels" in " ".join(out.split())
    assert "from scratch" in out
    assert "epoch 1/1: loss" in err
    code, _, err = run(capsys, "eval", "finetune", str(trained), "--data", str(class_folders), "--labels", "a few")
    assert code == 2
    assert "--labels a few: no such file; write 10%, 5-shot, all, or a text file" in err


@pytest.mark.full
def test_export_report_and_lists(capsys: pytest.CaptureFixture[str], trained: Path, tmp_path: Path) -> None:
    code, out, _ = run(capsys, "export", str(trained), str(tmp_path / "out"))
    assert code == 0
    assert "equal bit for bit" in out
    assert "local-dir:" in out
    code, out, _ = run(capsys, "report", str(trained))
    assert code == 0
    assert (trained / "pictures" / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert (trained / "pictures" / "views.png").is_file()
    assert "moco_v3" in run(capsys, "methods")[1]
    assert "mocov3_vitb" in run(capsys, "recipes")[1]
    code, out, _ = run(capsys, "recipes", "show", "mocov3_vits")
    assert "num_heads = 12" in out
    assert out.startswith("# MoCo v3, ViT-S/16")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["pretrain", "mocov3_vitx"], "mocov3_vitx: no such file, and no recipe of that name; did you mean"),
        (["pretrain", "quickstart", "--set", "train.epocs=3"], "[train] epocs: unknown key; did you mean 'epochs'?"),
        (["pretrain", "quickstart", "--backbone", "resnet19"], "timm has no model 'resnet19'; did you mean"),
        (["pretrain", "--method", "moco_v2"], "missing: --data"),
        (["pretrain", "quickstart", "--epochs", "5"], "write --set train.epochs=VALUE"),
        (["pretrain", "quickstart", "train.epochs=5"], "write --set train.epochs=5"),
        (["pretrain", "."], ".: is a folder, not a recipe; to train on images in it, add --data ."),
        (["pretrain", "quickstart", "--method", "MoCo v22"], "did you mean 'moco_v2'?"),
        (
            ["pretrain", "quickstart", "--set", "optim.lr=0,03"],
            "[optim] lr: must be a number, such as 0.03, not '0,03'",
        ),
        (["pretrain", "quickstart", "--set", "train.lr=1"], "it is a key of [optim]; [train] has epochs, max_steps,"),
        (
            ["pretrain", "quickstart", "--set", "model.name=x"],
            "[model]: unknown table; the tables are method, backbone",
        ),
        (["pretrain", "quickstart", "--set", "epochs=3"], "write table.key=value, for example train.epochs=3"),
        (["pretrain", "quickstart", "--set", "views.crop_scale=0.2"], "must be a list, such as [0.2, 1.0]"),
        (["pretrain", "quickstart", "--set", "train.micro_batch=48"], "batch_size = 128; take 32 or 64"),
        (["pretrain", "quickstart", "--set", "train.epochs=2.5"], "[train] epochs: must be a whole number"),
        (
            ["pretrain", "quickstart", "--set", "train.compile=ja"],
            "compile: must be true, false or \"blocks\", not 'ja'",
        ),
        (["pretrain", "quickstart", "--set", "optim.lr=-1"], "[optim] lr: must be 0 or more, not -1"),
        (["pretrain", "quickstart", "--set", "schedule.warmup_epochs=50"], "set warmup_epochs = 0.5"),
        (["eval", "knn", "/no/run", "--data", "builtin:fashion_mnist"], "/no/run: is not a run folder"),
        (["eval", "knn", "resnet18", "--data", "/no/data"], "[data] path"),
        (["eval", "knn", "resnet18"], "Missing option '--data'"),
        (["eval", "knn", "x", "--data", "y", "--k", "many"], "--k many: must be a number, or several"),
        (["eval", "knn", "x", "--data", ""], "--data: is empty; give a folder"),
        (["eval", "knn", "x", "--data", "y", "--temperature", "nan"], "temperature must be a positive number"),
        (["pretrain", "quickstart", "--set", "data.path.x=1"], "--set data.path.x=1: path is not a table"),
        (["pretrain", "quickstart", "--set", "backbone.name=resnet18.bogus"], "timm has no weights 'resnet18.bogus'"),
        (["pretrain", "quickstart", "--set", "backbone.args.num_classes=10"], "'num_classes' is sslkit's to set"),
        (["pretrain", "quickstart", "--set", "train.epochs=true"], "[train] epochs"),
        (["pretrain", "quickstart", "--set", "optim.betas=[-1,2]"], "[optim] betas"),
        (["pretrain", "quickstart", "--set", "train.precision=fp16"], "'fp16' needs a GPU"),
        (["export", "/no/run", "/tmp/x"], "/no/run: not a run folder with an encoder"),
        (["report", "/no/run"], "/no/run: not a run folder"),
        (["pretend"], "No such command 'pretend'"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    words: list[str],
    sentence: str,
) -> None:
    monkeypatch.chdir(tmp_path)  # where no run of an earlier quickstart lies
    code, _, err = run(capsys, *words)
    assert code == 2
    assert err.startswith("sslkit: ")
    assert sentence in err
    assert "Traceback" not in err


@pytest.mark.parametrize("module", ["sslkit", "sslkit.pretrain"])
def test_module_doors_answer_help(module: str) -> None:
    command = [sys.executable, "-X", "importtime", "-m", module, "--help"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "Usage" in result.stdout
    assert " typer\n" in result.stderr
    slow = ("torch", "numpy", "datasets", "timm", "accelerate", "huggingface_hub", "pyarrow")
    assert not [name for name in slow if f" {name}\n" in result.stderr]
    assert module != "sslkit" or " pydantic\n" not in result.stderr


def commands(command: Any, name: str) -> Iterator[tuple[str, Any]]:
    yield name, command
    for child in getattr(command, "commands", {}).values():
        yield from commands(child, f"{name} {child.name}")


def test_help_of_every_command_has_an_example() -> None:
    found = dict(commands(typer.main.get_command(app), "sslkit"))
    assert len(found) == 27
    for name, command in found.items():
        assert (command.epilog or "").startswith(f"Example: {name}"), name
        assert (command.help or "").endswith("."), name


THREAD_THAT_ABORTS = """
import atexit, datetime, sys, threading, torch.distributed
from sslkit.cli import main

store = torch.distributed.HashStore()

def wait() -> None:
    while True:
        try:
            store.wait(["absent"], datetime.timedelta(milliseconds=10))
        except RuntimeError:
            pass

threading.Thread(target=wait, daemon=True).start()
atexit.register(print, "exit handlers have run")
sys.argv = ["sslkit", *sys.argv[1:]]
main()
"""


@pytest.mark.parametrize(("words", "code"), [(["methods"], 0), (["info", "absent.toml"], 2)])
def test_threads_of_libraries_do_not_change_the_exit_code(words: list[str], code: int) -> None:
    """A thread in C++ code that asks for the interpreter's lock at its end aborts the process: exit code 134."""
    done = subprocess.run([sys.executable, "-c", THREAD_THAT_ABORTS, *words], capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert done.stdout.endswith("exit handlers have run\n")
    assert len(done.stdout.splitlines() + done.stderr.splitlines()) > 1
