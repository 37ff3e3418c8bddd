"""The register of methods with one error each, and of the check that must find it."""

from dataclasses import dataclass
from typing import Any, Literal

from sslkit.methods import Method

FoundBy = Literal["doctor", "tests"]


@dataclass(frozen=True)
class Mutant:
    """A method with one error.

    Attributes:
        method: The class.
        replaces: Name of the registered method that it replaces.
        found_by: ``doctor``: `sslkit doctor` must find the error. ``tests``: `contract_checks` must.
        check: Name of the check that finds it.
    """

    method: type[Method]
    replaces: str
    found_by: FoundBy
    check: str


MUTANTS: dict[str, Mutant] = {}


def breaks(replaces: str, found_by: FoundBy, check: str) -> Any:
    def add(method: type[Method]) -> type[Method]:
        MUTANTS[method.__name__] = Mutant(method, replaces, found_by, check)
        return method

    return add


def names_of(found_by: FoundBy) -> list[str]:
    """The mutants that one of the two must find."""
    return [name for name, mutant in MUTANTS.items() if mutant.found_by == found_by]
