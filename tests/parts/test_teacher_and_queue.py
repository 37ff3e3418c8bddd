"""The teacher against the closed-form average; the queue against a list."""

import copy
from typing import Any

import pytest
import torch
from golden.formulas import ema_closed_form
from torch import nn
from torch.nn.functional import normalize

from sslkit.methods import MomentumOptions, Progress
from sslkit.parts import momentum_teacher
from sslkit.parts.momentum_teacher import MomentumTeacher, move_where
from sslkit.parts.queue import KeyQueue
from sslkit.parts.update_gate import gated


def small_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def test_teacher_is_the_closed_form_average() -> None:
    student = small_net()
    teacher = MomentumTeacher(student)
    start, trajectory = student[0].weight.detach().double(), []
    for _ in range(50):
        with torch.no_grad():
            student[0].weight.add_(torch.randn_like(student[0].weight) * 0.1)
        trajectory.append(student[0].weight.detach().double().clone())
        teacher.update(student, 0.9)
    expected = ema_closed_form(start, trajectory, 0.9)
    torch.testing.assert_close(teacher.module[0].weight.double(), expected, rtol=1e-6, atol=1e-7)


def test_momentum_one_changes_no_bit_and_zero_copies() -> None:
    student = small_net()
    teacher = MomentumTeacher(student)
    before = copy.deepcopy(teacher.state_dict())
    with torch.no_grad():
        for param in student.parameters():
            param.add_(torch.randn_like(param))
    teacher.update(student, 1.0)
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    teacher.update(student, 0.0)
    for own, theirs in zip(teacher.parameters(), student.parameters(), strict=True):
        assert torch.equal(own, theirs)


def test_frozen_equal_weights_stay_bit_identical() -> None:
    student = small_net()
    teacher = MomentumTeacher(student)
    for _ in range(200):
        teacher.update(student, 0.99)
    for own, theirs in zip(teacher.parameters(), student.parameters(), strict=True):
        assert torch.equal(own, theirs)


def test_teacher_takes_no_gradient_and_keeps_its_own_statistics() -> None:
    student = small_net()
    teacher = MomentumTeacher(student)
    x = torch.randn(16, 4) + 3
    out = teacher(x)
    assert not out.requires_grad
    assert all(not param.requires_grad for param in teacher.parameters())
    hidden = x @ student[0].weight.T + student[0].bias
    expected = 0.1 * hidden.detach().mean(dim=0)
    torch.testing.assert_close(teacher.module[1].running_mean, expected)
    assert torch.equal(student[1].running_mean, torch.zeros(8))
    teacher.update(student, 0.5)
    torch.testing.assert_close(teacher.module[1].running_mean, expected)


def uneven_net(seed: int) -> nn.Module:
    """Parameters of several chunks, of less than one, of all memory formats."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(301, 333), nn.Conv2d(70, 80, 3), nn.Conv2d(64, 513, 1), nn.LayerNorm(5))
    net.to(memory_format=torch.channels_last)
    net.turned = nn.Parameter(torch.randn(300, 200).T)
    net.gaps = nn.Parameter(torch.randn(200, 400)[:, ::2])
    return net


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_do_not_change_a_bit_of_the_move(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    student, start = uneven_net(0), uneven_net(1)
    start.turned = nn.Parameter(start.turned.detach().contiguous())  # strides that differ from the student's
    for weight in (0.004, 0.3, 0.7, 0.0, 1.0):
        teacher = MomentumTeacher(start)
        teacher.update(student, 1.0 - weight)
        for own, old, theirs in zip(teacher.parameters(), start.parameters(), student.parameters(), strict=True):
            assert torch.equal(own, old.detach().lerp(theirs.detach(), 1.0 - (1.0 - weight)))
            assert own._version > 0
    assert all(not param.requires_grad for param in teacher.parameters())


def test_a_move_in_threads_shows_its_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    own = [torch.zeros(40_000), torch.zeros(40_000)]
    with pytest.raises(RuntimeError, match="dtype"):
        momentum_teacher.move(own, [torch.zeros(40_000), torch.zeros(40_000, dtype=torch.float64)], 0.5)


def test_a_gate_keeps_every_bit_or_moves_as_without_it() -> None:
    student = uneven_net(0)
    held, moved, plain = (MomentumTeacher(uneven_net(1)) for _ in range(3))
    before = copy.deepcopy(held.state_dict())
    with gated(torch.zeros(())):
        held.update(student, 0.9)
    with gated(torch.ones(())):
        moved.update(student, 0.9)
    plain.update(student, 0.9)
    for name, value in plain.state_dict().items():
        assert torch.equal(held.state_dict()[name], before[name])
        assert torch.equal(moved.state_dict()[name], value)


def test_the_gate_of_a_gpu_holds_back_a_student_that_is_not_finite() -> None:
    """The same operators on a CPU: -0.0 keeps its sign, NaN does not come through, a move is right to rounding."""
    torch.manual_seed(0)
    own = [torch.randn(33, 7), torch.tensor([-0.0, 0.0, 1e-40])]
    theirs = [torch.full((33, 7), float("nan")), torch.tensor([float("inf"), -1.0, 2.0])]
    before = [tensor.clone() for tensor in own]
    move_where(torch.zeros(()), own, theirs, 0.01)
    assert all(torch.equal(a.view(torch.int32), b.view(torch.int32)) for a, b in zip(own, before, strict=True))
    theirs = [torch.randn_like(tensor) for tensor in own]
    for weight in (0.01, 0.6, 0.0, 1.0):
        expected = [a.double().lerp(b.double(), weight).float() for a, b in zip(own, theirs, strict=True)]
        move_where(torch.ones(()), own, theirs, weight)
        torch.testing.assert_close(own, expected, rtol=2e-7, atol=2e-7)


@pytest.mark.parametrize("batches", [[4, 4, 4, 4], [3, 3, 3, 3, 3], [7, 1, 9], [25, 2], [10, 10]])
def test_queue_is_a_ring_at_any_batch_size(batches: list[int]) -> None:
    torch.manual_seed(0)
    queue = KeyQueue(10, 5)
    expected, position = [*queue.keys.clone()], 0
    for size in batches:
        keys = normalize(torch.randn(size, 5), dim=1)
        queue.push(keys)
        for key in keys:
            expected[position] = key
            position = (position + 1) % 10
        assert torch.equal(queue.keys, torch.stack(expected))
        assert queue.pointer.item() == position
    torch.testing.assert_close(queue.keys.norm(dim=1), torch.ones(10))


def test_queue_survives_a_state_dict() -> None:
    queue = KeyQueue(10, 5)
    queue.push(torch.randn(3, 5))
    other = KeyQueue(10, 5)
    other.load_state_dict(queue.state_dict())
    assert torch.equal(other.keys, queue.keys)
    assert other.pointer.item() == 3


def test_mode_and_dropout_of_the_teacher_are_declared() -> None:
    student = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout()).train()
    modes = {
        (statistics, dropout): [
            layer.training
            for layer in MomentumTeacher(student, batch_statistics=statistics, dropout=dropout).train().module
        ]
        for statistics in (True, False)
        for dropout in (True, False)
    }
    assert modes[True, False] == [False, True, False]
    assert modes[True, True] == [True, True, True]
    assert modes[False, False] == [False, False, False]
    assert modes[False, True] == [True, False, True]


class _Options(MomentumOptions):
    momentum: float = 0.9


@pytest.mark.parametrize(
    ("options", "momenta"),
    [
        ({}, [0.9, 0.9, 0.9]),
        ({"momentum_schedule": "cosine"}, [0.9, 0.95, 1.0]),
        ({"momentum_half_life": 256}, [0.5**0.25] * 3),
        ({"momentum": 1.0}, [1.0, 1.0, 1.0]),
    ],
)
def test_how_the_momentum_moves(options: dict[str, Any], momenta: list[float]) -> None:
    teacher = MomentumTeacher(nn.Linear(2, 2), _Options(**options).momentum_at)
    positions = [Progress(updates, 100, 10, batch_size=64) for updates in (0, 50, 100)]
    assert [teacher.momentum_at(position) for position in positions] == pytest.approx(momenta)


def test_a_half_life_does_not_depend_on_the_batch_size() -> None:
    for batch in (16, 64):
        one, other = nn.Linear(1, 1), nn.Linear(1, 1)
        teacher = MomentumTeacher(one, _Options(momentum_half_life=64).momentum_at)
        for _ in range(64 // batch):
            teacher.update(other, teacher.momentum_at(Progress(0, 100, 10, batch)))
        torch.testing.assert_close(teacher.module.weight, (one.weight + other.weight) / 2)
