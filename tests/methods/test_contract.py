"""All registered methods keep the promises of `contract_checks`, and each promise that is broken is found."""

from typing import Any

import pytest
from methods.contract_checks import CHECKS, MethodCase, failing_checks, make_case
from methods.mutants import MUTANTS, names_of

from sslkit.methods import METHODS, Progress, all_methods
from sslkit.methods.byol import BYOL

CASES: dict[tuple[str, str], MethodCase] = {}


def case_of(name: str, model: str) -> MethodCase:
    if (name, model) not in CASES:
        CASES[name, model] = make_case(name, model)
    return CASES[name, model]


@pytest.mark.full
@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("model", ["test_resnet", "test_vit"])
@pytest.mark.parametrize("name", all_methods())
def test_every_method_keeps_the_contract(name: str, model: str, check: str) -> None:
    CHECKS[check](case_of(name, model))


@pytest.mark.parametrize("name", ["moco_v1", "moco_v2", "end_to_end"])
def test_symmetric_forms_keep_it_too(name: str) -> None:
    assert failing_checks(make_case(name, "test_resnet", symmetric=True)) == []


@pytest.mark.parametrize("options", [{"predictor": False}, {"head_norm": False}, {"momentum": 0.0}, {"momentum": 1.0}])
def test_ablations_keep_it_too(options: dict[str, Any]) -> None:
    assert failing_checks(make_case("moco_v3", "test_resnet", **options)) == []


def test_a_half_life_is_kept_to() -> None:
    assert failing_checks(make_case("byol", "test_resnet", momentum_half_life=1e4)) == []


class TeacherStands(BYOL):
    """A teacher that never moves, although it declares a momentum."""

    def after_update(self, progress: Progress) -> dict[str, float]:
        return {}


def test_a_momentum_that_is_declared_and_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "byol", TeacherStands)
    with pytest.raises(AssertionError, match=r"moves with momentum 1; it declares 0\.99"):
        CHECKS["teacher moves"](make_case("byol", "test_resnet"))
    CHECKS["teacher moves"](make_case("byol", "test_resnet", momentum=1.0))


@pytest.mark.parametrize("name", names_of("tests"))
def test_an_error_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant = MUTANTS[name]
    monkeypatch.setitem(METHODS, mutant.replaces, mutant.method)
    case = make_case(mutant.replaces, "test_resnet")
    with pytest.raises(AssertionError):
        CHECKS[mutant.check](case)
