"""What is watched while training."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from accelerate import Accelerator
from conftest import small_recipe
from torch import nn

import sslkit
from sslkit.engine.monitors import layer_gradients
from sslkit.engine.run import make_monitor
from sslkit.errors import UserError


def test_layers_are_named_in_order_and_their_norms_add_up() -> None:
    torch.manual_seed(0)
    net = nn.ModuleDict({"stem": nn.Linear(4, 4), "blocks": nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])})
    net["blocks"][1].requires_grad_(False)
    x = net["blocks"][1](net["blocks"][0](net["stem"](torch.randn(3, 4))))
    x.square().sum().backward()
    found = layer_gradients(net)
    assert list(found) == ["gradient/stem", "gradient/blocks.0"]
    total = torch.nn.utils.get_total_norm([param.grad for param in net.parameters() if param.grad is not None])
    assert sum(norm**2 for norm in found.values()) == pytest.approx(total.item() ** 2, rel=1e-5)


def test_parameters_of_no_layer_come_last() -> None:
    """The first name is the first layer: a ViT's patch projection, not its class token."""
    net = timm.create_model("test_vit", num_classes=0, img_size=32)
    net(torch.randn(2, 3, 32, 32)).sum().backward()
    found = list(layer_gradients(net))
    assert found[:2] == ["gradient/patch_embed", "gradient/blocks.0"]
    assert set(found[-2:]) == {"gradient/cls_token", "gradient/pos_embed"}


def test_a_run_logs_them_only_if_asked(tmp_path: Path) -> None:
    for asked in (True, False):
        recipe = small_recipe("moco_v3", "test_vit", monitor={"layer_gradients": asked}, train={"max_steps": 2})
        run = sslkit.train(recipe, tmp_path / str(asked))
        layers = [key for key in run.metrics()[0] if key.startswith("gradient/")]
        assert ("gradient/blocks.0" in layers) == asked
        assert "gradient/patch_embed" not in layers  # frozen


def test_more_neighbours_than_the_bank_has_are_refused_before_anything_is_written(
    class_folders: Path, tmp_path: Path
) -> None:
    """Forty images, of which a fifth is held out; the advice works."""
    monitor: dict[str, Any] = {"every_epochs": 1, "data": str(class_folders)}
    for k, max_train, most in ((33, 0, 32), (20, 10, 10)):
        with pytest.raises(UserError, match=rf"\[monitor\] k: {k} .* the {most} images .* set k = {most} or less"):
            sslkit.train(small_recipe(monitor={**monitor, "k": k, "max_train": max_train}), tmp_path / "run")
        assert not (tmp_path / "run").exists()
    recipe = small_recipe(monitor={**monitor, "k": most, "max_train": max_train}, train={"max_steps": 1})
    assert sslkit.train(recipe, tmp_path / "run").results()[0]["protocol"]["k"] == most


def test_features_that_are_not_numbers_have_no_score_and_end_no_run(class_folders: Path) -> None:
    recipe = small_recipe(monitor={"every_epochs": 1, "data": str(class_folders), "k": 3})
    monitor = make_monitor(recipe, Accelerator())
    assert monitor is not None
    backbone = timm.create_model("test_resnet", num_classes=0)
    assert isinstance(monitor(backbone), float)
    backbone.conv1[0].weight.data[0, 0, 0, 0] = float("nan")
    assert monitor(backbone) is None
