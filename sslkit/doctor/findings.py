"""The result of a check: a verdict and one sentence."""

import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from sslkit.errors import first_line

# As the sentences write them: `set train.batch_size = 32 or more`, `set train.precision = "no"`.
SETTING = re.compile(r'\b(?:set|and) (\w+(?:\.\w+)+) = ("[^"]*"|\[[^\]]*\]|[-+.\w]*\w)')

Verdict = Literal["ok", "warning", "fault", "not applicable"]
LogMessage = Callable[[str], None]


@dataclass(frozen=True)
class Finding:
    """The result of one check; `Check` has a method for each verdict."""

    check: str  # name, the same in every report
    verdict: Verdict
    sentence: str  # what was found and, for a fault or a warning, which key to set to which value


class Check(str):
    """The name of a check, with a method that makes a finding for each verdict."""

    def ok(self, sentence: str) -> Finding:
        """Nothing is wrong."""
        return Finding(self, "ok", sentence)

    def warning(self, sentence: str) -> Finding:
        """The run would work, but a setting is unusual."""
        return Finding(self, "warning", sentence)

    def fault(self, sentence: str) -> Finding:
        """The recipe or the method's code is wrong."""
        return Finding(self, "fault", sentence)

    def not_applicable(self, sentence: str) -> Finding:
        """There is nothing to check, or it could not be checked."""
        return Finding(self, "not applicable", sentence)

    def attempt(self, run: "Callable[[Check], Finding]") -> Finding:
        """Run the check; an exception becomes a finding that says why the check could not be made."""
        try:
            return run(self)
        except (RuntimeError, TypeError, ValueError, AttributeError, LookupError, NotImplementedError) as error:
            return self.not_applicable(f"could not be checked: {describe_error(error)}")


LOADING, MEMORY = Check("data loading"), Check("memory")


@dataclass(frozen=True)
class Report:
    """All findings, in the order of the checks."""

    findings: list[Finding]

    def of(self, verdict: Verdict) -> list[Finding]:
        """The findings with this verdict."""
        return [finding for finding in self.findings if finding.verdict == verdict]

    def costs(self) -> list[Finding]:
        """The forecasts of time and memory, in this order, unless they could not be made."""
        found = {finding.check: finding for finding in self.findings if finding.verdict != "not applicable"}
        return [found[check] for check in (LOADING, MEMORY) if check in found]

    def settings(self) -> list[str]:
        """The settings that faults and warnings advise, ready for ``--set``; of each key the first one."""
        advised: dict[str, str] = {}
        for finding in [*self.of("fault"), *self.of("warning")]:
            for key, value in SETTING.findall(finding.sentence):
                advised.setdefault(key, value)
        return [f"{key}={value}" for key, value in advised.items()]

    def settings_line(self) -> str:
        """`settings` as a line to paste."""
        return "to follow the advice, add: " + " ".join(f"--set {shlex.quote(each)}" for each in self.settings())


def describe_error(error: BaseException) -> str:
    """The type and the first line of an exception."""
    name, line = type(error).__name__, first_line(error, 160)
    return name if line == name else f"{name}: {line}"
