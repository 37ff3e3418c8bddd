"""The answer of an adaptation, as data and as text."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from sslkit.adapt.candidates import Candidate, Comparison
from sslkit.adapt.label_free_verdict import LabelFreeComparison
from sslkit.text import pluralize

KNN, PROBE = 0, 1  # positions in a list of comparisons


@dataclass(frozen=True)
class Use:
    """An encoder at an input size, and its kNN accuracy on the judged images."""

    name: str
    epoch: int  # 0: the start
    size: int
    whitened: bool
    accuracy: float

    @staticmethod
    def of(candidate: Candidate) -> "Use":
        """Of a candidate."""
        return Use(candidate.name, candidate.epoch, candidate.size, candidate.whitened, candidate.accuracy)


@dataclass(frozen=True)
class Answer:
    """What the adaptation found.

    Attributes:
        gained: Whether the adapted encoder is better than the start; it is written then.
        size: Side of the input in pixels, of the encoder that is written.
        epoch: Point of the run that was chosen.
        comparisons: On the labelled images: kNN, then the linear probe. Empty without labels.
        retained: The same on the images of ``--retain``.
        label_free: Measures without labels; only if there are none.
        uses: Every use of the encoder that was judged by kNN.
        remarks: Sentences on what the answer is worth.
        hints: Sentences on what is better and costs nothing.
        better_start: The untouched encoder at another size, if it is better than what is written: the end of a
            sentence.
    """

    gained: bool
    size: int
    epoch: int
    comparisons: list[Comparison] = field(default_factory=list)
    retained: list[Comparison] = field(default_factory=list)
    label_free: list[LabelFreeComparison] = field(default_factory=list)
    uses: list[Use] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    hints: list[str] = field(default_factory=list)
    better_start: str = ""

    @property
    def verdict(self) -> str:
        """One sentence."""
        return f"{self._found}. But {self.better_start}" if self.better_start else self._found

    @property
    def _found(self) -> str:
        if not self.comparisons:
            kept = f"the encoder of epoch {self.epoch} is kept" if self.gained else "encoder/ holds the start"
            return f"Without labels it is not known whether training helped. By the measures above, {kept}"
        knn, probe = (self.comparisons[each].difference for each in (KNN, PROBE))
        if self.gained:
            return f"Adapted: {knn} than the start by kNN on {pluralize(knn.images, 'image')}"
        if not knn.is_better:
            return f"Nothing gained: {knn} by kNN on {pluralize(knn.images, 'image')}; encoder/ holds the start"
        if probe.is_worse:
            return f"kNN is {knn}, but the linear probe is {probe}: encoder/ holds the start"
        return (
            f"kNN is {knn}, but on the images that choose, the start is as good as any point: encoder/ holds the start"
        )

    def lines(self) -> list[str]:
        """The answer as text, the verdict last."""
        lines = [f"target, {each}" for each in self.comparisons]
        lines += [f"retained, {each}" for each in self.retained]
        lines += [str(each) for each in self.label_free]
        if any(each.difference.is_worse for each in self.retained):
            lines.append("The adapted encoder has forgotten: it is worse on the images of --retain")
        return [*lines, *self.remarks, *self.hints, self.verdict]

    def as_dict(self) -> dict[str, Any]:
        """All fields as plain data."""
        return {"verdict": self.verdict, **dataclasses.asdict(self)}

    def results(self, step: int, data: str) -> list[dict[str, Any]]:
        """Rows of results.jsonl of the run, at the chosen ``step``: one for each comparison."""
        rows = []
        for name, found in (("target", self.comparisons), ("retained", self.retained)):
            for each in found:
                scores = [{"encoder": "adapted", "accuracy": each.end}, {"encoder": "start", "accuracy": each.start}]
                row = {"step": step, "by": "adapt", "evaluation": f"adapt {each.measure}, {name}", "data": data}
                rows.append(
                    row | {"accuracy": each.end, "difference": dataclasses.asdict(each.difference), "scores": scores}
                )
        return rows
