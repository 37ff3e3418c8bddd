"""LARS by its golden numbers, rates and groups by the recipes."""

import pytest
import torch
from conftest import small_recipe
from torch import nn

from sslkit.engine.optim import (
    learning_rate,
    make_optimizer,
    set_learning_rate,
    set_weight_decay,
    supports_found_inf,
    weight_decay,
)
from sslkit.engine.setup import build_method
from sslkit.methods import Multipliers, Progress
from sslkit.methods.simclr import SimCLR
from sslkit.parts.layerwise_optimizers import Lars
from sslkit.recipe.resolve import build_recipe


def test_lars_golden_numbers() -> None:
    index = torch.arange(12, dtype=torch.float64).view(3, 4)
    matrix = nn.Parameter(torch.sin(0.5 * index + 0.2))
    vector = nn.Parameter(torch.cos(0.5 * index[0] + 0.2))
    optimizer = Lars([matrix, vector], lr=0.6, weight_decay=1e-2, momentum=0.9)
    for step in (1, 2):
        matrix.grad = torch.cos(0.3 * index + 0.1 * step)
        vector.grad = torch.sin(0.3 * index[0] + 0.1 * step)
        optimizer.step()
    assert matrix[0].tolist() == pytest.approx([0.1970112284, 0.6426922555, 0.9307842620, 0.9907951069], abs=1e-10)
    assert matrix.sum().item() == pytest.approx(0.1109245765, abs=5e-10)
    assert vector.tolist() == pytest.approx([0.7470548844, 0.0332499539, -0.8024640635, -1.6228458330], abs=1e-10)


def test_first_lars_step_has_the_trust_length_and_spares_vectors() -> None:
    torch.manual_seed(0)
    matrix, vector = nn.Parameter(torch.randn(5, 7)), nn.Parameter(torch.randn(7))
    before, bias = matrix.detach().clone(), vector.detach().clone()
    matrix.grad, vector.grad = torch.randn(5, 7), torch.randn(7)
    Lars([matrix, vector], lr=0.5, weight_decay=0.1).step()
    assert (matrix.detach() - before).norm().item() == pytest.approx(0.5 * 0.001 * before.norm().item(), rel=1e-5)
    torch.testing.assert_close(vector.detach(), bias - 0.5 * vector.grad)


def test_lars_with_a_zero_norm_is_plain() -> None:
    matrix = nn.Parameter(torch.zeros(2, 2))
    matrix.grad = torch.ones(2, 2)
    Lars([matrix], lr=0.5, weight_decay=0.1).step()
    torch.testing.assert_close(matrix.detach(), torch.full((2, 2), -0.5))


@pytest.mark.parametrize("name", ["sgd", "lars", "lars_simclr", "larc", "adamw", "lamb"])
def test_optimizer_holds_no_teacher(name: str) -> None:
    recipe = small_recipe("moco_v3", "test_vit", optim={"name": name, "lr": 0.1, "weight_decay": 0.5})
    method = build_method(recipe)
    optimizer = make_optimizer(recipe, method)
    held = {id(param) for group in optimizer.param_groups for param in group["params"]}
    teacher = [*method.teacher_backbone.parameters(), *method.teacher_projector.parameters()]
    assert not held & {id(param) for param in teacher}
    assert held == {id(param) for param in method.parameters() if param.requires_grad}
    before = [param.clone() for param in teacher]
    for param in method.parameters():
        if param.requires_grad:
            param.grad = torch.ones_like(param)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, teacher, strict=True))


@pytest.mark.parametrize("name", ["sgd", "lars", "lars_simclr", "larc", "adamw"])
def test_an_update_that_the_device_skips_changes_no_bit(name: str) -> None:
    """Weights and the optimizer's state, step counts included."""
    recipe = small_recipe("moco_v3", "test_vit", optim={"name": name, "lr": 0.1, "weight_decay": 0.5})
    methods = [build_method(recipe) for _ in range(2)]
    methods[1].load_state_dict(methods[0].state_dict())
    skipping, plain = (make_optimizer(recipe, method) for method in methods)
    assert supports_found_inf(skipping)
    for step, value in enumerate([0.01, float("nan"), -0.02]):
        for method in methods:
            for param in (each for each in method.parameters() if each.requires_grad):
                param.grad = torch.full_like(param, value)
        skipping.found_inf = torch.tensor(float(step == 1))
        skipping.grad_scale = None
        skipping.step()
        if step != 1:
            plain.step()
    for mine, theirs in zip(methods[0].parameters(), methods[1].parameters(), strict=True):
        assert torch.equal(mine, theirs)
        assert skipping.state.get(mine, {}).keys() == plain.state.get(theirs, {}).keys()
        for slot, value in skipping.state.get(mine, {}).items():
            assert torch.equal(value, plain.state[theirs][slot]), slot


def test_lamb_knows_no_found_inf() -> None:
    recipe = small_recipe("moco_v3", "test_vit", optim={"name": "lamb", "lr": 0.1, "weight_decay": 0.5})
    assert not supports_found_inf(make_optimizer(recipe, build_method(recipe)))


def test_sgd_is_without_nesterov_and_matches_the_formula() -> None:
    recipe = small_recipe("moco_v2", "test_resnet")
    optimizer = make_optimizer(recipe, build_method(recipe))
    assert not optimizer.param_groups[0]["nesterov"]
    assert optimizer.param_groups[0]["momentum"] == 0.9


def test_excluding_vectors_from_decay() -> None:
    method = build_method(small_recipe("moco_v3", "test_vit", optim={"exclude_from_decay": "norm_and_bias"}))
    decayed, spared = make_optimizer(
        small_recipe("moco_v3", "test_vit", optim={"exclude_from_decay": "norm_and_bias"}), method
    ).param_groups
    assert min(param.ndim for param in decayed["params"]) > 1
    assert max(param.ndim for param in spared["params"]) <= 1
    assert spared["weight_decay"] == 0


def test_v3_rate_moves_within_an_epoch_and_v2_rate_does_not() -> None:
    v3 = build_recipe(
        {"method": {"name": "moco_v3"}, "backbone": {"name": "resnet50"}, "data": {"path": "x"}}, name="v3"
    )
    assert v3.peak_lr == pytest.approx(9.6)
    assert learning_rate(v3, 0, 100) == 0
    assert learning_rate(v3, 50, 100) == pytest.approx(0.48)
    v2 = build_recipe(
        {"method": {"name": "moco_v2"}, "backbone": {"name": "resnet50"}, "data": {"path": "x"}}, name="v2"
    )
    rates = [learning_rate(v2, step, 7) for step in range(14)]
    assert len(set(rates[:7])) == len(set(rates[7:])) == 1
    assert rates[7] == pytest.approx(0.0299981495, abs=5e-11)


def test_warm_up_moves_with_the_step_even_where_the_decay_moves_per_epoch() -> None:
    tables = {"method": {"name": "moco_v2"}, "backbone": {"name": "resnet50"}, "data": {"path": "x"}}
    recipe = build_recipe({**tables, "schedule": {"warmup_epochs": 1.5}}, name="v2")
    rates = [learning_rate(recipe, step, 10) for step in range(31)]
    assert rates[:16] == pytest.approx([recipe.peak_lr * step / 15 for step in range(16)])
    assert len(set(rates[15:20])) == len(set(rates[20:30])) == 1
    assert rates[20] < rates[15] == recipe.peak_lr


def test_weight_decay_follows_half_a_cosine_to_its_end() -> None:
    recipe = small_recipe("moco_v3", "test_vit", optim={"weight_decay": 0.04}, schedule={"weight_decay_end": 0.4})
    decays = [weight_decay(recipe, Progress(step, 100)) for step in (0, 50, 100)]
    assert decays == pytest.approx([0.04, 0.22, 0.4])
    constant = small_recipe("moco_v3", "test_vit", optim={"weight_decay": 0.04})
    assert weight_decay(constant, Progress(70, 100)) == 0.04


class _LayerwiseRates(SimCLR):
    def param_groups(self) -> dict[str, Multipliers]:
        return {"backbone": Multipliers(lr=0.5), "backbone.conv1.0": Multipliers(lr=0.1, weight_decay=0.0)}


def test_multipliers_apply_to_the_parameters_of_the_innermost_module() -> None:
    recipe = small_recipe("simclr", "test_resnet", optim={"exclude_from_decay": "norm_and_bias"})
    built = build_method(recipe)
    method = _LayerwiseRates(built.backbone, 128, recipe.method)
    optimizer = make_optimizer(recipe, method)
    set_learning_rate(optimizer, 1.0)
    set_weight_decay(optimizer, 1.0)
    rates = {
        param: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for param in group["params"]
    }
    found = {name: rates[param] for name, param in method.named_parameters() if param.requires_grad}
    assert found["backbone.conv1.0.weight"] == (0.1, 0.0)
    assert found["backbone.bn1.weight"] == (0.5, 0.0)
    assert found["backbone.layer1.0.conv1.weight"] == (0.5, 1.0)
    assert found["projector.0.weight"] == (1.0, 1.0)
