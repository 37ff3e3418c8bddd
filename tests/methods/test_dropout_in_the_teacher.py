"""Stochastic depth and dropout are the student's alone: a teacher gives one view one key."""

import pytest
import torch
from conftest import small_recipe

from sslkit.engine.setup import build_method
from sslkit.methods import METHODS, Method

NOISE = {"drop_path_rate": 0.5, "drop_rate": 0.5}
MODELS = {
    "test_vit": {**NOISE, "proj_drop_rate": 0.3, "attn_drop_rate": 0.3, "pos_drop_rate": 0.3},
    "resnet10t": {**NOISE, "drop_block_rate": 0.5},
    "test_convnext": NOISE,
}
WITH_TEACHER = ["moco_v1", "moco_v2", "moco_v3", "byol"]


def build(name: str, model: str, args: dict[str, float]) -> Method:
    torch.manual_seed(0)
    return build_method(small_recipe(name, model, backbone={"args": args}), num_samples=8).train()


def two_passes(method: Method, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    views = [torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(view)) for view in range(2)]
    with torch.no_grad():
        first, second = (torch.cat(getattr(method, name)(views)) for _ in range(2))
    return first, second


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", WITH_TEACHER)
def test_two_passes_of_the_teacher_are_equal_and_of_the_student_are_not(name: str, model: str) -> None:
    method = build(name, model, MODELS[model])
    assert torch.equal(*two_passes(method, "teacher"))
    assert not torch.equal(*two_passes(method, "student"))


def test_every_method_with_a_teacher_is_tested() -> None:
    built = {name: build(name, "test_vit", {}) for name in METHODS}
    assert [name for name, method in built.items() if hasattr(method, "teacher_backbone")] == WITH_TEACHER


@pytest.mark.parametrize("name", WITH_TEACHER)
def test_batch_norm_of_the_teacher_still_trains(name: str) -> None:
    """Its keys are normalised by the batch: another companion changes them; and its own statistics move."""
    method = build(name, "resnet10t", MODELS["resnet10t"])
    views = [torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(view)) for view in range(2)]
    before = method.teacher_backbone.module.bn1.running_mean.clone()
    alone = method.teacher(views)[0]
    changed = [view.clone() for view in views]
    for view in changed:
        view[7] = 5.0
    assert not torch.equal(alone[:7], method.teacher(changed)[0][:7])
    assert not torch.equal(before, method.teacher_backbone.module.bn1.running_mean)
    method.eval()
    assert not any(layer.training for layer in method.teacher_backbone.modules())


@pytest.mark.parametrize("name", WITH_TEACHER)
def test_a_method_without_dropout_computes_what_it_did(name: str) -> None:
    """Eval mode of all but BatchNorm changes no bit where nothing is dropped."""
    for model in ("test_vit", "resnet10t"):
        method = build(name, model, {})
        views = [torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(view)) for view in range(2)]
        ours = torch.cat(method.teacher(views))
        for layer in method.teacher_backbone.modules():
            layer.training = True
        assert torch.equal(ours, torch.cat(method.teacher(views)))
