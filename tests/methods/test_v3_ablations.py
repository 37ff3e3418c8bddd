"""MoCo v3's ablations are options: each builds, takes a step, and is what it says."""

from typing import Any

import pytest
import torch
from conftest import small_recipe
from torch import nn

from sslkit.engine.optim import make_optimizer
from sslkit.engine.setup import build_method
from sslkit.methods import BatchInfo, Method, Progress

NO_TOKEN = {"class_token": False, "global_pool": "avg"}


def step(tables: dict[str, dict[str, Any]]) -> tuple[Method, dict[str, torch.Tensor]]:
    recipe = small_recipe("moco_v3", "test_vit", **tables)
    torch.manual_seed(0)
    method = build_method(recipe)
    before = {name: param.detach().clone() for name, param in method.named_parameters()}
    optimizer = make_optimizer(recipe, method)
    torch.manual_seed(1)
    result = method([torch.randn(8, 3, 32, 32) for _ in range(2)], BatchInfo(torch.arange(8)), Progress(0, 1))
    result.loss.backward()
    optimizer.step()
    method.after_update(Progress(1, 10))
    return method, before


def test_without_predictor() -> None:
    method, before = step({"method": {"predictor": False}})
    assert not any(name.startswith("predictor") for name in before)
    x = torch.randn(4, 16)
    assert torch.equal(method.predictor(x), x)


def test_without_norm_in_the_heads() -> None:
    method, _ = step({"method": {"head_norm": False}})
    kinds = [type(layer) for layer in method.modules()]
    assert nn.BatchNorm1d not in kinds
    assert len([layer for layer in method.projector if isinstance(layer, nn.Linear)]) == 3


@pytest.mark.parametrize("momentum", [0.0, 0.9, 0.99, 0.999])
def test_constant_momentum(momentum: float) -> None:
    method, before = step({"method": {"momentum": momentum, "momentum_schedule": "constant"}})
    student, teacher = (
        dict(method.named_parameters())[name] for name in ("projector.0.weight", "teacher_projector.module.0.weight")
    )
    expected = momentum * before["projector.0.weight"] + (1 - momentum) * student
    torch.testing.assert_close(teacher, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("kind", "trained"), [("timm", True), ("sincos2d", False)])
def test_position_embeddings(kind: str, trained: bool) -> None:
    method, before = step({"backbone": {"pos_embed": kind}})
    assert torch.equal(method.backbone.pos_embed, before["backbone.pos_embed"]) != trained


def test_without_position_embedding_patches_may_change_places() -> None:
    images = torch.randn(2, 3, 32, 32)
    swapped = images.roll(16, dims=3)  # patches are 16 pixels wide: two columns change places
    for kind, blind in (("none", True), ("sincos2d", False)):
        backbone = build_method(small_recipe("moco_v3", "test_vit", backbone={"pos_embed": kind})).backbone.eval()
        assert torch.allclose(backbone(images), backbone(swapped), atol=1e-5) == blind


def test_trained_patch_projection() -> None:
    for frozen in (True, False):
        method, before = step({"backbone": {"freeze_patch_embed": frozen}})
        same = torch.equal(method.backbone.patch_embed.proj.weight, before["backbone.patch_embed.proj.weight"])
        assert same == frozen


@pytest.mark.parametrize("args", [NO_TOKEN, {**NO_TOKEN, "fc_norm": False, "final_norm": False}])
def test_without_class_token(args: dict[str, Any]) -> None:
    method, _ = step({"backbone": {"args": args}})
    assert method.backbone.cls_token is None
    norms = [isinstance(getattr(method.backbone, name), nn.LayerNorm) for name in ("norm", "fc_norm")]
    assert any(norms) == ("final_norm" not in args)
