"""The teacher against the closed-form average; the queue against a list."""

import copy

import pytest
import torch
from golden.formulas import ema_closed_form
from torch import nn
from torch.nn.functional import normalize

from sslkit.parts.momentum_teacher import MomentumTeacher
from sslkit.parts.queue import KeyQueue


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
