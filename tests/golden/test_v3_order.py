"""Checks the MoCo v3 loop against torch's own pieces put together in the order of the official program."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from .test_loops import BATCH, STEPS, run_v3, sgd, v3_modules, views

TEMPERATURE = 0.2


def direction(q: Tensor, k: Tensor) -> Tensor:
    """One direction of the loss from torch functions."""
    logits = nn.functional.normalize(q) @ nn.functional.normalize(k).T / TEMPERATURE
    return 2 * TEMPERATURE * nn.functional.cross_entropy(logits, torch.arange(BATCH))


def test_v3_matches_the_official_order() -> None:
    """Moving the teacher before the keys, with the momenta delayed by one step, gives the same run.

    The move at step 0 is a no-op for any momentum, and one more move at the end removes the lag.
    """
    backbone, projector, predictor = v3_modules()
    base = nn.Sequential(backbone, projector)
    teacher = copy.deepcopy(base)
    optimizer = sgd([p for p in [*base.parameters(), *predictor.parameters()] if p.requires_grad])
    momenta = [0.5] + [0.99 + 0.002 * i for i in range(STEPS)]

    def move(m: float) -> None:
        with torch.no_grad():
            for old, new in zip(teacher.parameters(), base.parameters(), strict=True):
                old.lerp_(new, 1.0 - m)

    losses = []
    for step, (x1, x2) in enumerate(views(7)):
        q1, q2 = predictor(base(x1)), predictor(base(x2))
        move(momenta[step])
        with torch.no_grad():
            k1, k2 = teacher(x1), teacher(x2)
        loss = direction(q1, k2) + direction(q2, k1)
        optimizer.param_groups[0]["lr"] = 0.1 * step
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    move(momenta[STEPS])

    run = run_v3(sgd, 0.1)
    assert run.losses == pytest.approx(losses, rel=1e-10)
    teacher_values, student_values = list(teacher.state_dict().values()), list(base.state_dict().values())
    student_values += list(predictor.state_dict().values())
    torch.testing.assert_close(list(run.teacher.values()), teacher_values, rtol=0, atol=1e-9)
    torch.testing.assert_close(list(run.student.values()), student_values, rtol=0, atol=1e-9)
