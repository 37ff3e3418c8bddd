"""Alarms: signs of trouble in the curves of a run, each one sentence with the number, its threshold and a remedy.

Each alarm begins with its kind and a colon: data, collapse, spike, dip, leak, teacher. Thresholds lie well outside of
what healthy runs show (docs/diagnostics.md has the numbers).
"""

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from sslkit.files.jsonl_reader import number, step_of

COLLAPSED_STD = 0.05  # relative to 1 / sqrt(D); healthy runs: 0.12 and more
COLLAPSED_RANK = 2.0  # healthy runs: 5 and more
FALLEN_RANK = 0.1  # relative to the highest of the run; healthy runs: 0.38 and more
SPIKE_FACTOR, SPIKE_WINDOW = 5.0, 20
LAG = 3  # steps; in MoCo v3's study the last layers follow the first by a couple of iterations
DIP = 0.03  # fall of kNN accuracy
LEAK_RISE, LEAK_PRETEXT = 0.1, 0.5  # pretext accuracy: its rise, and its least value, while kNN falls
FLAT_RISE, FLAT_PRETEXT = 0.3, 0.95  # the same while kNN does not rise
SIGMAS = 2.0


@dataclass(frozen=True)
class Spike:
    """A gradient far larger than those before it.

    It began in the first layer if that jumped before the last block, or with it and further: the instability of MoCo
    v3's study (arXiv:2104.02057, section 4).
    """

    step: int
    ratio: float  # gradient norm relative to the median of the window before
    first_layer_first: bool | None  # None if the gradients of layers are not known


class SpikeDetector:
    """Finds spikes in the gradient norm: steps of more than ``factor`` times the median of `SPIKE_WINDOW` steps before.

    Until there are as many steps, nothing is a spike.
    """

    def __init__(self, factor: float = SPIKE_FACTOR) -> None:
        self.factor = factor
        self.rows: deque[list[float]] = deque(maxlen=SPIKE_WINDOW)
        self.jumps: deque[list[float]] = deque(maxlen=LAG + 1)

    def update(self, step: int, grad_norm: float, layers: Mapping[str, float]) -> Spike | None:
        """Add a step's gradient norm, over all parameters and by layer in forward order; returns a spike or None."""
        row = [grad_norm, *(layers[name] for name in first_and_last(list(layers)))]
        if not all(map(math.isfinite, row)):  # an overflow of fp16, whose step is skipped
            return None
        if self.rows and len(self.rows[0]) != len(row):  # a backbone that was frozen at the start is trained now
            self.rows.clear()
            self.jumps.clear()
        jump = []
        if len(self.rows) == self.rows.maxlen:
            medians = [max(median(column), 1e-30) for column in zip(*self.rows, strict=True)]
            jump = [value / usual for value, usual in zip(row, medians, strict=True)]
            self.jumps.append(jump)
        self.rows.append(row)
        if not jump or jump[0] <= self.factor:
            return None
        return Spike(step, jump[0], self._first_layer_first() if layers else None)

    def _first_layer_first(self) -> bool:
        first, last = (
            next((row for row, jump in enumerate(self.jumps) if jump[layer] > self.factor), len(self.jumps))
            for layer in (1, 2)
        )
        return first < last or (first == last and self.jumps[-1][1] > self.jumps[-1][2])


def first_and_last(layers: Sequence[str]) -> tuple[str, ...]:
    """The first layer and the last block of names such as ``gradient/blocks.3``; empty if there are none."""
    blocks = [name for name in layers if name.rpartition(".")[2].isdigit()]
    return (layers[0], (blocks or layers)[-1]) if layers else ()


@dataclass(frozen=True)
class KnnPoint:
    """A kNN accuracy of the monitor, and the pretext accuracy at that time."""

    epoch: float
    knn: float
    pretext: float | None  # mean since the previous measurement; None for methods without one


def read_curve(metrics: Iterable[Mapping[str, Any]], results: Iterable[Mapping[str, Any]]) -> list[KnnPoint]:
    """The kNN accuracies in the rows of a run's results.jsonl, with the pretext accuracies of its metrics.jsonl.

    Rows without these numbers are ignored.
    """
    pretext = [(step_of(row), each) for row in metrics if (each := number(row.get("accuracy"))) is not None]
    curve, before = [], 0.0
    for row in results:
        knn, epoch = number(row.get("accuracy")), number(row.get("epoch"))
        if row.get("by") == "monitor" and knn is not None and epoch is not None:
            since = [accuracy for step, accuracy in pretext if before < step <= step_of(row)]
            curve.append(KnnPoint(epoch, knn, fmean(since) if since else None))
            before = step_of(row)
    return curve


def collapse_alarm(embedding_std: float, effective_rank: float, dim: int, highest_rank: float = 0.0) -> list[str]:
    """Features of width ``dim`` collapse to a point, to one direction, or to far fewer directions than they had.

    See `sslkit.evaluate.label_free.collapse_metrics` for the numbers. ``highest_rank`` is that of the run so far.
    """
    share, limit = embedding_std * dim**0.5, FALLEN_RANK * highest_rank
    if share < COLLAPSED_STD:
        what = (
            f"all images get almost the same features, whose std is {share:.2g} times that of evenly spread ones "
            f"(alarm below {COLLAPSED_STD:g})"
        )
    elif effective_rank < COLLAPSED_RANK:
        what = (
            f"features vary in a single direction, their effective rank is {effective_rank:.2f} of {dim} "
            f"(alarm below {COLLAPSED_RANK:g})"
        )
    elif effective_rank < limit:
        what = (
            f"features have lost nearly all their directions, their effective rank fell from {highest_rank:.1f} to "
            f"{effective_rank:.1f} (alarm below {limit:.1f}, a tenth)"
        )
    else:
        return []
    return [f"collapse: {what}; try a lower [optim] lr, a slower teacher if there is one, and see `sslkit doctor`"]


def spike_alarm(spikes: Sequence[Spike]) -> list[str]:
    """The gradient norm spiked: the worst spike, the layer it began in, and how many there were."""
    if not spikes:
        return []
    worst = max(spikes, key=lambda spike: spike.ratio)
    began = {
        True: "the first layer moved first, as in MoCo v3's study, so try [backbone] freeze_patch_embed on a ViT",
        False: "the first layer did not move first",
        None: "[monitor] layer_gradients = true shows where it begins",
    }[worst.first_layer_first]
    return [
        f"spike: the gradient norm of step {worst.step} is {worst.ratio:.1f} times the median of the {SPIKE_WINDOW} "
        f"steps before (alarm above {SPIKE_FACTOR:g}; {len(spikes)} such since the last line); {began}; try a lower "
        "[optim] lr, a longer [schedule] warmup_epochs or [train] clip_norm"
    ]


def dip_alarm(curve: Sequence[KnnPoint], test_images: int) -> list[str]:
    """The kNN accuracy fell far below its best, by more than chance allows on so many test images."""
    if not curve:
        return []
    best, now = max(curve, key=lambda point: point.knn), curve[-1]
    threshold = max(DIP, _chance(best.knn, test_images))
    if best.knn - now.knn <= threshold:
        return []
    return [
        f"dip: kNN is {now.knn:.1%} at epoch {now.epoch:g}, {100 * (best.knn - now.knn):.1f} points below its best of "
        f"epoch {best.epoch:g} (alarm above {100 * threshold:.1f}); try a lower [optim] lr or a longer [schedule] "
        f"warmup_epochs, and take the encoder of epoch {best.epoch:g} if it was kept"
    ]


def leak_alarm(
    curve: Sequence[KnnPoint], test_images: int, *, exposed: bool = False, batch_norm: bool = True
) -> list[str]:
    """The pretext accuracy rises while kNN falls, or reaches its maximum while kNN does not move.

    This is the sign of batch statistics that leak the answer (MoCo v1, arXiv:1911.05722, section 3.3 and figure 5).
    Late in a good run kNN is flat too; only if queries and keys share their BatchNorm groups unshuffled (``exposed``)
    is a flat kNN enough. The advice differs for a backbone without ``batch_norm``.
    """
    if not curve or curve[-1].pretext is None:
        return []
    now, pretext = curve[-1], curve[-1].pretext
    for then in curve[:-1]:
        rise = pretext - then.pretext if then.pretext is not None else 0.0
        noise = _chance(then.knn, test_images)
        # While the pretext task is unsolved nothing leaks, and kNN falls for another reason.
        falls = rise > LEAK_RISE and (exposed or pretext > LEAK_PRETEXT)
        falls = falls and now.knn < then.knn + (noise if exposed else -noise)
        flat = rise > FLAT_RISE and pretext > FLAT_PRETEXT and now.knn <= then.knn
        if falls or flat:
            limit = LEAK_RISE if falls else FLAT_RISE
            return [
                f"leak: from epoch {then.epoch:g} to {now.epoch:g} pretext accuracy rose by {100 * rise:.0f} points to "
                f"{pretext:.0%} (alarm above {100 * limit:.0f}) while kNN went from {then.knn:.1%} to {now.knn:.1%}, "
                f"{_why_leaking(exposed, batch_norm)}"
            ]
    return []


def _why_leaking(exposed: bool, batch_norm: bool) -> str:
    if not batch_norm:
        return "as when the pretext task is too easy; try stronger [views] or more negatives"
    remedy = "try [method] bn_groups as in the paper, a backbone without BatchNorm, or stronger [views]"
    if exposed:
        remedy = (
            "queries and keys share their BatchNorm groups in this run, so try [method] shuffle = true, where the "
            "method has it, or one group"
        )
    return f"as when batch statistics leak the answer or the pretext task is too easy; {remedy}"


def teacher_alarm(momentum: float | None) -> list[str]:
    """The teacher is the student itself, or never changes. ``momentum`` is None for methods without a teacher."""
    if momentum not in (0.0, 1.0):
        return []
    what = "the teacher is the student of the previous step" if momentum == 0.0 else "the teacher never moves"
    return [
        f"teacher: with [method] momentum = {momentum:g} {what}; MoCo fails to converge then (arXiv:1911.05722, "
        "section 4.1), try 0.99 to 0.999"
    ]


def data_alarm(sampled: int, different: int, plain: int) -> list[str]:
    """Most images are copies of each other, or of a single colour; see `image_variety.Variety`."""
    if sampled < 2:
        return []
    if 2 * plain >= sampled:
        found = f"{plain} of {sampled} sampled images have a single colour"
    elif different == 1:
        found = f"all {sampled} sampled images are the same"
    elif 2 * different <= sampled:
        found = f"{sampled} sampled images are only {different} different ones"
    else:
        return []
    return [
        f"data: {found} (alarm from a half on), which leaves nothing to tell apart; check [data] path, and list all "
        "copies with `sslkit data check`"
    ]


def _chance(share: float, count: int) -> float:
    """How far two accuracies measured on ``count`` images may differ by chance."""
    return SIGMAS * math.sqrt(2 * share * (1 - share) / count)
