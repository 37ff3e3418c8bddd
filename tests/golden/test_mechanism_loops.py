"""Checks the end-to-end and symmetric MoCo loops, BN groups, and that no loop touches its arguments."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from . import byol, instdisc, mechanisms, simclr, swav
from .common import one_update_of_statistics
from .formulas import ema_closed_form
from .moco_v1v2 import train_moco
from .test_loops import BATCH, SLOTS, STEPS, params, sgd, trunk
from .test_more_loops import (
    BANK,
    IDS,
    LRS,
    MOMENTA,
    NEGATIVES,
    PERMUTATIONS,
    QUEUE,
    VIEWS,
    byol_modules,
    close,
    conv_modules,
    crops,
    linear,
    torch_loop,
)


def run_end_to_end(groups: int, permutations: list[Tensor] = PERMUTATIONS) -> mechanisms.EndToEndRun:
    """Runs the end-to-end toy."""
    return mechanisms.train_end_to_end(trunk(), linear(), VIEWS, permutations, groups, 0.2, sgd, LRS)


def run_symmetric(
    steps: int = STEPS, groups: int = 2, m: float = 0.9, permutations: list[Tensor] = PERMUTATIONS
) -> mechanisms.SymmetricMocoRun:
    """Runs the symmetric MoCo toy."""
    views, lrs, momenta = VIEWS[:steps], LRS[:steps], [m] * steps
    return mechanisms.train_symmetric_moco(
        trunk(), linear(), QUEUE, views, permutations[:steps], groups, 0.2, sgd, lrs, momenta
    )


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_groups_are_separate_calls(groups: int) -> None:
    """Shuffled and restored features equal one call per slice; their BN buffers are the mean of as many GPUs'."""
    net = nn.ModuleDict({"backbone": trunk(), "projector": linear()}).train()
    gpus = [copy.deepcopy(net) for _ in range(groups)]
    x, order = VIEWS[0][0], PERMUTATIONS[0]
    out = mechanisms.embed(net, x, groups, order)
    slices = x[order].chunk(groups)
    parts = [gpu["projector"](gpu["backbone"](part)) for gpu, part in zip(gpus, slices, strict=True)]
    torch.testing.assert_close(out, torch.cat(parts)[order.argsort()], rtol=0, atol=1e-14)
    states = [gpu.state_dict() for gpu in gpus]
    mean = {key: (sum(state[key] for state in states) / groups).to(value.dtype) for key, value in states[0].items()}
    close(net.state_dict(), mean)
    torch.testing.assert_close(mechanisms.embed(net, x, 1, order), mechanisms.embed(net, x, 1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("groups", [1, 2])
def test_end_to_end_loop(groups: int) -> None:
    """Equals torch's pieces with gradient through both sides."""
    run = run_end_to_end(groups)
    net = nn.Sequential(trunk(), linear())

    def loss(step: int) -> Tensor:
        (x_q, x_k), order = VIEWS[step], PERMUTATIONS[step]
        with one_update_of_statistics(net, groups):
            q = nn.functional.normalize(torch.cat([net(part) for part in x_q.chunk(groups)]))
        with one_update_of_statistics(net, groups):
            k = nn.functional.normalize(torch.cat([net(part) for part in x_k[order].chunk(groups)]))[order.argsort()]
        return nn.functional.cross_entropy(q @ k.T / 0.2, torch.arange(BATCH))

    assert run.losses == pytest.approx(torch_loop(net, loss), rel=1e-10)
    close(run.student, net[0].state_dict(), "backbone.")
    close(run.student, net[1].state_dict(), "projector.")
    assert run.student["backbone.1.num_batches_tracked"].item() == 2 * STEPS


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_shuffle_needs_groups(groups: int) -> None:
    """Another permutation changes the first losses only when there are at least two groups."""
    other = [p.flip(0).roll(3) for p in PERMUTATIONS]
    for first, second in (
        (run_end_to_end(groups).losses[0], run_end_to_end(groups, other).losses[0]),
        (run_symmetric(1, groups).losses[0], run_symmetric(1, groups, permutations=other).losses[0]),
    ):
        assert (abs(first - second) < 1e-12) == (groups == 1)


def test_symmetric_first_loss() -> None:
    """The first loss is the sum of the one-way losses of the two directions."""
    one_way = [
        train_moco(trunk(), linear(), QUEUE, [pair], PERMUTATIONS[:1], 2, 0.0, 0.0, 0.9, 0.9, 0.2).losses[0]
        for pair in (VIEWS[0], VIEWS[0][::-1])
    ]
    assert run_symmetric(1).losses[0] == pytest.approx(sum(one_way), rel=1e-12)


def test_symmetric_loop() -> None:
    """With one group and a fixed teacher the loop equals torch's pieces, queue included."""
    run = run_symmetric(groups=1, m=1.0)
    net = nn.Sequential(trunk(), linear())
    teacher, queue = copy.deepcopy(net), QUEUE.clone()

    def loss(step: int) -> Tensor:
        negatives = queue.clone()
        keys = [nn.functional.normalize(teacher(x)).detach() for x in VIEWS[step]]
        total = torch.zeros((), dtype=torch.float64)
        for x, k in zip(VIEWS[step], reversed(keys), strict=True):
            q = nn.functional.normalize(net(x))
            logits = torch.cat([(q * k).sum(dim=1, keepdim=True), q @ negatives], dim=1) / 0.2
            total = total + nn.functional.cross_entropy(logits, torch.zeros(BATCH, dtype=torch.long))
        slots = (step * 2 * BATCH + torch.arange(2 * BATCH)) % SLOTS
        for slot, key in zip(slots.tolist(), torch.cat(keys), strict=True):
            queue[:, slot] = key
        return total

    assert run.losses == pytest.approx(torch_loop(net, loss), rel=1e-10)
    torch.testing.assert_close(run.queue, queue, rtol=0, atol=1e-12)
    close(run.student, net[0].state_dict(), "backbone.")
    close(run.teacher, teacher[0].state_dict(), "backbone.")
    assert run.pointer == 2 * BATCH * STEPS % SLOTS


def test_symmetric_teacher_and_queue() -> None:
    """Closed-form teacher moved once per step; every queue column has unit norm; own BN buffers."""
    name = "backbone.0.weight"
    trajectory = [run_symmetric(n).student[name] for n in range(1, STEPS + 1)]
    run = run_symmetric()
    expected = ema_closed_form(trunk().state_dict()["0.weight"], trajectory, 0.9)
    torch.testing.assert_close(run.teacher[name], expected, rtol=0, atol=1e-14)
    assert run.queue.norm(dim=0).tolist() == pytest.approx([1.0] * SLOTS, abs=1e-12)
    assert run.teacher["backbone.1.num_batches_tracked"].item() == 2 * STEPS
    copied = run_symmetric(m=0.0)
    for key, value in params(copied.teacher).items():
        assert torch.equal(value, copied.student[key])


Loop = Callable[..., object]
LOOPS: dict[str, tuple[Loop, Callable[[], tuple[nn.Module, ...]], tuple[object, ...]]] = {
    "simclr": (simclr.train_simclr, lambda: (trunk(), linear()), (VIEWS, 0.1, sgd, LRS)),
    "byol": (byol.train_byol, byol_modules, (VIEWS, sgd, LRS, MOMENTA)),
    "swav": (swav.train_swav, conv_modules, (crops(), 0.1, 0.05, 3, sgd, LRS, 1, BATCH)),
    "nce": (
        instdisc.train_instdisc,
        lambda: (trunk(), linear()),
        (BANK, [a for a, _ in VIEWS], IDS, NEGATIVES, 0.2, sgd, LRS),
    ),
    "bank": (
        mechanisms.train_memory_bank,
        lambda: (trunk(), linear()),
        (BANK, [a for a, _ in VIEWS], IDS, NEGATIVES, 0.2, sgd, LRS),
    ),
    "end_to_end": (
        mechanisms.train_end_to_end,
        lambda: (trunk(), linear()),
        (VIEWS, PERMUTATIONS, 2, 0.2, sgd, LRS),
    ),
    "symmetric": (
        mechanisms.train_symmetric_moco,
        lambda: (trunk(), linear()),
        (QUEUE, VIEWS, PERMUTATIONS, 2, 0.2, sgd, LRS, MOMENTA),
    ),
}


@pytest.mark.parametrize("name", LOOPS)
def test_arguments_are_untouched_and_runs_repeat(name: str) -> None:
    """Modules, bank and queue given by the caller stay as they were; a second run is bit-identical."""
    train, build, arguments = LOOPS[name]
    modules = build()
    before, bank, queue = copy.deepcopy([m.state_dict() for m in modules]), BANK.clone(), QUEUE.clone()
    first, second = (train(*modules, *arguments) for _ in range(2))
    for old, module in zip(before, modules, strict=True):
        torch.testing.assert_close(dict(module.state_dict()), dict(old), rtol=0, atol=0)
    assert torch.equal(bank, BANK)
    assert torch.equal(queue, QUEUE)
    assert all(p.grad is None for module in modules for p in module.parameters())
    losses = torch.tensor(first.losses)  # type: ignore[attr-defined]
    assert losses.shape == (STEPS,)
    assert losses.isfinite().all()
    assert first.losses == second.losses  # type: ignore[attr-defined]
    torch.testing.assert_close(first.student, second.student, rtol=0, atol=0)  # type: ignore[attr-defined]
