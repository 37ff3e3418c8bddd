"""Alarms on curves: rung where they must be, silent where a healthy run merely wobbles."""

from pathlib import Path

import numpy as np
import pytest
from accelerate import Accelerator
from conftest import small_recipe

import sslkit
from sslkit.data.sources.image_source import open_source
from sslkit.engine.monitor import evaluations as measure
from sslkit.engine.monitor.alarms import (
    KnnPoint,
    Spike,
    SpikeDetector,
    collapse_alarm,
    dip_alarm,
    leak_alarm,
    read_curve,
    spike_alarm,
    teacher_alarm,
)
from sslkit.engine.monitor.diagnostics import Diagnostics
from sslkit.files.jsonl_reader import read_lines

Row = dict[str, float]


def calm(steps: int, seed: int = 0) -> list[Row]:
    """Norms that wobble by a fifth, as a healthy run's do."""
    wobble = np.exp(0.2 * np.random.default_rng(seed).normal(size=(steps, 3)))
    return [
        {"step": step + 1, "grad_norm": whole, "gradient/patch_embed": first, "gradient/blocks.5": last}
        for step, (whole, first, last) in enumerate(wobble)
    ]


def find_spikes(rows: list[Row]) -> list[Spike]:
    detector = SpikeDetector()
    layers = ({name: value for name, value in row.items() if name.startswith("gradient/")} for row in rows)
    found = [
        detector.update(row["step"], row["grad_norm"], by_layer) for row, by_layer in zip(rows, layers, strict=True)
    ]
    return [spike for spike in found if spike is not None]


def multiply(rows: list[Row], step: int, **factors: float) -> None:
    names = {"whole": "grad_norm", "first": "gradient/patch_embed", "last": "gradient/blocks.5"}
    for name, factor in factors.items():
        rows[step - 1][names[name]] *= factor


def test_a_spike_is_measured_against_the_median_before_it() -> None:
    rows = calm(100)
    assert find_spikes(rows) == []
    multiply(rows, 60, whole=20.0, first=20.0)
    (spike,) = find_spikes(rows)
    before = np.median([row["grad_norm"] for row in rows[39:59]])
    assert spike.step == 60
    assert spike.ratio == pytest.approx(rows[59]["grad_norm"] / before)
    assert find_spikes(calm(100)[:30] + [{**row, "grad_norm": 0.5} for row in calm(100)[30:]]) == []
    multiply(rows, 10, whole=50.0)  # before there is a window
    assert [each.step for each in find_spikes(rows)] == [60]


@pytest.mark.parametrize(
    ("first", "last", "expected"),
    [(57, 60, True), (60, 58, False), (60, None, True), (None, 60, False), (50, 60, False)],
)
def test_which_layer_moved_first(first: int | None, last: int | None, expected: bool) -> None:
    """The whole norm spikes at step 60; a jump ten steps earlier is another story."""
    rows = calm(80)
    multiply(rows, 60, whole=30.0)
    if first:
        multiply(rows, first, first=30.0)
    if last:
        multiply(rows, last, last=30.0)
    assert [spike.first_layer_first for spike in find_spikes(rows)] == [expected]


def test_at_the_same_step_the_larger_jump_leads() -> None:
    for first, last in ((40.0, 20.0), (20.0, 40.0)):
        rows = [{**row, "gradient/patch_embed": 1.0, "gradient/blocks.5": 1.0} for row in calm(50)]
        multiply(rows, 40, whole=30.0, first=first, last=last)
        assert [spike.first_layer_first for spike in find_spikes(rows)] == [first > last]


def test_layers_may_be_missing_and_numbers_infinite() -> None:
    rows = [{"step": row["step"], "grad_norm": row["grad_norm"]} for row in calm(60)]
    rows[40]["grad_norm"] *= 30
    rows[50]["grad_norm"] = float("inf")  # fp16: the step is skipped
    assert [(spike.step, spike.first_layer_first) for spike in find_spikes(rows)] == [(41, None)]
    rested = rows[:30] + calm(60)[30:]  # the backbone's layers come later
    assert find_spikes(rested) == []


def test_the_sentence_of_a_spike_names_the_worst() -> None:
    rows = calm(100)
    multiply(rows, 60, whole=20.0, first=20.0)
    multiply(rows, 80, whole=90.0, last=90.0)
    spikes = find_spikes(rows)
    (sentence,) = spike_alarm(spikes)
    assert sentence.startswith("spike: the gradient norm of step 80 is ")
    assert "(alarm above 5; 2 such since the last line); the first layer did not move first; try" in sentence
    assert "freeze_patch_embed" in spike_alarm(spikes[:1])[0]
    assert spike_alarm([]) == []


def points(*knn: float, pretext: list[float] | None = None) -> list[KnnPoint]:
    return [KnnPoint(float(epoch), accuracy, pretext[epoch] if pretext else None) for epoch, accuracy in enumerate(knn)]


def test_a_dip_must_be_deeper_than_chance() -> None:
    curve = points(0.5, 0.8, 0.75)
    (sentence,) = dip_alarm(curve, 50_000)
    assert sentence.startswith(
        "dip: kNN is 75.0% at epoch 2, 5.0 points below its best of epoch 1 (alarm above 3.0); try"
    )
    assert dip_alarm(curve, 100) == []
    assert dip_alarm(points(0.5, 0.8, 0.75, 0.79), 50_000) == []  # over again
    assert dip_alarm(points(0.8), 50_000) == []


def test_a_teacher_that_is_none() -> None:
    assert "the student of the previous step" in teacher_alarm(0.0)[0]
    assert "never moves" in teacher_alarm(1.0)[0]
    assert teacher_alarm(0.999) == teacher_alarm(None) == []


def test_a_run_without_momentum_says_so_once(tmp_path: Path) -> None:
    recipe = small_recipe("moco_v2", "test_resnet", method={"momentum": 0.0}, train={"max_steps": 3})
    sslkit.train(recipe, tmp_path / "run")
    rows = read_lines(tmp_path / "run/diagnostics.jsonl")
    assert all(any(alarm.startswith("teacher: ") for alarm in row["alarms"]) for row in rows)
    sslkit.train(small_recipe("moco_v2", "test_resnet", train={"max_steps": 3}), tmp_path / "healthy")
    assert not any(row["alarms"] for row in read_lines(tmp_path / "healthy/diagnostics.jsonl"))


def test_a_fall_beside_an_unsolved_task_is_no_leak() -> None:
    """A rate far too high: kNN falls, and the task is at 11 %."""
    assert leak_alarm(points(0.664, 0.456, pretext=[0.01, 0.11]), 2000) == []
    assert leak_alarm(points(0.664, 0.456, pretext=[0.3, 0.6]), 2000) != []


def test_leaking_batch_statistics_as_in_moco_v1() -> None:
    """Figure 5 of the paper: without shuffling pretext accuracy soars and kNN sinks; with it both rise."""
    leaking = points(0.30, 0.34, 0.33, 0.28, pretext=[0.4, 0.8, 0.99, 0.999])
    (sentence,) = leak_alarm(leaking, 50_000)
    assert sentence.startswith(
        "leak: from epoch 0 to 3 pretext accuracy rose by 60 points to 100% (alarm above 10) while kNN went from 30.0%"
    )
    solved = points(0.30, 0.30, 0.30, pretext=[0.4, 0.8, 0.99])
    assert "(alarm above 30)" in leak_alarm(solved, 50_000)[0]
    healthy = points(0.30, 0.38, 0.44, 0.46, pretext=[0.3, 0.45, 0.6, 0.7])
    assert all(leak_alarm(healthy[:epoch], 50_000) == [] for epoch in range(1, 5))
    late = points(0.867, 0.867, pretext=[0.40, 0.62])  # flat at the end of a good run, the task far from solved
    assert leak_alarm(late, 2000) == []
    easy = points(0.79, 0.81, 0.815, pretext=[0.5, 0.9, 0.96])  # a small batch to choose from, kNN still rising
    assert leak_alarm(easy, 2000) == []
    # MoCo v2 with a ResNet, 5 epochs, 32 groups that are not shuffled: the curve as measured.
    small = points(0.687, 0.732, 0.732, 0.747, 0.745, pretext=[0.010, 0.103, 0.204, 0.254, 0.271])
    assert leak_alarm(small, 2000) == []
    (sentence,) = leak_alarm(small, 2000, exposed=True)
    assert "from epoch 1 to 4 pretext accuracy rose by 17 points" in sentence
    assert "[method] shuffle = true" in sentence
    assert all(leak_alarm(healthy[:epoch], 50_000, exposed=True) == [] for epoch in range(1, 5))
    assert leak_alarm(points(0.8, 0.5), 2000) == []  # a method without pretext accuracy


def test_the_curve_of_a_run_is_read_from_its_rows() -> None:
    metrics = [{"step": step, "accuracy": step / 10} for step in range(1, 7)]
    results = [
        {"by": "monitor", "step": 2, "epoch": 1.0, "accuracy": 0.5},
        {"by": "eval", "step": 2, "epoch": 1.0, "accuracy": 0.9},
        {"by": "monitor", "step": 6, "epoch": 3.0, "accuracy": 0.6},
    ]
    first, second = read_curve(metrics, results)
    assert (first.epoch, first.knn, first.pretext) == (1.0, 0.5, pytest.approx(0.15))
    assert (second.epoch, second.knn, second.pretext) == (3.0, 0.6, pytest.approx(0.45))
    assert read_curve([{"step": 1, "loss": 2.0}], results)[0].pretext is None


def test_collapse_by_std_or_by_rank() -> None:
    assert "features, whose std is 0.016 times" in collapse_alarm(0.001, 30.0, 256)[0]
    assert "effective rank is 1.20 of 256 (alarm below 2)" in collapse_alarm(0.05, 1.2, 256)[0]
    assert collapse_alarm(0.132 / 8, 6.0, 64) == []  # a ViT that learned
    assert collapse_alarm(0.156 / 2048**0.5, 15.0, 2048) == []  # a ResNet-50 before training


def rung(ranks: list[float], dim: int = 256) -> list[int]:
    """Places of a recorded sequence of ranks at which the alarm rings."""
    return [place for place, rank in enumerate(ranks) if collapse_alarm(0.015, rank, dim, max(ranks[: place + 1]))]


def test_a_fall_of_the_rank_to_a_tenth_as_recorded() -> None:
    # MoCo v2, symmetric, momentum 0: every ten steps of the first epoch; the std stays a quarter of an even spread.
    fallen = [103.2, 58.5, 37.5, 19.6, 12.9, 8.8, 9.2, 7.6]
    assert rung(fallen) == [5, 6, 7]
    (sentence,) = collapse_alarm(0.0155, 7.6, 256, 103.2)
    assert sentence.startswith(
        "collapse: features have lost nearly all their directions, their effective rank fell from 103.2 to 7.6 "
        "(alarm below 10.3, a tenth); try"
    )
    # The quickstart, and the deepest fall of a healthy run that was recorded: a small ResNet's.
    assert rung([119.9, 120.0, 113.5, 123.6, 131.3, 130.9], 1024) == []
    assert rung([68.2, 60.1, 55.0], 256) == []


def test_a_continued_run_remembers_how_high_its_rank_was() -> None:
    recipe = small_recipe()
    diagnostics = Diagnostics(recipe, open_source(recipe.data), Accelerator())
    diagnostics.resume([{"effective_rank": 4.0}, {"effective_rank": 9.0}, {"alarms": []}, {"effective_rank": None}])
    assert diagnostics.highest_rank == 9.0
    assert diagnostics.is_due(1)


def test_a_backbone_without_batch_norm_is_not_told_about_it() -> None:
    leaking = points(0.30, 0.34, 0.33, 0.28, pretext=[0.4, 0.8, 0.99, 0.999])
    (sentence,) = leak_alarm(leaking, 50_000, batch_norm=False)
    assert "BatchNorm" not in sentence
    assert "batch statistics" not in sentence
    assert "the pretext task is too easy; try stronger [views]" in sentence
    assert "bn_groups" in leak_alarm(leaking, 50_000)[0]


@pytest.mark.full
@pytest.mark.parametrize("collapsed", [True, False])
def test_a_leak_is_not_told_while_features_collapse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, collapsed: bool
) -> None:
    """A collapse makes kNN fall as well; a ViT has no batch statistics to leak."""
    leaking = points(0.30, 0.10, pretext=[0.4, 0.9])
    monkeypatch.setattr(measure, "read_curve", lambda *_rows: leaking)
    monkeypatch.setattr(Diagnostics, "of_sample", lambda *_: {"alarms": ["collapse: as recorded"] if collapsed else []})
    monitor = {"every_epochs": 1, "data": "builtin:fashion_mnist", "max_train": 50}
    sslkit.train(small_recipe(monitor=monitor, train={"max_steps": 1}), tmp_path / "run")
    raised = [alarm for row in read_lines(tmp_path / "run" / "diagnostics.jsonl") for alarm in row["alarms"]]
    leaks = [alarm for alarm in raised if alarm.startswith("leak:")]
    assert len(leaks) == (0 if collapsed else 1)
    assert not any("BatchNorm" in alarm for alarm in leaks)
