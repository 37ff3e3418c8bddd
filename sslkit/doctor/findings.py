"""The result of a check: a verdict and one sentence."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["ok", "warning", "fault", "not applicable"]
LogMessage = Callable[[str], None]


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        check: Name of the check, the same in every report.
        verdict: ``fault``: the recipe or the method's code is wrong. ``warning``: the run would work, but a setting is
            unusual. ``not applicable``: there is nothing to check, or it could not be checked; the sentence says which.
        sentence: What was found and, for a fault or a warning, which key to set to which value.
    """

    check: str
    verdict: Verdict
    sentence: str


@dataclass(frozen=True)
class Report:
    """All findings, in the order of the checks."""

    findings: list[Finding]

    def of(self, verdict: Verdict) -> list[Finding]:
        """The findings with this verdict."""
        return [finding for finding in self.findings if finding.verdict == verdict]


def ok(check: str, sentence: str) -> Finding:
    """A finding: nothing is wrong."""
    return Finding(check, "ok", sentence)


def warning(check: str, sentence: str) -> Finding:
    """A finding: the run would work, but a setting is unusual."""
    return Finding(check, "warning", sentence)


def fault(check: str, sentence: str) -> Finding:
    """A finding: the recipe or the method's code is wrong."""
    return Finding(check, "fault", sentence)


def not_applicable(check: str, sentence: str) -> Finding:
    """A finding: there is nothing to check, or it could not be checked."""
    return Finding(check, "not applicable", sentence)


def fault_if_any(check: str, problems: Sequence[str], otherwise: str) -> Finding:
    """A fault that lists the problems, or ok if there are none."""
    return fault(check, "; ".join(problems)) if problems else ok(check, otherwise)


def attempt(check: str, run: Callable[[], Finding]) -> Finding:
    """Run a check; an exception becomes a finding that says why the check could not be made."""
    try:
        return run()
    except (RuntimeError, TypeError, ValueError, AttributeError, LookupError, NotImplementedError) as error:
        return not_applicable(check, f"could not be checked: {first_line(error)}")


def first_line(error: BaseException) -> str:
    """The type and the first line of an exception."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:160]}" if text else type(error).__name__
