"""What must stop a run, and what must not be written when it does."""

from pathlib import Path

import pytest
import torch
from conftest import small_recipe

import sslkit
from sslkit.engine import run as run_module
from sslkit.engine.loop import NonFiniteLossError
from sslkit.errors import UserError
from sslkit.methods.base import Step


def test_a_loss_that_is_no_number_never_reaches_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}
    build = run_module.build_method

    def broken_at_step_3(recipe: object) -> torch.nn.Module:
        method = build(recipe)
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
    with pytest.raises(NonFiniteLossError, match="loss of step 2 is nan"):
        sslkit.train(small_recipe(), tmp_path / "run")
    after = list(seen["method"].parameters())
    assert all(torch.equal(a, b) for a, b in zip(seen["weights"], after, strict=True))
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("tables", "words"),
    [
        ({"train": {"batch_size": 4096}}, r"\[train\] batch_size: 4096 is more than the 2000 images"),
        ({"method": {"name": "moco_v2", "bn_groups": 3}}, r"\[train\] batch_size: 32 does not fall into 3 equal parts"),
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
