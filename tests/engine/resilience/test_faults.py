"""What must stop a run, and what must not be written when it does."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import small_recipe

import sslkit
from sslkit.engine import setup as run_module
from sslkit.engine.resilience.guard import BadStepError
from sslkit.engine.step import shuffle_order
from sslkit.errors import UserError
from sslkit.files.jsonl_reader import read_lines
from sslkit.methods.base import Step
from sslkit.random_draws import DrawPurpose, draw_seed


def test_a_loss_that_is_no_number_never_reaches_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}
    build = run_module.build_method

    def broken_at_step_3(*arguments: object) -> torch.nn.Module:
        method = build(*arguments)
        objective = method.objective

        def poisoned(*args: object) -> Step:
            seen["calls"] = seen.get("calls", 0) + 1
            result = objective(*args)
            if seen["calls"] == 3:
                seen["weights"] = [param.detach().clone() for param in method.parameters()]
                result.loss = result.loss * float("nan")
            return result

        method.objective = poisoned
        seen["method"] = method
        return method

    monkeypatch.setattr(run_module, "build_method", broken_at_step_3)
    with pytest.raises(BadStepError, match="step 2: the loss is nan"):
        sslkit.train(small_recipe(), tmp_path / "run")
    after = list(seen["method"].parameters())
    assert all(torch.equal(a, b) for a, b in zip(seen["weights"], after, strict=True))
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_gradient_that_is_no_number_never_reaches_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = {}
    build = run_module.build_method

    def broken(*arguments: object) -> torch.nn.Module:
        seen["method"] = method = build(*arguments)
        next(param for param in method.parameters() if param.requires_grad).register_hook(lambda grad: grad * torch.nan)
        seen["weights"] = [param.detach().clone() for param in method.parameters()]
        return method

    monkeypatch.setattr(run_module, "build_method", broken)
    with pytest.raises(BadStepError, match="step 0: the gradient norm is nan"):
        sslkit.train(small_recipe(), tmp_path / "run")
    after = list(seen["method"].parameters())
    assert all(torch.equal(a, b) for a, b in zip(seen["weights"], after, strict=True))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_replaced_listed_and_counted(workers: int, class_folders: Path, tmp_path: Path) -> None:
    images = shutil.copytree(class_folders, tmp_path / "images [1]")
    bad = next(images.rglob("*5.png"))
    bad.write_bytes(bad.read_bytes()[:60])
    data = {"path": str(images), "split": "train", "workers": workers}
    train = {"max_steps": 0, "epochs": 2, "batch_size": 20}
    sslkit.train(small_recipe(data=data | {"max_bad_share": 0.05}, train=train), tmp_path / "run")
    [line] = read_lines(tmp_path / "run/bad_samples.jsonl")
    assert line["name"].endswith(bad.name)
    assert line["epoch"] == 0
    with pytest.raises(
        UserError, match=r"1 of the .* images of .* cannot be read, more than \[data\] max_bad_share = 0"
    ) as caught:
        sslkit.train(small_recipe(data=data | {"max_bad_share": 0.0}, train=train), tmp_path / "strict")
    assert bad.name in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_draws_for_different_purposes_never_share_a_stream() -> None:
    recipe = small_recipe("moco_v2", "test_resnet", train={"batch_size": 8})
    crop = np.random.default_rng([0, 0, 1, 5, 0]).permutation(8)
    assert shuffle_order(recipe, 5).tolist() != crop.tolist()
    keys = {draw_seed(0, purpose, step, 0, 0) for purpose in DrawPurpose for step in range(50)}
    assert len(keys) == 50 * len(DrawPurpose)


@pytest.mark.parametrize(
    ("tables", "words"),
    [
        ({"train": {"batch_size": 4096}}, r"\[train\] batch_size: 4096 is more than the 2000 images"),
        (
            {"method": {"name": "moco_v2", "bn_groups": 3}},
            r"\[train\] batch_size: 32 does not split into 3 equal parts",
        ),
        ({"data": {"path": "/no/such/photos"}}, r"\[data\] path"),
        (
            {"backbone": {"name": "vit_tiny_patch16_224", "img_size": 48}},
            r"\[views\] size: .* cannot take images of 32 x 32",
        ),
        ({"train": {"processes": 2}}, "2 processes were asked for and 1 started"),
    ],
)
def test_bad_input_leaves_nothing_behind(tables: dict[str, dict[str, object]], words: str, tmp_path: Path) -> None:
    name = str(tables.get("method", {}).get("name", "moco_v3"))
    model = "test_resnet" if name == "moco_v2" else "test_vit"
    with pytest.raises(UserError, match=words):
        sslkit.train(small_recipe(name, model, **tables), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_output_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="--output"):
        sslkit.train(small_recipe(), tmp_path / "file" / "run")
