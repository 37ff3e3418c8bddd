"""What an examination says: a verdict and one plain sentence for each check."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["ok", "warning", "fault", "not applicable"]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Finding:
    """One check's result.

    Attributes:
        check: The check's name, the same in every report.
        verdict: ``fault``: the wiring is broken. ``warning``: it will run, and something speaks against it.
            ``not applicable``: there is nothing to check here, or it could not be checked; the sentence says which.
        sentence: What was seen and, unless all is well, what would be right.
    """

    check: str
    verdict: Verdict
    sentence: str


@dataclass(frozen=True)
class Report:
    """Everything that was found, in the order of the checks."""

    findings: list[Finding]

    def of(self, verdict: Verdict) -> list[Finding]:
        """The findings of one verdict."""
        return [finding for finding in self.findings if finding.verdict == verdict]


def ok(check: str, sentence: str) -> Finding:
    """All is well."""
    return Finding(check, "ok", sentence)


def warning(check: str, sentence: str) -> Finding:
    """It runs, and something speaks against it."""
    return Finding(check, "warning", sentence)


def fault(check: str, sentence: str) -> Finding:
    """The wiring is broken."""
    return Finding(check, "fault", sentence)


def not_applicable(check: str, sentence: str) -> Finding:
    """Nothing to check, or no way to."""
    return Finding(check, "not applicable", sentence)


def judge(check: str, complaints: Iterable[str], praise: str) -> Finding:
    """A fault if there is any complaint, else ok."""
    found = list(complaints)
    return fault(check, "; ".join(found)) if found else ok(check, praise)


def attempt(check: str, examine: Callable[[], Finding]) -> Finding:
    """Run a check; where a method is built otherwise than the check expects, say that it could not be made."""
    try:
        return examine()
    except (RuntimeError, TypeError, ValueError, AttributeError, LookupError, NotImplementedError) as error:
        return not_applicable(check, f"could not be checked on this method: {first_line(error)}")


def first_line(error: BaseException) -> str:
    """An exception in a few words."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:160]}" if text else type(error).__name__
