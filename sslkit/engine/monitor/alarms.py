"""When a run is in trouble, judged from its curves: one plain sentence with the number, its threshold and a cure.

Each sentence opens with its kind and a colon: data, collapse, spike, dip, leak, teacher. Thresholds lie well outside
of what healthy runs show (docs/diagnostics.md has the figures), so that an alarm is worth a look.
"""

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from sslkit.files.jsonl_reader import number, step_of

COLLAPSED_STD = 0.05  # as a share of 1 / sqrt(D); healthy runs: 0.12 and more
COLLAPSED_RANK = 2.0  # healthy runs: 5 and more
FALLEN_RANK = 0.1  # of the run's highest; healthy runs: 0.38 and more
SPIKE_FACTOR, SPIKE_WINDOW = 5.0, 20
AHEAD = 3  # rows; in MoCo v3's study the last layers follow the first by a couple of iterations
DIP = 0.03
LEAK_RISE, HALF = 0.1, 0.5
SOLVED, FLAT_RISE = 0.95, 0.3
SIGMAS = 2.0


@dataclass(frozen=True)
class Spike:
    """A gradient far larger than those before it.

    Attributes:
        step: Where.
        ratio: Its norm over the median of the window before.
        first_layer_first: Whether the first layer's gradient jumped before the last block's, or with it and further:
            the instability of MoCo v3's study (arXiv:2104.02057, section 4). None if layers are not logged.
    """

    step: int
    ratio: float
    first_layer_first: bool | None


class SpikeWatch:
    """Finds spikes in a gradient norm as it comes.

    Args:
        factor: A spike is over so many times the median of the window.
        window: Rows before it; until there are as many, nothing is a spike.
    """

    def __init__(self, factor: float = SPIKE_FACTOR, window: int = SPIKE_WINDOW) -> None:
        self.factor = factor
        self.rows: deque[list[float]] = deque(maxlen=window)
        self.jumps: deque[list[float]] = deque(maxlen=AHEAD + 1)

    def see(self, step: int, grad_norm: float, layers: Mapping[str, float]) -> Spike | None:
        """Take the next row: the whole norm, and the norms by layer in the order of the forward pass, or none.

        Returns:
            The spike that this row is, if it is one.
        """
        row = [grad_norm, *(layers[name] for name in first_and_last(list(layers)))]
        if not all(map(math.isfinite, row)):  # an overflow of fp16, whose step is skipped
            return None
        if self.rows and len(self.rows[0]) != len(row):  # a backbone that rested at the start has begun to learn
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
        onsets = []
        for layer in (1, 2):
            over = [row for row, jump in enumerate(self.jumps) if jump[layer] > self.factor]
            onsets.append(over[0] if over else len(self.jumps))
        first, last = onsets
        return first < last or (first == last and self.jumps[-1][1] > self.jumps[-1][2])


def first_and_last(layers: Sequence[str]) -> tuple[str, ...]:
    """First layer and last block of names such as ``gradient/blocks.3``; nothing of none."""
    blocks = [name for name in layers if name.rpartition(".")[2].isdigit()]
    return (layers[0], (blocks or layers)[-1]) if layers else ()


def find_spikes(
    metrics: Iterable[Mapping[str, Any]], factor: float = SPIKE_FACTOR, window: int = SPIKE_WINDOW
) -> list[Spike]:
    """Every spike in the rows of a metrics.jsonl; a row is a step if ``[train] log_every`` is 1.

    A row without a gradient norm that is a number is passed over.
    """
    watch = SpikeWatch(factor, window)
    found = []
    for row in metrics:
        norm, layers = (
            number(row.get("grad_norm")),
            {name: number(row[name]) for name in row if name[:9] == "gradient/"},
        )
        if norm is not None:
            found.append(watch.see(int(step_of(row)), norm, {name: each or math.nan for name, each in layers.items()}))
    return [spike for spike in found if spike is not None]


def dip_score(accuracies: Sequence[float]) -> float:
    """How far a curve fell below its running best, at its worst; 0 for one that never fell."""
    best, worst = -math.inf, 0.0
    for accuracy in accuracies:
        best = max(best, accuracy)
        worst = max(worst, best - accuracy)
    return worst


@dataclass(frozen=True)
class Measured:
    """A measurement of the kNN monitor, and the pretext task by then.

    Attributes:
        epoch: When.
        knn: Share of the test images classified right.
        pretext: Mean pretext accuracy since the measurement before; None for methods that have none.
    """

    epoch: float
    knn: float
    pretext: float | None


def read_curve(metrics: Iterable[Mapping[str, Any]], results: Iterable[Mapping[str, Any]]) -> list[Measured]:
    """The monitor's measurements in the rows of a run's results.jsonl, beside those of its metrics.jsonl.

    Rows that lack one of these numbers are passed over.
    """
    pretext = [(step_of(row), each) for row in metrics if (each := number(row.get("accuracy"))) is not None]
    curve, before = [], 0.0
    for row in results:
        knn, epoch = number(row.get("accuracy")), number(row.get("epoch"))
        if row.get("by") == "monitor" and knn is not None and epoch is not None:
            since = [accuracy for step, accuracy in pretext if before < step <= step_of(row)]
            curve.append(Measured(epoch, knn, fmean(since) if since else None))
            before = step_of(row)
    return curve


def collapse_alarm(embedding_std: float, effective_rank: float, dim: int, highest_rank: float = 0.0) -> list[str]:
    """Whether features are about one point, in one direction, or in far fewer directions than they were.

    Args:
        embedding_std: See `sslkit.evaluate.label_free.collapse_metrics.embedding_std`.
        effective_rank: See `sslkit.evaluate.label_free.collapse_metrics.effective_rank`.
        dim: Width of the features.
        highest_rank: The run's highest effective rank so far, of as many images; 0 where there is none.
    """
    cure = "try a lower [optim] lr, a slower teacher if there is one, and see `sslkit doctor`"
    share = embedding_std * dim**0.5
    if share < COLLAPSED_STD:
        return [
            f"collapse: all images get almost the same features, whose std is {share:.2g} times that of evenly spread "
            f"ones (alarm below {COLLAPSED_STD:g}); {cure}"
        ]
    if effective_rank < COLLAPSED_RANK:
        return [
            f"collapse: features vary in a single direction, their effective rank is {effective_rank:.2f} of {dim} "
            f"(alarm below {COLLAPSED_RANK:g}); {cure}"
        ]
    limit = FALLEN_RANK * highest_rank
    if effective_rank < limit:
        return [
            f"collapse: features have lost nearly all their directions, their effective rank fell from "
            f"{highest_rank:.1f} to {effective_rank:.1f} (alarm below {limit:.1f}, a tenth); {cure}"
        ]
    return []


def spike_alarm(spikes: Sequence[Spike], factor: float = SPIKE_FACTOR, window: int = SPIKE_WINDOW) -> list[str]:
    """The worst of some spikes, where it began, and how many there were."""
    if not spikes:
        return []
    worst = max(spikes, key=lambda spike: spike.ratio)
    began = {
        True: "the first layer moved first, as in MoCo v3's study, so try [backbone] freeze_patch_embed on a ViT",
        False: "the first layer did not move first",
        None: "[monitor] layer_gradients = true shows where it begins",
    }[worst.first_layer_first]
    return [
        f"spike: the gradient norm of step {worst.step} is {worst.ratio:.1f} times the median of the {window} steps "
        f"before (alarm above {factor:g}; {len(spikes)} such since the last line); {began}; try a lower [optim] lr, a "
        "longer [schedule] warmup_epochs or [train] clip_norm"
    ]


def dip_alarm(curve: Sequence[Measured], test_images: int) -> list[str]:
    """Whether kNN has just fallen far below its best, more than chance on so many test images allows."""
    if not curve:
        return []
    best = max(curve, key=lambda point: point.knn)
    now = curve[-1]
    threshold = max(DIP, _chance(best.knn, test_images))
    if best.knn - now.knn <= threshold:
        return []
    return [
        f"dip: kNN is {now.knn:.1%} at epoch {now.epoch:g}, {100 * (best.knn - now.knn):.1f} points below its best of "
        f"epoch {best.epoch:g} (alarm above {100 * threshold:.1f}); try a lower [optim] lr or a longer [schedule] "
        f"warmup_epochs, and take the encoder of epoch {best.epoch:g} if it was kept"
    ]


def leak_alarm(
    curve: Sequence[Measured], test_images: int, *, exposed: bool = False, batch_norm: bool = True
) -> list[str]:
    """Whether the pretext task is solved ever better while kNN falls, or is solved and kNN never moved.

    That is what leaking batch statistics look like (MoCo v1, arXiv:1911.05722, section 3.3 and figure 5). Late in a
    good run kNN is flat too; so where statistics cannot leak, only an extreme rise counts.

    Args:
        curve: So far.
        test_images: How many kNN was measured on.
        exposed: Queries and keys share their BatchNorm groups, unshuffled: a flat kNN is enough.
        batch_norm: Whether the backbone has BatchNorm at all; without it statistics are not to blame.
    """
    if not curve:
        return []
    now = curve[-1]
    if now.pretext is None:
        return []
    for then in curve[:-1]:
        rise = now.pretext - then.pretext if then.pretext is not None else 0.0
        noise = _chance(then.knn, test_images)
        # A task that stays unsolved gives nothing away: kNN then falls for another reason.
        telling = rise > LEAK_RISE and (exposed or now.pretext > HALF)
        falls = telling and now.knn < then.knn + (noise if exposed else -noise)
        flat = rise > FLAT_RISE and now.pretext > SOLVED and now.knn <= then.knn
        if falls or flat:
            limit = LEAK_RISE if falls else FLAT_RISE
            return [
                f"leak: from epoch {then.epoch:g} to {now.epoch:g} pretext accuracy rose by {100 * rise:.0f} points to "
                f"{now.pretext:.0%} (alarm above {100 * limit:.0f}) while kNN went from {then.knn:.1%} to "
                f"{now.knn:.1%}, {_why_leaking(exposed, batch_norm)}"
            ]
    return []


def teacher_alarm(momentum: float | None) -> list[str]:
    """Whether the teacher is none: the student itself, or random weights for ever. None: the method has no such."""
    if momentum not in (0.0, 1.0):
        return []
    what = "the teacher is the student of the step before" if momentum == 0.0 else "the teacher never moves"
    return [
        f"teacher: with [method] momentum = {momentum:g} {what}; MoCo fails to converge so (arXiv:1911.05722, section "
        "4.1), try 0.99 to 0.999"
    ]


def data_alarm(looked_at: int, different: int, plain: int) -> list[str]:
    """Whether images are mostly copies of each other, or of one colour; see `image_variety.Variety`."""
    if looked_at < 2:
        return []
    found = ""
    if 2 * plain >= looked_at:
        found = f"{plain} of {looked_at} images looked at are of one colour each"
    elif different == 1:
        found = f"all {looked_at} images looked at are the same picture"
    elif 2 * different <= looked_at:
        found = f"{looked_at} images looked at are only {different} different pictures"
    if not found:
        return []
    return [
        f"data: {found} (alarm from a half on), so that there is nothing to tell apart; look at [data] path, and see "
        "all copies by `sslkit data check`"
    ]


def _why_leaking(exposed: bool, batch_norm: bool) -> str:
    if not batch_norm:
        return "as when the task is too easy; try stronger [views] or more negatives"
    why = "as when batch statistics give the answer away or the task is too easy"
    if exposed:
        return (
            f"{why}; queries and keys share their BatchNorm groups in this run, so try [method] shuffle = true, where "
            "the method has it, or one group"
        )
    return f"{why}; try [method] bn_groups as in the paper, a backbone without BatchNorm, or stronger [views]"


def _chance(share: float, count: int) -> float:
    """How far two shares measured on ``count`` images may lie apart by chance."""
    return SIGMAS * math.sqrt(2 * share * (1 - share) / count)
