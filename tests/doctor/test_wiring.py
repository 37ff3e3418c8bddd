"""Every wiring check against a method with that defect, and against methods that have none."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import small_recipe
from doctor.mutants import MUTANTS
from torch import nn
from torch.nn.functional import cosine_similarity

from sslkit.data.sources.image_source import ImageSource, open_source
from sslkit.doctor.findings import Finding
from sslkit.doctor.method_checks import examine_wiring
from sslkit.methods import METHODS, BatchInfo
from sslkit.methods.base import Features, Method, MethodOptions, Step, Views
from sslkit.methods.byol import BYOL, BYOLOptions
from sslkit.parts.schedules import Progress
from sslkit.recipe.resolve import Recipe, build_recipe

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "plugin" / "simsiam.py"
WARNED_ONLY = {"StatisticsAveraged", "TeacherDrawnAnew", "TeacherInEvalMode"}


@pytest.fixture(scope="module")
def source() -> ImageSource:
    return open_source(small_recipe().data).without_labels()


def recipe_of(name: str, model: str = "test_resnet", /, **options: Any) -> Recipe:
    if name in ("moco_v1", "moco_v2"):
        options = {"bn_groups": 2, "dim": 128, "queue_size": 512, **options}
    return small_recipe(name, model, method=options, train={"batch_size": 8})


def examined(recipe: Recipe, source: ImageSource) -> list[Finding]:
    return examine_wiring(recipe, source, lambda _: None)[0]


def complaints(findings: list[Finding]) -> dict[str, str]:
    return {finding.check: finding.verdict for finding in findings if finding.verdict in ("fault", "warning")}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_defect_is_named_and_no_other(name: str, source: ImageSource, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant, method, check = MUTANTS[name]
    monkeypatch.setitem(METHODS, method, mutant)
    verdict = "warning" if name in WARNED_ONLY else "fault"
    assert complaints(examined(recipe_of(method), source)) == {check: verdict}


@pytest.mark.parametrize("model", ["test_resnet", "test_vit"])
@pytest.mark.parametrize("name", METHODS)
def test_no_false_alarm(name: str, model: str, source: ImageSource) -> None:
    findings = examined(recipe_of(name, model), source)
    assert complaints(findings) == {}
    assert not [finding for finding in findings if "could not be checked" in finding.sentence]
    names = [finding.check for finding in findings]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("name", ["moco_v1", "moco_v2", "end_to_end"])
def test_no_false_alarm_on_symmetric_forms(name: str, source: ImageSource) -> None:
    assert complaints(examined(recipe_of(name, symmetric=True), source)) == {}


@pytest.mark.parametrize("options", [{"predictor": False}, {"head_norm": False}, {"momentum": 0.0}, {"momentum": 1.0}])
def test_no_false_alarm_on_ablations(options: dict[str, Any], source: ImageSource) -> None:
    assert complaints(examined(recipe_of("moco_v3", **options), source)) == {}


def test_one_group_makes_shuffling_useless(source: ImageSource) -> None:
    findings = examined(recipe_of("moco_v2", bn_groups=1), source)
    assert complaints(findings) == {"batch norm leak": "fault"}
    (found,) = [finding for finding in findings if finding.verdict == "fault"]
    assert "[method] bn_groups must be 2 or more" in found.sentence
    assert complaints(examined(recipe_of("moco_v2", "test_vit", bn_groups=1), source)) == {}
    assert complaints(examined(recipe_of("end_to_end", bn_groups=1), source)) == {}


@pytest.mark.parametrize("name", ["moco_v1", "moco_v2"])
def test_switching_shuffling_off_is_named_a_leak(name: str, source: ImageSource) -> None:
    assert complaints(examined(recipe_of(name, shuffle=False), source)) == {"batch norm leak": "fault"}


def simsiam() -> type[Method]:
    spec = importlib.util.spec_from_file_location("simsiam", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: type[Method] = module.SimSiam
    return found


def without_stop_gradient(base: Any) -> type[Method]:
    class Broken(base):
        def objective(
            self, student_features: Features, teacher_features: Features, batch: BatchInfo, progress: Progress
        ) -> Step:
            z1, z2 = (self.projector(features) for features in student_features)
            p1, p2 = self.predictor(z1), self.predictor(z2)
            return Step(-(cosine_similarity(p1, z2) + cosine_similarity(p2, z1)).mean() / 2)

    return Broken


@pytest.mark.parametrize("broken", [False, True])
def test_a_method_of_someone_else(broken: bool, source: ImageSource, monkeypatch: pytest.MonkeyPatch) -> None:
    """The documented example, with its stop-gradient and without."""
    monkeypatch.setitem(METHODS, "simsiam", without_stop_gradient(simsiam()) if broken else simsiam())
    tables: dict[str, Any] = {
        "method": {"name": "simsiam", "dim": 32, "bottleneck": 8},
        "backbone": {"name": "test_resnet"},
        "data": {"path": "builtin:fashion_mnist", "split": "test", "workers": 0},
        "views": {"size": 32},
        "train": {"batch_size": 16},
    }
    found = complaints(examined(build_recipe(tables), source))
    assert found == ({"stop-gradient": "fault"} if broken else {})


class Rotations(Method):
    """Nothing that the doctor knows by name: one view, odd names, a loss without pairs, an objective of its own."""

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


class Distillation(BYOL):
    """A frozen teacher: its momentum is 1."""

    class Options(BYOLOptions):
        dim: int = 16
        hidden_dim: int = 32
        momentum: float = 1.0


def test_a_teacher_of_momentum_1_stays(source: ImageSource, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "byol", Distillation)
    found = {finding.check: finding for finding in examined(recipe_of("byol"), source)}
    assert found["teacher moves"].verdict == "ok"


def test_a_method_of_another_kind_is_not_broken(source: ImageSource, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sslkit.methods.all_methods", lambda: {**METHODS, "rotations": Rotations})
    tables = {
        "method": {"name": "rotations"},
        "backbone": {"name": "test_resnet"},
        "data": {"path": "builtin:fashion_mnist", "split": "test", "workers": 0},
    }
    findings = examined(build_recipe(tables), source)
    assert complaints(findings) == {"views used": "warning"}
    verdicts = {finding.check: finding.verdict for finding in findings}
    assert verdicts["pairs"] == verdicts["positive"] == verdicts["teacher moves"] == "not applicable"
