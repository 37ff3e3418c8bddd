"""LARS and LARC: bits of the per-parameter form, an independent transcription, skipped updates, launches."""

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from golden.moco_v3 import NaiveLars
from golden.simclr import NaiveSimclrLars
from golden.swav import NaiveLarc
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from sslkit.parts import layerwise_optimizers
from sslkit.parts.layerwise_optimizers import Larc, Lars

LR, DECAY = 0.5, 1e-2
KINDS: dict[str, tuple[Callable[..., Optimizer], Callable[..., Optimizer]]] = {
    "lars": (Lars, NaiveLars),
    "lars_simclr": (lambda params, **options: Lars(params, rate_in_momentum=True, **options), NaiveSimclrLars),
    "larc": (Larc, NaiveLarc),
}
ZERO, WITHOUT_GRADIENT, ZERO_GRADIENT, TINY_GRADIENT = 2, 5, 7, 8


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    """Layers of all layouts and of sizes on both sides of a packed row; one is zero."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(70, 30), (40,), (8, 8), (16, 4, 3, 3), (16, 1, 1, 1), (5, 5), (2048, 1), (9, 9), (6, 7), (), (1025,)]
    values = [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]
    values[ZERO].zero_()
    return [nn.Parameter(value.to(memory_format=torch.channels_last) if value.ndim == 4 else value) for value in values]


def set_gradients(params: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step + 1)
    for index, param in enumerate(params):
        grad = torch.randn(param.shape, generator=generator, dtype=param.dtype)
        param.grad = torch.empty_like(param).copy_(grad)
        if index == ZERO_GRADIENT:
            param.grad.zero_()
        elif index == TINY_GRADIENT:
            param.grad.mul_(1e-30)  # the squares are zero in float32
    params[WITHOUT_GRADIENT].grad = None


def groups(params: list[nn.Parameter]) -> list[dict[str, Any]]:
    """Most parameters in one group; the others without weight decay, those of LARS without adaptation too."""
    spared = (0, 10)
    return [
        {"params": [each for index, each in enumerate(params) if index not in spared]},
        {"params": [params[index] for index in spared], "weight_decay": 0.0, "adapt": False},
    ]


def lars_of_one(param: Tensor, group: dict[str, Any]) -> Tensor:
    assert param.grad is not None
    grad = param.grad
    if param.ndim > 1 and group.get("adapt", True):
        grad = grad.add(param, alpha=group["weight_decay"])
        param_norm, grad_norm = param.norm(), grad.norm()
        trust = group["eta"] * param_norm / grad_norm
        grad = grad * torch.where((param_norm > 0) & (grad_norm > 0), trust, torch.ones_like(trust))
    return grad


def larc_of_one(param: Tensor, group: dict[str, Any]) -> Tensor:
    assert param.grad is not None
    param_norm, grad_norm, decay = param.norm(), param.grad.norm(), group["weight_decay"]
    rate = group["trust"] * param_norm / (grad_norm + decay * param_norm + group["eps"])
    scaled = param.grad.add(param, alpha=decay) * rate
    return torch.where((param_norm > 0) & (grad_norm > 0), scaled, param.grad)


@torch.no_grad()
def step_one_by_one(optimizer: Optimizer, buffers: dict[Tensor, Tensor], kind: str) -> None:
    """The update of earlier versions, parameter by parameter."""
    for group in optimizer.param_groups:
        inside, outside = (group["lr"], 1.0) if kind == "lars_simclr" else (1.0, group["lr"])
        for param in group["params"]:
            if param.grad is not None:
                grad = (larc_of_one if kind == "larc" else lars_of_one)(param, group)
                buffer = buffers.setdefault(param, torch.zeros_like(param))
                buffer.mul_(group["momentum"]).add_(grad, alpha=inside)
                param.add_(buffer, alpha=-outside)


@pytest.mark.parametrize("kind", KINDS)
def test_every_bit_is_that_of_one_parameter_after_the_other(kind: str) -> None:
    ours, theirs = parameters(), parameters()
    optimizer, other = (KINDS[kind][0](groups(each), lr=LR, weight_decay=DECAY) for each in (ours, theirs))
    buffers: dict[Tensor, Tensor] = {}
    for step in range(3):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        optimizer.step()
        step_one_by_one(other, buffers, kind)
    start = parameters()[WITHOUT_GRADIENT]
    assert torch.equal(ours[WITHOUT_GRADIENT], start)
    for index, (mine, one) in enumerate(zip(ours, theirs, strict=True)):
        assert torch.equal(mine, one), index
        if index == WITHOUT_GRADIENT:
            assert mine not in optimizer.state
        else:
            assert list(optimizer.state[mine]) == ["momentum_buffer"]
            assert torch.equal(optimizer.state[mine]["momentum_buffer"], buffers[one]), index


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_independent_transcription(kind: str, fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """``fused`` is the update of a GPU."""
    if fused:
        monkeypatch.setattr(layerwise_optimizers, "HOST_DEVICES", ())
    ours, theirs = parameters(torch.float64), parameters(torch.float64)
    optimizer = KINDS[kind][0](ours, lr=LR, weight_decay=DECAY)
    other = KINDS[kind][1](theirs, lr=LR, wd=DECAY)
    for step in range(4):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        optimizer.param_groups[0]["lr"] = other.param_groups[0]["lr"] = LR / (step + 1)
        optimizer.step()
        other.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-14, atol=1e-14)


def snapshot(params: list[nn.Parameter], optimizer: Optimizer) -> list[Tensor]:
    return [each.detach().clone() for param in params for each in (param, *optimizer.state.get(param, {}).values())]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_found_inf_decides_whether_anything_is_updated(kind: str, fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if fused:
        monkeypatch.setattr(layerwise_optimizers, "HOST_DEVICES", ())
    params = parameters()
    optimizer = KINDS[kind][0](groups(params), lr=LR, weight_decay=DECAY)
    set_gradients(params, 0)
    optimizer.step()
    before = snapshot(params, optimizer)
    for value in (float("nan"), float("inf")):
        for param in params:
            param.grad = torch.full_like(param, value)
        params[WITHOUT_GRADIENT].grad = None
        optimizer.found_inf, optimizer.grad_scale = torch.ones(()), None
        optimizer.step()
        for mine, old in zip(snapshot(params, optimizer), before, strict=True):
            assert torch.equal(mine, old)

    others = copy.deepcopy(params)
    plain = KINDS[kind][0](groups(others), lr=LR, weight_decay=DECAY)
    plain.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    set_gradients(params, 1)
    set_gradients(others, 1)
    optimizer.found_inf = torch.zeros(())
    optimizer.step()
    plain.step()
    for mine, theirs in zip(snapshot(params, optimizer), snapshot(others, plain), strict=True):
        assert torch.equal(mine, theirs)
    assert not torch.equal(params[0], before[0])


@pytest.mark.parametrize("kind", KINDS)
def test_grad_scale_divides_the_gradients(kind: str) -> None:
    ours, theirs = parameters(), parameters()
    optimizer, plain = (KINDS[kind][0](each, lr=LR, weight_decay=DECAY) for each in (ours, theirs))
    set_gradients(ours, 0)
    set_gradients(theirs, 0)
    for param in ours:
        param.grad = None if param.grad is None else param.grad * 1024
    optimizer.grad_scale = torch.tensor(1024.0)
    optimizer.step()
    plain.step()
    assert all(torch.equal(mine, other) for mine, other in zip(ours, theirs, strict=True))


class Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operators: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators[func.overloadpacket.__name__] += 1
        return None if func.overloadpacket.__name__ == "_fused_sgd_" else func(*args, **(kwargs or {}))


class FakeGpu(FakeTensorMode):
    avoid_device_init = True


@pytest.mark.parametrize("kind", KINDS)
def test_launches_do_not_grow_with_the_parameters_and_no_host_waits(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Fake tensors cannot be pinned.
    monkeypatch.setattr(layerwise_optimizers, "upload", lambda values, device: values.to(device))
    no_launch = ("device", "as_strided", "slice", "unsqueeze", "new_empty")
    launches = []
    for count in (4, 60):
        with FakeGpu():
            params = [nn.Parameter(torch.empty(8, 8, device="cuda")) for _ in range(count)]
            optimizer = KINDS[kind][0](params, lr=LR, weight_decay=DECAY)
            optimizer.found_inf = torch.empty((), device="cuda")
            for param in params:
                param.grad = torch.empty_like(param)
            with Counting() as counting:
                optimizer.step()  # allocates
                counting.operators.clear()
                optimizer.step()
        found = counting.operators
        assert found["_fused_sgd_"] == 1
        assert not {"_local_scalar_dense", "_to_copy", "nonzero", "copy_"} & found.keys(), found
        launches.append(sum(times for name, times in found.items() if name not in no_launch and "record" not in name))
    assert launches[0] == launches[1] <= 20, launches
