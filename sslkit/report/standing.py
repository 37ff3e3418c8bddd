"""How the encoder of a run stands beside baselines, by the scores in its results.jsonl."""

from collections.abc import Mapping, Sequence
from typing import Any

from sslkit.evaluate.protocol import protocol_hash
from sslkit.files.jsonl_reader import Row, step_of
from sslkit.report.figures import values_of
from sslkit.report.run_record import RunRecord

HOW_TO_COMPARE = "`sslkit eval knn RUN --data DIR`, with labelled images, measures them."

Series = tuple[str, str, str]  # evaluation, data, hash of the protocol


def series_of(row: Mapping[str, Any]) -> Series:
    """Evaluation, data and protocol hash of a score. Rows of older versions of sslkit have an empty hash.

    The hash does not include the number of unreadable images that the monitor left out.
    """
    protocol = row.get("protocol")
    digest = str(row.get("protocol_hash", ""))
    if isinstance(protocol, dict) and "left_out" in protocol:
        digest = protocol_hash({name: value for name, value in protocol.items() if name != "left_out"})
    return str(row.get("evaluation", "accuracy")), str(row.get("data", "")), digest


def baselines_of(row: Row) -> list[Row]:
    """The scores of the baselines beside a score."""
    scores = row.get("scores")
    others = scores[1:] if isinstance(scores, list) else []
    return values_of([each for each in others if isinstance(each, dict)], "accuracy")


def compared_row(rows: Sequence[Row]) -> Row | None:
    """The newest row of results.jsonl that has baselines, of kNN if there is one."""
    compared = [row for row in rows if baselines_of(row)]
    knn = [row for row in compared if str(row.get("evaluation", "")).startswith("knn")]
    return max(reversed(knn or compared), key=step_of, default=None)


def verdicts_of(run: RunRecord) -> list[str]:
    """The verdicts at the newest step that has any, one for each evaluation, each a sentence after its name."""
    judged = [row for row in run.results if isinstance(row.get("verdict"), str) and row["verdict"]]
    newest = max(map(step_of, judged), default=0.0)
    by_series = {series_of(row): row for row in judged if step_of(row) == newest}
    is_old = newest < step_of(run.metrics[-1])
    several = len({row.get("data") for row in by_series.values()}) > 1
    sentences = [
        str(row.get("evaluation", "accuracy"))
        + (f", {row.get('data', '')}" if several else "")
        + (f" (epoch {run.epoch_of(row):.3g} of {run.last_epoch:.3g})" if is_old else "")
        + f": {row['verdict']}"
        for row in by_series.values()
    ]
    return list(dict.fromkeys(sentences))
