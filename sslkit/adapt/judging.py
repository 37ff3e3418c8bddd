"""Judge the start before training and its points after, with the same images."""

from collections.abc import Callable

from sslkit.adapt.adapted_points import Point
from sslkit.adapt.answer import KNN, PROBE, Answer, Use
from sslkit.adapt.candidates import Candidate, Comparison, best, candidates_of, compare_encoders
from sslkit.adapt.judged_images import JudgedImages, open_judged, pixel_digests
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
from sslkit.text import pluralize

LogMessage = Callable[[str], None]
COMPARED = 20_000  # images of --data whose pixels are compared with those of --labelled
FEW = 300  # judged images below which the smallest visible difference is told


class Judge:
    """Judges encoders by labels, or without them.

    Args:
        source: The images that are trained on.
        labelled: Labelled images; None for none.
        retain: A second labelled set; None for none.
        log_message: Called with a line of text at each stage.

    Raises:
        UserError: A labelled set cannot be used.
    """

    def __init__(
        self, source: ImageSource, labelled: DataConfig | None, retain: DataConfig | None, log_message: LogMessage
    ) -> None:
        self.source, self.log_message, self.readout = source, log_message, Readout()
        self.judged = open_judged(labelled, "--labelled") if labelled else None
        self.retained = open_judged(retain, "--retain") if retain else None
        self.starts: dict[int, Encoder] = {}
        self.candidates: list[Candidate] = []
        self.fixed = 0

    @property
    def description(self) -> str:
        """Of the images that the verdict is given on."""
        return self.judged.description if self.judged else self.source.description

    def judge_start(self, start: Start, sizes: list[int], *, fixed: int = 0) -> int:
        """Judge the untouched encoder at some sizes; returns the ``fixed`` one if there is, else the best.

        Without labels, the best is the smallest that the encoder takes.

        Raises:
            UserError: The encoder takes images of none of the sizes.
        """
        self.fixed = fixed
        for size in sizes:
            encoder = at_size(start.encoder, size)
            if encoder is None:
                continue
            self.starts[size] = encoder
            if self.judged is None:
                break
            found = candidates_of(encoder, 0, self.judged, self.readout)
            self.candidates += found
            self._log(found)
        if not self.starts or (fixed and fixed not in self.starts):
            raise UserError(f"--size: {start.encoder.description} does not take images of {fixed or sizes[0]} pixels")
        if fixed or not self.judged:
            return fixed or next(iter(self.starts))
        return best([each for each in self.candidates if not each.whitened]).size

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
        starts = [each for each in self.candidates if each.size == size or not self.fixed]
        comparisons = compare_encoders(self.judged, starts, ends)
        gained = comparisons[KNN].difference.is_better and not comparisons[PROBE].difference.is_worse
        # With few images the many uses of the start may have been chosen badly, each by its fifths.
        gained &= bool(best(ends).choosing.mean() > best(starts).choosing.mean())
        chosen = next(point for point in points if point.epoch == best(ends).epoch)
        retained = []
        if self.retained:
            pair = self.starts[size], chosen.encoder
            before, after = (candidates_of(each, 0, self.retained, self.readout)[:1] for each in pair)
            retained = compare_encoders(self.retained, before, after)
        answer = Answer(
            gained,
            size if gained else best(starts).size,
            chosen.epoch,
            comparisons,
            retained,
            uses=[Use.of(each) for each in (*self.candidates, *ends)],
            remarks=self._remarks(self.judged, comparisons),
            hints=self._hints(starts, ends, gained=gained),
        )
        return answer, chosen

    def _without_labels(self, points: list[Point], size: int) -> tuple[Answer, Point]:
        self.log_message("measuring start and end without labels")
        measures = {point.epoch: label_free_measures(point.encoder, self.source) for point in points}
        start = label_free_measures(self.starts[size], self.source)
        chosen = max(points, key=lambda point: measures[point.epoch][CHOOSING] or 0.0)
        comparisons = compare_measures(start, measures[chosen.epoch])
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
            remarks.append(
                f"{shared} of the {pluralize(judged.count, 'judged image')} are images of --data: training saw them, "
                "without their labels. The verdict holds for these images; for new ones, judge on images that are not "
                "trained on"
            )
        if judged.copied:
            remarks.append(
                f"{pluralize(judged.copied, 'judged image')} of {judged.count} have copies; no image is classified by "
                "its copies"
            )
        if judged.count < FEW:
            low, high = comparisons[KNN].difference.low, comparisons[KNN].difference.high
            remarks.append(
                f"With {pluralize(judged.count, 'judged image')} a difference below {(high - low) / 2:.1f} points "
                "cannot be seen"
            )
        return remarks

    def _hints(self, starts: list[Candidate], ends: list[Candidate], *, gained: bool) -> list[str]:
        """What costs nothing and is better than what is handed back."""
        used = best(ends if gained else starts)
        hints = []
        if used.whitened:
            hints.append(
                f"Its features are best whitened ({used.accuracy:.1%}): "
                "sslkit.evaluate.features.whitening.whiten, see docs/adapt.md"
            )
        others = [each for each in self.candidates if each not in starts and each.accuracy > used.accuracy]
        if others:
            other = best(others)
            whitened = ", whitened," if other.whitened else ""
            hints.append(
                f"The untouched encoder at {other.size} pixels{whitened} has {other.accuracy:.1%}: "
                f"use --size {other.size}"
            )
        return hints
