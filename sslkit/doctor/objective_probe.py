"""The objective alone, on embeddings of our choice: heads and backbone are taken out of the way.

The same class with the same options, but narrow and in float64, so that what the loss must be is known to many
digits: does it pair the right rows, does it leave the positive out of the negatives, is it as high as it should be,
and is its gradient its own?
"""

import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.overrides import TorchFunctionMode

from sslkit.doctor.diagnosed_setup import START, Observation, Patient
from sslkit.doctor.findings import Finding, fault, judge, not_applicable, ok
from sslkit.doctor.gradient_checks import STOP
from sslkit.methods import BatchInfo
from sslkit.parts.memory_bank import MemoryBank

PAIRS, DERIVATIVE = "pairs", "gradient exact"

DIM, SAMPLES = 128, 2048
SMALL = {"dim": DIM, "hidden_dim": 16, "queue_size": 1024, "negatives": 1024, "prototypes": 256}
ROWS = 256
CLEAR = 0.03  # share of a loss by which it must differ to be another
STEPS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2)  # of finite differences; coarse arithmetic needs the larger
EXACT = 1e-3  # share of a slope by which a gradient may be off
COARSEST = 0.03  # and the share up to which slopes must be known for the gradient to be judged
COARSE = (torch.float32, torch.float16, torch.bfloat16)


class _InFloat64(TorchFunctionMode):
    """Answers every wish for a coarser floating-point type with float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.float, Tensor.half, Tensor.bfloat16):
            func = Tensor.double
        args = tuple(torch.float64 if isinstance(arg, torch.dtype) and arg in COARSE else arg for arg in args)
        named = {
            key: torch.float64 if isinstance(arg, torch.dtype) and arg in COARSE else arg
            for key, arg in (kwargs or {}).items()
        }
        return func(*args, **named)


@contextmanager
def in_float64() -> Iterator[None]:
    """Let a loss that lowers its precision on the way, by ``.float()`` or ``dtype=``, be computed in float64."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _InFloat64():
            yield
    finally:
        torch.set_default_dtype(usual)


class Bench:
    """A method whose `objective` takes embeddings where it would take features.

    Attributes:
        method: In float64, training mode, heads replaced by identities.
        students: How many features the student gives to the objective.
        teachers: How many the teacher does.
        length: Norm of the embeddings that it is given.
    """

    def __init__(self, patient: Patient, seen: Observation) -> None:
        asked = patient.recipe.method
        known = {key: value for key, value in SMALL.items() if getattr(asked, key, 0)}
        options = asked.model_copy(update=known)
        self.method = type(patient.method)(nn.Identity(), DIM, options)
        self.method.set_num_samples(SAMPLES)
        for head in self.method.heads:
            setattr(self.method, head, nn.Identity())
        for name, teacher in self.method.teachers().items():
            if name in self.method.heads:
                teacher.module = nn.Identity()
        self.method.double().train()
        self.students, self.teachers = len(seen.student), len(seen.teacher)
        self.banks = [part for part in self.method.dictionaries().values() if isinstance(part, MemoryBank)]
        self.generator = torch.Generator().manual_seed(1)
        self.memories = self.unit(SAMPLES) if self.banks else torch.empty(0)
        self.length = 1.0

    def unit(self, rows: int = ROWS) -> Tensor:
        """Random unit vectors (rows, DIM)."""
        return normalize(torch.randn(rows, DIM, dtype=torch.float64, generator=self.generator), dim=1)

    def apart(self, other: Tensor) -> Tensor:
        """Random unit vectors, each at a right angle to its row of ``other``."""
        drawn = self.unit(len(other))
        return normalize(drawn - (drawn * other).sum(dim=1, keepdim=True) * other, dim=1)

    def loss(self, students: list[Tensor], teachers: list[Tensor], memories: Tensor | None = None) -> Tensor:
        """The loss of these embeddings; ``memories`` are put into the bank as the batch's own."""
        ids = torch.arange(len(students[0]))
        for bank in self.banks:
            bank.rows.copy_(self.memories)
            if memories is not None:
                bank.rows[ids] = memories
        torch.manual_seed(0)
        students, teachers = ([self.length * each for each in given] for given in (students, teachers))
        with in_float64():
            return self.method.objective(students, teachers, BatchInfo(ids), START).loss

    def alike(self, rows: Tensor, shown: Tensor) -> float:
        """Loss where the queries are ``rows`` and whatever they must find is ``shown``."""
        if self.teachers:
            return value(self.loss([rows] * self.students, [shown] * self.teachers))
        return value(self.loss([rows, *[shown] * (self.students - 1)], [], shown))

    def at_chance(self, rows: int = ROWS) -> float:
        """Loss where every positive is at a right angle to its query, and all else is random."""
        first = self.unit(rows)
        if not self.teachers:
            others = [self.apart(first) for _ in range(self.students - 1)]
            return value(self.loss([first, *others], [], self.apart(first)))
        students = [first, *[self.unit(rows) for _ in range(self.students - 1)]]
        partners = students[::-1] if self.teachers == self.students else [first] * self.teachers
        return value(self.loss(students, [self.apart(partner) for partner in partners]))


def check_pairs(bench: Bench) -> Finding:
    """The loss must be low where each query meets its own positive, and rise when the positives change places."""
    if bench.teachers + bench.students < 2 and not bench.banks:
        return not_applicable(PAIRS, "a single view, and nothing it is compared with")
    rows = bench.unit(128)
    own = bench.alike(rows, rows)
    others = [bench.alike(rows, rows.roll(shift, dims=0)) for shift in range(1, 7)]
    mean, spread = statistics.mean(others), statistics.stdev(others)
    if mean - own < 5 * spread + 1e-9:
        return fault(
            PAIRS,
            f"the loss is {own:.4g} where every positive equals its query and {mean:.4g} where each has another's: "
            "labels or rows are out of step",
        )
    if bench.students == bench.teachers == 2:
        first, second = rows, bench.unit(128)
        crossed = value(bench.loss([first, second], [second, first]))
        straight = value(bench.loss([first, second], [first, second]))
        if straight < crossed - CLEAR * abs(crossed):
            return fault(PAIRS, "each view is compared with its own key, not with the other view's: nothing to learn")
    return ok(PAIRS, f"on aligned embeddings the loss is {own:.4g}; with the positives permuted {mean:.4g}")


def check_derivative(bench: Bench, seen: Observation) -> Finding:
    """Compare the gradient with the slope of the loss: they differ where one is stopped on the student's side."""
    method = bench.method
    stops = method.stops_gradient
    check = STOP if stops else DERIVATIVE
    if not seen.student or any(features.grad is None for features in seen.student):
        return not_applicable(check, "see gradient")
    students = [bench.unit(8) for _ in range(bench.students)]
    teachers, memories = [bench.unit(8) for _ in range(bench.teachers)], bench.unit(8)
    bench.loss(students, teachers, memories)  # what is estimated once, from the first batch, is estimated now
    leaves = [each.clone().requires_grad_() for each in students]
    grads = torch.autograd.grad(bench.loss(leaves, teachers, memories), leaves)
    ways = [
        [torch.randn(each.shape, dtype=each.dtype, generator=bench.generator) for each in students] for _ in range(4)
    ]
    slopes, unsure = measured_slopes(bench, students, teachers, memories, ways)
    told = [sum(float((g * w).sum()) for g, w in zip(grads, way, strict=True)) for way in ways]
    size = sum(slope**2 for slope in slopes) ** 0.5
    if unsure > COARSEST * size:
        return not_applicable(
            check, f"the loss is computed too coarsely: its slope is known to {unsure / max(size, 1e-300):.0%} only"
        )
    off = sum((slope - own) ** 2 for slope, own in zip(slopes, told, strict=True)) ** 0.5 / max(size, 1e-300)
    slack = max(EXACT, 10 * unsure / max(size, 1e-300))
    if stops:
        missing = off < slack
        words = "the gradient is the whole slope of the loss: nothing stops it on the targets' side"
        return judge(
            check, [words] if missing else [], f"in place: the gradient leaves out {off:.0%} of the loss's slope"
        )
    complaint = (
        f"the gradient is {off:.0%} off the slope of the loss: part of it is cut, as by a gather without gradient; "
        "a method that stops one on purpose declares stops_gradient = True"
    )
    return judge(check, [complaint] if off > slack else [], "equal to the slope of the loss")


def measured_slopes(
    bench: Bench, students: list[Tensor], teachers: list[Tensor], memories: Tensor, ways: list[list[Tensor]]
) -> tuple[list[float], float]:
    """Slopes of the loss in several directions by central differences, and how well they are known.

    Rounding spoils small steps and curvature large ones, and the precision of a loss is not known. So its rounding is
    measured, several steps are tried, and the one with the smallest error is taken: rounding over step, and the
    difference from the next larger step.

    Returns:
        A slope for each of ``ways``, and the norm of the error of all.
    """

    def at(step: float, way: list[Tensor]) -> float:
        return value(bench.loss([s + step * w for s, w in zip(students, way, strict=True)], teachers, memories))

    here = at(0.0, ways[0])
    changes = (abs(at(10.0**power, ways[0]) - here) for power in range(-15, -1))
    rounding = next((change for change in changes if change), abs(here))
    tried = [[(at(step, way) - at(-step, way)) / (2 * step) for way in ways] for step in STEPS]
    errors = [
        sum((a - b) ** 2 for a, b in zip(fine, coarse, strict=True)) ** 0.5 + len(ways) ** 0.5 * rounding / step
        for step, fine, coarse in zip(STEPS, tried, tried[1:], strict=False)
    ]
    best = min(range(len(errors)), key=errors.__getitem__)
    return tried[best], errors[best]


def value(loss: Tensor) -> float:
    """A loss as a number."""
    return float(loss.detach())
