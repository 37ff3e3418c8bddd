"""The checks of a training step: errors of methods are found, and sound methods get no fault."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import small_recipe
from methods.mutants import MUTANTS, names_of
from torch import nn

from sslkit.data.sources.image_source import ImageSource, open_source
from sslkit.doctor.findings import Finding
from sslkit.doctor.image_checks import ImageSummary
from sslkit.doctor.run_checks import check_method
from sslkit.doctor.training_checks import CONTRACT, FIRST_LOSS, GRADIENT, LEAK, STEP, VIEWS_USED
from sslkit.methods import METHODS, BatchInfo, Features, Method, MethodOptions, Progress, Step, Views
from sslkit.methods.byol import BYOL
from sslkit.recipe.resolve import Recipe, build_recipe

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "plugin" / "simsiam.py"
TRAINING_CHECKS = (STEP, GRADIENT, VIEWS_USED, FIRST_LOSS, CONTRACT, LEAK)
IMAGES = ImageSummary(10_000, 28, 28, grey=True)


@pytest.fixture(scope="module")
def source() -> ImageSource:
    return open_source(small_recipe().data).without_labels()


def recipe_of(name: str, model: str = "test_resnet", /, **options: Any) -> Recipe:
    if name in ("moco_v1", "moco_v2"):
        options = {"bn_groups": 2, "dim": 128, "queue_size": 512, **options}
    return small_recipe(name, model, method=options, train={"batch_size": 8})


def findings_of(recipe: Recipe, source: ImageSource, patch: pytest.MonkeyPatch) -> list[Finding]:
    """What the checks of a training step find; the forecasts are left out."""
    for forecast in ("forecast_memory", "forecast_time"):
        patch.setattr(f"sslkit.doctor.run_checks.{forecast}", lambda *_: Finding("forecast", "ok", ""))
    return [finding for finding in check_method(recipe, source, IMAGES) if finding.check in TRAINING_CHECKS]


def problems(findings: list[Finding]) -> dict[str, str]:
    return {finding.check: finding.verdict for finding in findings if finding.verdict in ("fault", "warning")}


@pytest.mark.full
@pytest.mark.parametrize("name", names_of("doctor"))
def test_an_error_is_found_by_its_check_only(name: str, source: ImageSource, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant = MUTANTS[name]
    monkeypatch.setitem(METHODS, mutant.replaces, mutant.method)
    assert problems(findings_of(recipe_of(mutant.replaces), source, monkeypatch)) == {mutant.check: "fault"}


@pytest.mark.parametrize("model", ["test_resnet", "test_vit"])
@pytest.mark.parametrize("name", METHODS)
def test_no_false_alarm(name: str, model: str, source: ImageSource, monkeypatch: pytest.MonkeyPatch) -> None:
    findings = findings_of(recipe_of(name, model), source, monkeypatch)
    assert problems(findings) == {}
    assert not [finding for finding in findings if "could not be checked" in finding.sentence]
    assert sorted(finding.check for finding in findings) == sorted(TRAINING_CHECKS)


@pytest.mark.parametrize("options", [{"predictor": False}, {"head_norm": False}, {"momentum": 0.0}, {"momentum": 1.0}])
def test_no_false_alarm_on_ablations(
    options: dict[str, Any], source: ImageSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert problems(findings_of(recipe_of("moco_v3", **options), source, monkeypatch)) == {}


def test_one_group_makes_shuffling_useless(source: ImageSource, monkeypatch: pytest.MonkeyPatch) -> None:
    findings = findings_of(recipe_of("moco_v2", bn_groups=1), source, monkeypatch)
    assert problems(findings) == {LEAK: "fault"}
    (found,) = [finding for finding in findings if finding.verdict == "fault"]
    assert "set method.bn_groups = 8" in found.sentence
    assert problems(findings_of(recipe_of("moco_v2", "test_vit", bn_groups=1), source, monkeypatch)) == {}
    assert problems(findings_of(recipe_of("end_to_end", bn_groups=1), source, monkeypatch)) == {}


@pytest.mark.parametrize("name", ["moco_v1", "moco_v2"])
def test_switching_shuffling_off_is_a_leak(name: str, source: ImageSource, monkeypatch: pytest.MonkeyPatch) -> None:
    assert problems(findings_of(recipe_of(name, shuffle=False), source, monkeypatch)) == {LEAK: "fault"}


def test_a_method_of_another_package(source: ImageSource, monkeypatch: pytest.MonkeyPatch) -> None:
    """The documented example."""
    spec = importlib.util.spec_from_file_location("simsiam", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(METHODS, "simsiam", module.SimSiam)
    tables: dict[str, Any] = {
        "method": {"name": "simsiam", "dim": 32, "bottleneck": 8},
        "backbone": {"name": "test_resnet"},
        "data": {"path": "builtin:fashion_mnist", "split": "test", "workers": 0},
        "views": {"size": 32},
        "train": {"batch_size": 16},
    }
    assert problems(findings_of(build_recipe(tables), source, monkeypatch)) == {}


class Rotations(Method):
    """A method without pairs: one view, a module of its own, and no declaration beyond the minimum."""

    Options = MethodOptions

    def __init__(self, backbone: nn.Module, feature_dim: int, options: MethodOptions) -> None:
        super().__init__()
        self.backbone = backbone
        self.classifier = nn.Linear(feature_dim, 4)

    def student(self, views: Views) -> Features:
        return [self.backbone(torch.cat([torch.rot90(views[0], quarter, (2, 3)) for quarter in range(4)]))]

    def objective(
        self, student_features: Features, teacher_features: Features, batch: BatchInfo, progress: Progress
    ) -> Step:
        turns = torch.arange(4).repeat_interleave(len(batch.sample_ids))
        return Step(nn.functional.cross_entropy(self.classifier(student_features[0]), turns))

    @staticmethod
    def paper_defaults(family: str) -> dict[str, dict[str, Any]]:
        optim = {"name": "sgd", "lr": 0.1, "weight_decay": 1e-4}
        schedule = {"decay": "cosine", "per": "step"}
        return {
            "views": {"policy": "small_gray"},
            "optim": optim,
            "schedule": schedule,
            "train": {"epochs": 1, "batch_size": 8},
        }


def test_a_method_of_another_kind_is_not_broken(source: ImageSource, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sslkit.methods.all_methods", lambda: {**METHODS, "rotations": Rotations})
    tables = {
        "method": {"name": "rotations"},
        "backbone": {"name": "test_resnet"},
        "data": {"path": "builtin:fashion_mnist", "split": "test", "workers": 0},
    }
    findings = findings_of(build_recipe(tables), source, monkeypatch)
    assert problems(findings) == {VIEWS_USED: "warning"}
    verdicts = {finding.check: finding.verdict for finding in findings}
    assert verdicts[FIRST_LOSS] == "not applicable"


def test_a_method_that_cannot_be_built(source: ImageSource, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(BYOL):
        def __init__(self, *args: Any) -> None:
            raise TypeError("no such width")

    monkeypatch.setitem(METHODS, "byol", Broken)
    (found,) = check_method(recipe_of("byol"), source, IMAGES)
    assert (found.check, found.verdict) == (STEP, "fault")
    assert "cannot be built: TypeError: no such width" in found.sentence
