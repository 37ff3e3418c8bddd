"""One sweep over every method, and over many backbones, that a new method gets for free."""

import math

import pytest
import torch
from conftest import small_recipe

from sslkit.engine.optim import make_optimizer
from sslkit.engine.setup import build_method
from sslkit.engine.step import shuffle_order
from sslkit.errors import UserError
from sslkit.methods import METHODS, BatchInfo, Method, Progress, find_method

BACKBONES = [
    ("test_resnet", 32),
    ("resnet18", 32),
    ("resnet50", 32),
    ("test_vit", 32),
    ("vit_tiny_patch16_224", 32),
    ("test_convnext", 32),
    ("mobilenetv4_conv_small", 32),
    ("swin_tiny_patch4_window7_224", 32),
]


def one_batch(size: int = 32, batch: int = 8) -> list[torch.Tensor]:
    torch.manual_seed(1)
    images = torch.randn(batch, 3, size, size)
    return [images, images + 0.1 * torch.randn_like(images)]


def make(name: str, model: str, /, **tables: dict[str, object]) -> tuple[Method, torch.optim.Optimizer, object]:
    recipe = small_recipe(name, model, train={"batch_size": 8}, **tables)
    torch.manual_seed(0)
    method = build_method(recipe, num_samples=20)
    return method, make_optimizer(recipe, method), shuffle_order(recipe, 0) if method.shuffle_keys else None


@pytest.mark.full
@pytest.mark.parametrize(("backbone", "size"), BACKBONES)
@pytest.mark.parametrize("name", METHODS)
def test_a_step_on_any_backbone(name: str, backbone: str, size: int) -> None:
    method, optimizer, order = make(name, backbone, views={"size": size})
    result = method(one_batch(size), BatchInfo(torch.arange(8)), Progress(0, 1), order)
    assert math.isfinite(result.loss.item())
    result.loss.backward()
    for part, param in method.named_parameters():
        if part.startswith("teacher"):
            assert not param.requires_grad
            assert param.grad is None
        elif param.requires_grad:
            assert param.grad is not None, f"{part} receives no gradient"
            assert torch.isfinite(param.grad).all()
    optimizer.step()
    method.after_update(Progress(1, 10))


@pytest.mark.parametrize("name", METHODS)
def test_steps_lower_the_loss(name: str) -> None:
    optim = {"name": "sgd", "lr": 3.0, "weight_decay": 0.0}
    method, optimizer, order = make(name, "test_resnet", optim=optim)
    views = one_batch()
    losses = []
    for step in range(12):
        result = method(views, BatchInfo(torch.arange(8)), Progress(0, 1), order)
        result.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if name == "moco_v3":
            method.after_update(Progress(step + 1, 12))
        losses.append(result.loss.item())
    assert losses[-1] < losses[1]


@pytest.mark.parametrize("name", ["moco_v1", "moco_v2"])
def test_first_steps_of_a_copied_teacher(name: str) -> None:
    """Aligned views and a copied teacher: the first loss is far below chance, and rises while real keys arrive."""
    method, _, order = make(name, "test_resnet", method={"queue_size": 32, "bn_groups": 1, "temperature": 0.07})
    torch.manual_seed(2)
    losses, ranks = [], []
    for _ in range(5):
        images = torch.randn(8, 3, 32, 32)
        result = method([images, images], BatchInfo(torch.arange(8)), Progress(0, 1), order)
        losses.append(result.loss.item())
        ranks.append(result.metrics["accuracy"].item())
        method.after_update(Progress(1, 10))
    assert losses[0] < 0.5 * math.log(33)
    assert ranks[0] == 1
    assert losses[4] > 2 * losses[0]


@pytest.mark.parametrize("name", ["moco_v1", "moco_v2"])
def test_a_key_is_never_its_own_negative(name: str) -> None:
    """The keys of a step reach the queue only after its loss, whatever the queue would do with them."""
    method, _, order = make(name, "test_resnet")
    before = method.queue.keys.clone()
    loss = method(one_batch(), BatchInfo(torch.arange(8)), Progress(0, 1), order).loss.item()
    assert torch.equal(method.queue.keys, before)
    pushed = method.new_keys
    method.after_update(Progress(1, 10))
    assert torch.equal(method.queue.keys[:8], pushed)
    assert torch.equal(method.queue.keys[8:], before[8:])
    assert method.queue.pointer.item() == 8
    assert math.isfinite(loss)


@pytest.mark.parametrize("name", METHODS)
def test_nothing_moves_in_eval_mode(name: str) -> None:
    method, _, order = make(name, "test_resnet")
    method.eval()
    before = {key: value.clone() for key, value in method.state_dict().items()}
    with torch.no_grad():
        method(one_batch(), BatchInfo(torch.arange(8)), Progress(0, 1), order)
    assert all(torch.equal(before[key], value) for key, value in method.state_dict().items())


def test_shuffling_matters_only_between_groups() -> None:
    """With one BN group a permutation changes nothing; with two it changes the keys and so the loss."""
    change = {}
    for groups in (1, 2):
        losses = []
        for shuffled in (False, True):
            method, _, order = make("moco_v2", "test_resnet", method={"bn_groups": groups})
            losses.append(
                method(one_batch(), BatchInfo(torch.arange(8)), Progress(0, 1), order if shuffled else None).loss.item()
            )
        change[groups] = abs(losses[1] - losses[0])
    assert change[1] < 1e-5
    assert change[2] > 1e-4


def test_v3_is_symmetric_in_its_views_and_v2_is_not() -> None:
    first, second = one_batch()
    for name, symmetric in (("moco_v3", True), ("moco_v2", False)):
        losses = []
        for views in ([first, second], [second, first]):
            method, _, order = make(name, "test_resnet")
            losses.append(method(views, BatchInfo(torch.arange(8)), Progress(0, 1), order).loss.item())
        assert (abs(losses[0] - losses[1]) < 1e-5) == symmetric


def test_names() -> None:
    assert find_method("mocov3") is find_method("moco_v3") is METHODS["moco_v3"]
    with pytest.raises(UserError, match="did you mean 'moco_v3'"):
        find_method("moco_v33")
