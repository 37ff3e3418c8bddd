"""Judge the start before training and its points after, with the same images."""

import math
import time
from collections.abc import Callable
from pathlib import Path

from sslkit.adapt.adapted_points import Point
from sslkit.adapt.answer import KNN, PROBE, Answer, Use
from sslkit.adapt.candidates import Candidate, Comparison, best, candidates_of, compare_encoders
from sslkit.adapt.judged_images import JudgedImages, open_judged, pixel_digests
from sslkit.adapt.judging_cost import JudgingCost
from sslkit.adapt.label_free_verdict import (
    CAVEAT,
    CHOOSING,
    NOISE,
    compare_measures,
    label_free_measures,
    neighbour_correlation,
    seems_gained,
)
from sslkit.adapt.start_weights import Start, at_size
from sslkit.data.sources.image_source import DataConfig, ImageSource
from sslkit.errors import UserError
from sslkit.evaluate.features.encoder import Encoder
from sslkit.evaluate.features.readouts import Readout
from sslkit.evaluate.features.store import FeatureStore
from sslkit.text import format_duration, pluralize

LogMessage = Callable[[str], None]
COMPARED = 20_000  # images of --data whose pixels are compared with those of --labelled
FEW = 300  # judged images below which the smallest visible difference is told


class Judge:
    """Judges encoders by labels, or without them.

    Args:
        source: The images that are trained on.
        labelled: Labelled images; None for none.
        retain: A second labelled set; None for none.
        store: Folder for the untouched encoder's features, so that the same command does not extract them again.
        log_message: Called with a line of text at each stage.

    Raises:
        UserError: A labelled set cannot be used.
    """

    def __init__(
        self,
        source: ImageSource,
        labelled: DataConfig | None,
        retain: DataConfig | None,
        store: Path,
        log_message: LogMessage,
    ) -> None:
        self.source, self.log_message, self.readout = source, log_message, Readout()
        self.stored = Readout(store=FeatureStore(store))
        self.judged = open_judged(labelled, "--labelled") if labelled else None
        self.retained = open_judged(retain, "--retain") if retain else None
        self.cost = JudgingCost(store)
        self.starts: dict[int, Encoder] = {}
        self.candidates: list[Candidate] = []
        self.compares_sizes = True
        self.start_measures: dict[str, float | None] = {}
        self.measuring = 0.0  # seconds for the measures without labels

    @property
    def description(self) -> str:
        """Of the images that the verdict is given on."""
        return self.judged.description if self.judged else self.source.description

    def judge_start(
        self,
        start: Start,
        sizes: list[int],
        required: int = 0,
        limit: float = math.inf,
        *,
        compares_sizes: bool = True,
    ) -> int:
        """Judge the untouched encoder at some sizes; returns the ``required`` one if there is, else the best.

        Without labels, the best is the smallest that the encoder takes. Sizes after the first, other than the required
        one, are judged only if each takes less than ``limit`` seconds. ``compares_sizes`` says whether the end is
        compared with the start at all of them, or at its own size.

        Raises:
            UserError: The encoder takes images of none of the sizes.
        """
        self.compares_sizes = compares_sizes
        for size in sizes:
            encoder = at_size(start.encoder, size)
            if encoder is None or (self.starts and size != required and self._is_too_dear(size, limit)):
                continue
            self.starts[size] = encoder
            if self.judged is None:
                break
            if not self.candidates:
                self.log_message(f"kNN accuracy on {self.judged.description}:")
            with self.cost.measuring(size, self.judged.count):
                found = candidates_of(encoder, 0, self.judged, self.stored)
            self.candidates += found
            self._log(found)
        if not self.starts or (required and required not in self.starts):
            raise UserError(
                f"--size: {start.encoder.description} does not take images of {required or sizes[0]} pixels"
            )
        if self.judged:
            return required or best([each for each in self.candidates if not each.whitened]).size
        size, begin = required or next(iter(self.starts)), time.monotonic()
        self.log_message("measuring the start without labels")
        self.start_measures = label_free_measures(self.starts[size], self.source)
        self.measuring = time.monotonic() - begin
        return size

    def _is_too_dear(self, size: int, limit: float) -> bool:
        """Whether judging at a size is left out; says so."""
        seconds = self.cost.expected(size, self.judged.count) if self.judged else 0.0
        if seconds <= limit:
            return False
        self.log_message(f"  not judged at {size} px: it would take about {format_duration(seconds)}")
        return True

    def seconds_at_end(self, size: int, points: int) -> float:
        """What judging will take after training, without the linear probes."""
        if self.judged is None:
            return points * self.measuring
        seconds = points * self.cost.expected(size, self.judged.count)
        if self.retained:
            sizes = [size, *sorted({each.size for each in self._starts(size)})]
            seconds += sum(self.cost.expected(each, self.retained.count) for each in sizes)
        return seconds

    def _starts(self, size: int) -> list[Candidate]:
        """The uses of the untouched encoder that the end is compared with."""
        return [each for each in self.candidates if each.size == size or self.compares_sizes]

    def start_at(self, size: int) -> Encoder:
        """The untouched encoder for images of a size that was judged."""
        return self.starts[size]

    def judge_end(self, points: list[Point], size: int) -> tuple[Answer, Point]:
        """Judge the points of the run; returns the answer, and the point that it chose."""
        if self.judged is None:
            return self._without_labels(points, size)
        ends: list[Candidate] = []
        for point in points:
            found = candidates_of(point.encoder, point.epoch, self.judged, self.readout)
            ends += found
            self._log(found)
        starts = self._starts(size)
        comparisons = compare_encoders(self.judged, starts, ends)
        gained = comparisons[KNN].difference.is_better and not comparisons[PROBE].difference.is_worse
        # With few images the many uses of the start may have been chosen badly, each by its fifths.
        gained &= best(ends).merit > best(starts).merit
        chosen = next(point for point in points if point.epoch == best(ends).epoch)
        answer = Answer(
            gained,
            size if gained else best(starts).size,
            chosen.epoch,
            comparisons,
            self._compare_retained(starts, chosen),
            uses=[Use.of(each) for each in (*self.candidates, *ends)],
            remarks=self._remarks(self.judged, comparisons),
            hints=self._hints(best(ends if gained else starts)),
            better_start=self._better_start(starts, best(ends if gained else starts)),
        )
        return answer, chosen

    def _compare_retained(self, starts: list[Candidate], chosen: Point) -> list[Comparison]:
        """The chosen point on the retained images, against the start at the same sizes as on the target."""
        if self.retained is None:
            return []
        self.log_message(f"kNN accuracy on {self.retained.description}:")
        before = []
        for size in sorted({each.size for each in starts}):
            before += candidates_of(self.starts[size], 0, self.retained, self.stored)
        after = candidates_of(chosen.encoder, chosen.epoch, self.retained, self.readout)
        self._log([*before, *after])
        return compare_encoders(self.retained, before, after)

    def _without_labels(self, points: list[Point], size: int) -> tuple[Answer, Point]:
        self.log_message("measuring the end without labels")
        measures = {point.epoch: label_free_measures(point.encoder, self.source) for point in points}
        chosen = max(points, key=lambda point: measures[point.epoch][CHOOSING] or 0.0)
        comparisons = compare_measures(self.start_measures, measures[chosen.epoch])
        noise = self._noise()
        gained = seems_gained(comparisons) and not noise
        return Answer(gained, size, chosen.epoch, label_free=comparisons, remarks=[*noise, CAVEAT]), chosen

    def _log(self, found: list[Candidate]) -> None:
        for each in found:
            self.log_message(f"  kNN {each.accuracy:.1%}: {each.name}")

    def _noise(self) -> list[str]:
        correlation = neighbour_correlation(self.source)
        if correlation >= NOISE:
            return []
        return [
            f"The images of --data look like noise: neighbouring pixels are unrelated (correlation {correlation:.2f}). "
            "Nothing can be learned from them"
        ]

    def _remarks(self, judged: JudgedImages, comparisons: list[Comparison]) -> list[str]:
        remarks = self._noise()
        seen = set(pixel_digests(self.source.subset(self.source.sample(min(COMPARED, len(self.source)), 0))))
        if shared := sum(digest in seen for digest in judged.digests):
            remarks.append(_shared(shared, judged.count))
        if judged.copied:
            remarks.append(
                f"{pluralize(judged.copied, 'labelled image')} left out as copies of others: "
                f"{pluralize(judged.count, 'different image')} judged"
            )
        if judged.count < FEW:
            low, high = comparisons[KNN].difference.low, comparisons[KNN].difference.high
            remarks.append(
                f"With {pluralize(judged.count, 'judged image')} a difference below {(high - low) / 2:.1f} points "
                "cannot be seen"
            )
        return remarks

    def _hints(self, used: Candidate) -> list[str]:
        """How to use what is handed back better at no cost."""
        if not used.whitened:
            return []
        return [
            f"Its features are best whitened ({used.accuracy:.1%}): sslkit.evaluate.features.whitening.whiten, see "
            "docs/adapt.md"
        ]

    def _better_start(self, starts: list[Candidate], used: Candidate) -> str:
        """The untouched encoder at another size, if it is better than what is handed back."""
        others = [each for each in self.candidates if each not in starts and each.accuracy > used.accuracy]
        if not others:
            return ""
        other = best(others)
        whitened = ", whitened," if other.whitened else ""
        return (
            f"the untouched encoder at {other.size} pixels{whitened} has {other.accuracy:.1%}: use --size {other.size}"
        )


def _shared(shared: int, count: int) -> str:
    """What it means that some of the judged images were trained on, in proportion."""
    sentence = (
        f"{shared} of the {pluralize(count, 'judged image')} are images of --data: training saw them, without labels"
    )
    if shared == count:
        return f"{sentence}. The verdict holds for these images; for new ones, judge on images that are not trained on"
    if 2 * shared >= count:
        return f"{sentence}. For the verdict on new images, leave these out of --labelled"
    return f"{sentence}; it did not see the other {count - shared}"
