"""A method's objective alone, on chosen embeddings: what its loss and its gradient must be.

The probe is the same class with the same options, but narrow, in float64 and without heads, so that embeddings can be
given where it takes features, and the right loss is known to many digits. Part of the conformance tests of methods,
see `contract_checks`.
"""

import math
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.overrides import TorchFunctionMode

from sslkit.methods import BatchInfo, Method, MethodOptions, Progress
from sslkit.parts.chance_loss import ChanceLoss
from sslkit.parts.memory_bank import MemoryBank
from sslkit.parts.queue import KeyQueue

DIM, NUM_SAMPLES, ROWS = 128, 2048, 256
SMALL = {"dim": DIM, "hidden_dim": 16, "queue_size": 1024, "negatives": 1024, "prototypes": 256}
ORTHONORMAL_ROWS = 8
START = Progress(0, 100_000)
STEP_SIZES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2)  # of finite differences; a loss in low precision needs the larger ones
GRADIENT_TOLERANCE = 1e-3  # share of the slope
SLOPE_TOLERANCE = 0.03  # share of the slope; a slope known less well than this cannot be compared with
LOW_PRECISION = (torch.float32, torch.float16, torch.bfloat16)


class _InFloat64(TorchFunctionMode):
    """Replaces each request for a lower floating-point precision by float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.float, Tensor.half, Tensor.bfloat16):
            func = Tensor.double
        args = tuple(_double(arg) for arg in args)
        return func(*args, **{key: _double(arg) for key, arg in (kwargs or {}).items()})


def _double(arg: Any) -> Any:
    return torch.float64 if isinstance(arg, torch.dtype) and arg in LOW_PRECISION else arg


@contextmanager
def in_float64() -> Iterator[None]:
    """Compute a loss in float64 that lowers its precision itself, with ``.float()`` or ``dtype=``."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _InFloat64():
            yield
    finally:
        torch.set_default_dtype(default)


class ObjectiveProbe:
    """A method whose `objective` is given embeddings instead of features.

    Attributes:
        method: In float64 and training mode, its heads replaced by identities.
        num_student: Number of embeddings that the objective takes from the student.
        num_teacher: Number that it takes from the teacher.
        length: Norm of the embeddings.
    """

    def __init__(self, method: type[Method], options: MethodOptions, num_student: int, num_teacher: int) -> None:
        narrow = {key: value for key, value in SMALL.items() if getattr(options, key, 0)}
        torch.manual_seed(0)
        self.method = method(nn.Identity(), DIM, options.model_copy(update=narrow))
        self.method.set_num_samples(NUM_SAMPLES)
        for head in self.method.heads:
            setattr(self.method, head, nn.Identity())
        for name, teacher in self.method.teachers().items():
            if name in self.method.heads:
                teacher.module = nn.Identity()
        self.method.double().train()
        self.num_student, self.num_teacher = num_student, num_teacher
        self.banks = [part for part in self.method.dictionaries().values() if isinstance(part, MemoryBank)]
        self.generator = torch.Generator().manual_seed(1)
        self.bank_rows = self.unit(NUM_SAMPLES) if self.banks else torch.empty(0)
        self.length = 1.0

    def unit(self, rows: int = ROWS) -> Tensor:
        """Random unit vectors (rows, DIM)."""
        return normalize(torch.randn(rows, DIM, dtype=torch.float64, generator=self.generator), dim=1)

    def orthogonal_to(self, other: Tensor) -> Tensor:
        """Random unit vectors, each orthogonal to its row of ``other``."""
        drawn = self.unit(len(other))
        return normalize(drawn - (drawn * other).sum(dim=1, keepdim=True) * other, dim=1)

    def loss(self, student: list[Tensor], teacher: list[Tensor], bank_rows: Tensor | None = None) -> Tensor:
        """The loss of these embeddings; ``bank_rows`` are the rows of the batch's images in the memory bank."""
        sample_ids = torch.arange(len(student[0]))
        for bank in self.banks:
            bank.rows.copy_(self.bank_rows)
            if bank_rows is not None:
                bank.rows[sample_ids] = bank_rows
        torch.manual_seed(0)
        student, teacher = ([self.length * each for each in given] for given in (student, teacher))
        with in_float64():
            return self.method.objective(student, teacher, BatchInfo(sample_ids), START).loss

    def loss_of_pairs(self, queries: Tensor, positives: Tensor) -> float:
        """The loss if every query must find its row of ``positives``."""
        if self.num_teacher:
            return float(self.loss([queries] * self.num_student, [positives] * self.num_teacher).detach())
        return float(self.loss([queries, *[positives] * (self.num_student - 1)], [], positives).detach())

    def loss_at_chance(self, rows: int = ROWS) -> float:
        """The loss if every positive is orthogonal to its query, and everything else is random."""
        first = self.unit(rows)
        if not self.num_teacher:
            others = [self.orthogonal_to(first) for _ in range(self.num_student - 1)]
            return float(self.loss([first, *others], [], self.orthogonal_to(first)).detach())
        student = [first, *[self.unit(rows) for _ in range(self.num_student - 1)]]
        partners = student[::-1] if self.num_teacher == self.num_student else [first] * self.num_teacher
        return float(self.loss(student, [self.orthogonal_to(partner) for partner in partners]).detach())

    def orthonormal(self, number: int) -> list[Tensor]:
        """Embeddings that are all orthogonal to each other and to the keys of the queue."""
        drawn = torch.randn(DIM, number * ORTHONORMAL_ROWS + 1, dtype=torch.float64, generator=self.generator)
        *rows, last = torch.linalg.qr(drawn).Q.T
        for part in self.method.dictionaries().values():
            if isinstance(part, KeyQueue):
                part.keys.copy_(last.expand_as(part.keys))
        return list(torch.stack(rows).chunk(number))


def assert_pairs(probe: ObjectiveProbe) -> None:
    """The loss is low if each query meets its own positive, and high if the positives are exchanged."""
    if probe.num_teacher + probe.num_student < 2 and not probe.banks:
        return
    rows = probe.unit(128)
    own = probe.loss_of_pairs(rows, rows)
    exchanged = [probe.loss_of_pairs(rows, rows.roll(shift, dims=0)) for shift in range(1, 7)]
    mean, spread = statistics.mean(exchanged), statistics.stdev(exchanged)
    assert mean - own > 5 * spread + 1e-9, f"loss {own:.4g} with own positives, {mean:.4g} with those of other images"
    if probe.num_student == probe.num_teacher == 2:
        first, second = rows, probe.unit(128)
        crossed = float(probe.loss([first, second], [second, first]).detach())
        straight = float(probe.loss([first, second], [first, second]).detach())
        assert straight > crossed - 0.03 * abs(crossed), "each view is compared with its own key"


def assert_positive(probe: ObjectiveProbe) -> None:
    """A query meets its positive once, and itself never.

    Counted on orthonormal embeddings, where ``loss = scale * ln(1 + negatives + count * exp(1 / temperature))`` for
    ``count`` negatives that equal the query.
    """
    chance = probe.method.chance_loss(ORTHONORMAL_ROWS)
    if chance is None or not chance.is_info_nce or probe.banks:
        return
    assert chance.negatives is not None
    bases = probe.orthonormal(probe.num_student + probe.num_teacher)
    loss = float(probe.loss(bases[: probe.num_student], bases[probe.num_student :]).detach())
    total, expected = _exp(loss / chance.scale), 1 + chance.negatives.count
    itself = (total - expected) / _exp(1 / chance.temperature)
    assert abs(itself - 1.0) >= 0.05, "each embedding is among its own negatives"
    if total >= 1.1 * expected:
        return
    (basis,) = probe.orthonormal(1)
    faint = _exp(-1 / chance.temperature)
    positives = _exp(probe.loss_of_pairs(basis, basis) / chance.scale) - chance.negatives.count * faint
    # The keys of other images may have become negatives together with the own one.
    is_repeated = max(1.95 - faint, 1.5) < positives < 2.05 + ORTHONORMAL_ROWS * faint
    assert not is_repeated, f"each query meets its own key {positives:.3g} times"


def assert_loss_level(probe: ObjectiveProbe) -> None:
    """The loss of random and of equal embeddings is what `Method.chance_loss` declares."""
    chance = probe.method.chance_loss(ROWS)
    if chance is None:
        return
    rows, others, losses = probe.unit(64), probe.unit(64), []
    for probe.length in (1.0, 1.0, 3.0):  # the first call may estimate a constant
        losses.append(probe.loss_of_pairs(rows, others))
    probe.length = 1.0
    assert abs(losses[2] - losses[1]) <= 1e-4 * abs(losses[1]), "embeddings are not normalised: their length counts"
    loss, tolerance = probe.loss_at_chance(), chance.tolerance(ROWS)
    if not chance.is_info_nce:
        tolerance += 0.005 * abs(chance.value) + 5 * chance.standard_error(ROWS)
    assert abs(loss - chance.value) <= tolerance, f"{loss:.4g} at chance, not {chance.value:.4g} = {chance.formula}"
    if chance.is_info_nce and not probe.banks:
        assert_aligned_level(probe, chance)


def assert_aligned_level(probe: ObjectiveProbe, chance: ChanceLoss) -> None:
    """The loss of pairs that are equal is the formula at similarity 1."""
    rows = probe.unit()
    loss, expected = probe.loss_of_pairs(rows, rows), chance.at_similarity(1.0)
    assert abs(loss - expected) <= chance.tolerance(ROWS) + 0.02 * abs(expected), f"{loss:.4g}, not {expected:.4g}"


def assert_gradient(probe: ObjectiveProbe) -> None:
    """The gradient equals the slope of the loss; with a declared stop-gradient it does not."""
    student = [probe.unit(8) for _ in range(probe.num_student)]
    teacher, bank_rows = [probe.unit(8) for _ in range(probe.num_teacher)], probe.unit(8)
    probe.loss(student, teacher, bank_rows)  # what is estimated from the first batch is estimated now
    leaves = [each.clone().requires_grad_() for each in student]
    grads = torch.autograd.grad(probe.loss(leaves, teacher, bank_rows), leaves)
    directions = [
        [torch.randn(each.shape, dtype=each.dtype, generator=probe.generator) for each in student] for _ in range(4)
    ]
    slopes, error = measured_slopes(probe, student, teacher, bank_rows, directions)
    claimed = [sum(float((g * w).sum()) for g, w in zip(grads, way, strict=True)) for way in directions]
    size = max(math.hypot(*slopes), 1e-300)
    assert error <= SLOPE_TOLERANCE * size, "the loss is computed too coarsely to compare its gradient"
    difference = math.hypot(*(a - b for a, b in zip(slopes, claimed, strict=True))) / size
    tolerance = max(GRADIENT_TOLERANCE, 10 * error / size)
    if probe.method.stops_gradient:
        assert difference > tolerance, "stops_gradient is declared, but nothing stops the gradient"
    else:
        assert difference <= tolerance, f"the gradient is {difference:.0%} off the slope: part of it is detached"


def measured_slopes(
    probe: ObjectiveProbe,
    student: list[Tensor],
    teacher: list[Tensor],
    bank_rows: Tensor,
    directions: list[list[Tensor]],
) -> tuple[list[float], float]:
    """Slopes of the loss in several directions by central differences, and the norm of their errors.

    Small steps suffer from rounding, large ones from curvature, and the precision of the loss is not known. Its
    rounding is measured, several step sizes are tried, and the one with the smallest error is taken: rounding divided
    by the step size, plus the difference from the next larger step size.
    """

    def at(step: float, way: list[Tensor]) -> float:
        moved = [rows + step * change for rows, change in zip(student, way, strict=True)]
        return float(probe.loss(moved, teacher, bank_rows).detach())

    here = at(0.0, directions[0])
    changes = (abs(at(10.0**power, directions[0]) - here) for power in range(-15, -1))
    rounding = next((change for change in changes if change), abs(here))
    tried = [[(at(step, way) - at(-step, way)) / (2 * step) for way in directions] for step in STEP_SIZES]
    errors = [
        math.hypot(*(a - b for a, b in zip(fine, coarse, strict=True))) + len(directions) ** 0.5 * rounding / step
        for step, fine, coarse in zip(STEP_SIZES, tried, tried[1:], strict=False)
    ]
    best = min(range(len(errors)), key=errors.__getitem__)
    return tried[best], errors[best]


def _exp(value: float) -> float:
    return math.exp(min(value, 700.0))
