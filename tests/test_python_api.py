"""From Python: a recipe by name, path or tables, overrides as a dict, and plans; as on the command line."""

import tomllib
from pathlib import Path
from typing import Any

import pytest
from conftest import run, small_recipe

import sslkit
from sslkit.plan import make_plan as planning

SMALL: dict[str, Any] = {"train": {"max_steps": 1, "batch_size": 32}, "method.queue_size": 64}
SMALL |= {"data": {"split": "test", "workers": 0}, "monitor.every_epochs": 0}


def tables_of(folder: Path) -> dict[str, Any]:
    return tomllib.loads((folder / "recipe.toml").read_text(encoding="utf-8"))


def test_names_are_listed_before_they_are_imported() -> None:
    assert set(sslkit.__all__) <= set(dir(sslkit))
    for name in sslkit.__all__:
        assert getattr(sslkit, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        sslkit.trian  # noqa: B018


def test_a_name_and_a_dict_do_what_the_command_does(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = sslkit.train("quickstart", SMALL)
    assert (done.folder, done.step, done.stopped) == (Path("runs/quickstart"), 1, "")
    from_python = capsys.readouterr().out
    words = ["train.max_steps=1", "train.batch_size=32", "data.split=test"]
    words += ["data.workers=0", "monitor.every_epochs=0", "method.queue_size=64"]
    options = [part for word in words for part in ("--set", word)]
    code, out, _ = run(capsys, "pretrain", "quickstart", *options, "--output", "other")
    assert code == 0
    assert tables_of(done.folder) == tables_of(Path("other"))
    advice = [line for line in out.splitlines() if "WARNING" in line]
    assert advice
    assert [line for line in from_python.splitlines() if "WARNING" in line] == advice
    assert sslkit.train("quickstart", SMALL, resume="auto").step == 1  # it is done
    with pytest.raises(sslkit.UserError, match="runs/quickstart"):
        sslkit.train("quickstart", SMALL, resume="never")


def test_a_path_and_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = small_recipe("moco_v2", "test_resnet", train={"max_steps": 1})
    Path("mine.toml").write_text(recipe.to_toml(), encoding="utf-8")
    assert sslkit.train("mine.toml").folder == Path("runs/mine")
    assert sslkit.train(recipe.as_tables()).folder == Path("runs/moco_v2_test_resnet")
    assert sslkit.train(Path("mine.toml"), ["train.seed=3"], "seeded").folder == Path("seeded")
    assert tables_of(Path("seeded"))["train"]["seed"] == 3
    assert sslkit.train(recipe, tmp_path / "resolved", "auto").step == 1
    with pytest.raises(sslkit.UserError, match="resolved"):
        sslkit.train(recipe, "resolved", "never")


def test_a_plan_is_printed_and_trained(
    class_folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(planning, "MEASURED_SECONDS", 0.2)
    stated = {"backbone.name": "test_resnet", "data.workers": 0, "train": {"epochs": 1}}
    plan = sslkit.plan_run(class_folders, hours=0.01, overrides=stated)
    assert "measuring a step" in capsys.readouterr().err
    assert "stated: backbone.name, data.path, data.workers, train.epochs" in str(plan)
    assert str(plan).splitlines()[0].startswith("images: 40, grey")
    assert sslkit.train(plan.recipe, tmp_path / "run").step == 1


def mistakes() -> list[tuple[Any, str]]:
    recipe: Any = small_recipe()
    train: Any = sslkit.train
    return [
        (
            lambda: train(recipe),
            'output: missing; give the run folder, for example sslkit.train(recipe, "runs/photos")',
        ),
        (lambda: train(recipe, {"train.epochs": 2}), "a Recipe has all its values; override them where it is made"),
        (lambda: train("quickstart", "runs/x"), "must be a dict, for example {\"train.epochs\": 10}, not 'runs/x'"),
        (lambda: train("quickstart", {"train.epocs": 2}), "quickstart [train] epocs: unknown key"),
        (
            lambda: train("quickstrat"),
            "quickstrat: no such file, and no recipe of that name; did you mean 'quickstart'",
        ),
        (lambda: train({"data.path": "photos"}), "recipe [method] name: missing"),
        (lambda: sslkit.plan_run("nowhere"), "nowhere"),
        (lambda: sslkit.plan_run("photos", hours=0), "hours: must be between 0.01 and 10000, for example 0.5, not 0"),
        (lambda: sslkit.plan_run("photos", hours=float("nan")), "hours: must be between 0.01 and 10000"),
        (lambda: sslkit.plan_run("photos", overrides={"epochs": 3}), "overrides 'epochs': write table.key"),
    ]


def test_mistakes_are_named_and_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for call, sentence in mistakes():
        with pytest.raises(sslkit.UserError) as caught:
            call()
        assert sentence in str(caught.value)
    assert not list(tmp_path.iterdir())
