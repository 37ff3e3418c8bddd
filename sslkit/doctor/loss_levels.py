"""How high the loss is where the answer is known, and how often a query meets itself."""

import math

import torch
from torch import Tensor

from sslkit.doctor.diagnosed_setup import Observation, Patient, key_queue
from sslkit.doctor.findings import Finding, attempt, fault, judge, not_applicable, ok
from sslkit.doctor.objective_probe import DERIVATIVE, DIM, PAIRS, ROWS, Bench, check_derivative, check_pairs, value
from sslkit.parts.chance_loss import ChanceLoss

POSITIVE, LEVEL = "positive", "loss level"
COUNTED = 8  # orthonormal rows by which candidates are counted


def examine_objective(patient: Patient, seen: Observation) -> list[Finding]:
    """All checks on the bare objective; each stands aside where an earlier one has found the cause."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pairs = attempt(PAIRS, lambda: check_pairs(Bench(patient, seen)))
        positive = attempt(POSITIVE, lambda: check_positive(patient, seen, pairs))
        level = attempt(LEVEL, lambda: check_level(patient, seen, pairs, positive))
        derivative = not_applicable(DERIVATIVE, f"see {POSITIVE}")
        if positive.verdict != "fault":
            derivative = attempt(DERIVATIVE, lambda: check_derivative(Bench(patient, seen), seen))
    return [pairs, positive, level, derivative]


def check_positive(patient: Patient, seen: Observation, pairs: Finding) -> Finding:
    """A query must meet its positive once, and itself never."""
    if seen.written:
        return fault(
            POSITIVE,
            f"{', '.join(seen.written)} changes during forward, so that keys of this step can be their own negatives; "
            "set them aside and push them in after_update",
        )
    bench = Bench(patient, seen)
    contrast = bench.method.chance_loss(COUNTED)
    if contrast is None or not contrast.is_info_nce or bench.banks:
        reason = "memories are drawn at random, the own one not spared" if bench.banks else "no counted negatives"
        return not_applicable(POSITIVE, reason)
    if pairs.verdict == "fault":
        return not_applicable(POSITIVE, f"see {PAIRS}")
    itself, at_right_angles = count_itself(bench, contrast)
    if abs(itself - 1.0) < 0.05:
        return fault(POSITIVE, "every embedding finds itself among the candidates: leave each out of its own")
    counted, faint = count_positives(bench, contrast), _exp(-1 / contrast.temperature)
    # The keys of the other images may have come along with the own one.
    if at_right_angles < 1.1 and max(1.95 - faint, 1.5) < counted < 2.05 + COUNTED * faint:
        return fault(
            POSITIVE,
            f"each query meets its own key {counted:.3g} times: once as the positive and again among the negatives",
        )
    return ok(POSITIVE, "each query meets its own key once, and never itself")


def check_level(patient: Patient, seen: Observation, pairs: Finding, positive: Finding) -> Finding:
    """Compare the loss with its formula at chance and, where there is one, on aligned embeddings."""
    if "fault" in (pairs.verdict, positive.verdict):
        return not_applicable(LEVEL, f"see {PAIRS if pairs.verdict == 'fault' else POSITIVE}")
    bench = Bench(patient, seen)
    contrast = bench.method.chance_loss(ROWS)
    if contrast is None:
        return not_applicable(LEVEL, "no formula for this method's loss")
    if _depends_on_length(Bench(patient, seen)):
        return fault(LEVEL, "longer embeddings change the loss: they are not normalised before they are compared")
    if contrast.negatives is None or not contrast.is_info_nce:
        return _judge_known_level(bench, contrast)
    complaint = _level_complaint(bench, contrast, 0.0)
    if complaint is None and not bench.banks:
        complaint = _level_complaint(bench, contrast, 1.0)
    levels = f"{contrast.at_similarity(0.0):.4g} at chance" + (
        "" if bench.banks else f", {contrast.at_similarity(1.0):.4g} when aligned"
    )
    here = f"in {DIM} dimensions with {contrast.negatives.count} negatives at temperature {contrast.temperature:g}"
    return judge(LEVEL, [complaint] if complaint else [], f"as computed: {levels}, {here}")


def _level_complaint(bench: Bench, contrast: ChanceLoss, similarity: float) -> str | None:
    """A sentence if the loss of random or of aligned pairs lies outside the tolerance of its formula."""
    assert contrast.negatives is not None
    rows = bench.unit()
    loss = bench.alike(rows, rows) if similarity else bench.at_chance()
    expected, slack = contrast.at_similarity(similarity), contrast.tolerance(ROWS)
    if abs(loss - expected) <= slack + (0.02 * abs(expected) if similarity else 0.0):
        return None
    kind = "aligned" if similarity else "random"
    return (
        f"the loss of {kind} embeddings is {loss:.4g}; temperature {contrast.temperature:g} and "
        f"{contrast.negatives.count} negatives make it {expected:.4g}: "
        "look for a temperature, a scale or a mean left out"
    )


def _depends_on_length(bench: Bench) -> bool:
    rows, others = bench.unit(64), bench.unit(64)
    losses = []
    for bench.length in (1.0, 1.0, 3.0):  # the first call may estimate a constant that is kept
        losses.append(bench.alike(rows, others))
    return abs(losses[2] - losses[1]) > 1e-4 * abs(losses[1])


def _judge_known_level(bench: Bench, chance: ChanceLoss) -> Finding:
    """The level of losses that are no InfoNCE: only chance has a formula."""
    expected, formula, loss = chance.value, chance.formula, bench.at_chance()
    slack = 0.005 * abs(expected) + 5 * chance.standard_error(ROWS) + chance.tolerance(ROWS)
    complaint = f"the loss of random embeddings is {loss:.4g}; it should be {expected:.4g} ({formula})"
    right = abs(loss - expected) <= slack
    return judge(LEVEL, [] if right else [complaint], f"as computed: {loss:.4g} at chance ({formula})")


def count_itself(bench: Bench, contrast: ChanceLoss) -> tuple[float, float]:
    """How many candidates equal to the query there are where none should be: all embeddings at right angles.

    Then loss = scale * ln(1 + negatives + count * exp(1 / temperature)).

    Returns:
        The count, and the whole sum in units of ``1 + negatives``: 1 if the count is 0.
    """
    bases = _right_angles(bench, bench.students + bench.teachers)
    if bench.teachers:
        loss = value(bench.loss(bases[: bench.students], bases[bench.students :]))
    else:
        loss = value(bench.loss(bases, []))
    assert contrast.negatives is not None
    total, plain = _exp(loss / contrast.scale), 1 + contrast.negatives.count
    return (total - plain) / _exp(1 / contrast.temperature), total / plain


def count_positives(bench: Bench, contrast: ChanceLoss) -> float:
    """How many candidates equal to the query there are where one should be, all others at right angles.

    Then loss = scale * ln(count + negatives * exp(-1 / temperature)).
    """
    (basis,) = _right_angles(bench, 1)
    assert contrast.negatives is not None
    others = contrast.negatives.count * _exp(-1 / contrast.temperature)
    return _exp(bench.alike(basis, basis) / contrast.scale) - others


def _right_angles(bench: Bench, number: int) -> list[Tensor]:
    """Embeddings that are all at right angles, and to the queue's keys too."""
    drawn = torch.randn(DIM, number * COUNTED + 1, dtype=torch.float64, generator=bench.generator)
    *rows, last = torch.linalg.qr(drawn).Q.T
    queue = key_queue(bench.method)
    if queue is not None:
        queue.keys.copy_(last.expand_as(queue.keys))
    return list(torch.stack(rows).chunk(number))


def _exp(value: float) -> float:
    return math.exp(min(value, 700.0))
