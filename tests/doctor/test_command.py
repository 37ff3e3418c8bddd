"""``sslkit doctor`` as a stranger types it."""

import json
import re
import shlex
from pathlib import Path

import pytest
from conftest import run
from methods.mutants import MUTANTS

from sslkit.doctor.findings import LOADING
from sslkit.methods import METHODS

SMALL = [
    *("--method", "moco_v2", "--backbone", "test_resnet", "--data", "builtin:fashion_mnist"),
    *("--set", "views.policy=small_gray", "--set", "train.batch_size=32", "--set", "method.bn_groups=2"),
    *("--set", "method.queue_size=512", "--set", "method.hidden_dim=32", "--set", "data.workers=0"),
]


def test_a_sound_recipe_is_a_table_and_code_0(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sslkit.doctor.run_checks.forecast_time", lambda *_: LOADING.ok("in an hour"))
    code, out, err = run(capsys, "doctor", *SMALL)
    assert code == 0
    assert "batch norm leak" not in out
    assert 0 < out.index("data loading") < out.index("memory")
    found = re.search(r"0 faults, (\d) warnings; (\d+) other checks are ok, (\d+) not applicable \(--all lists", out)
    assert found
    warnings, fine, skipped = map(int, found.groups())
    code, every, _ = run(capsys, "doctor", *SMALL, "--all")
    assert code == 0
    assert "batch norm leak" in every
    assert f"0 faults, {warnings} warnings, {fine + 2} ok" in every  # with data loading and memory
    assert skipped == len(every.split("not applicable: ")[1].split("\n")[0].split(", "))
    assert "16 images, on the CPU" in err
    assert not list(tmp_path.iterdir())  # nothing is written


def test_settings_that_are_advised_can_be_pasted(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["doctor", *SMALL, "--set", "views.crop_scale=[0.01, 0.02]", "--set", "train.precision=bf16"]
    _, out, _ = run(capsys, *words)
    line = next(line for line in out.splitlines() if line.startswith("to follow the advice, add: "))
    pasted = shlex.split(line.partition(": ")[2])
    assert "--set" in pasted
    assert any(each.startswith("views.crop_scale=[") for each in pasted)
    _, after, _ = run(capsys, *words, *pasted)
    assert "crops" not in after
    assert len(after.splitlines()) < len(out.splitlines())


def test_a_fault_is_code_2_and_named_in_json(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METHODS, "moco_v2", MUTANTS["QueueNotFed"].method)
    code, out, _ = run(capsys, "doctor", *SMALL, "--json")
    assert code == 2
    report = json.loads(out)
    assert report["fault"] == 1
    (found,) = [finding for finding in report["findings"] if finding["verdict"] == "fault"]
    assert found["check"] == "method contract"
    assert report["ok"] > 8
    assert any(finding["verdict"] == "not applicable" for finding in report["findings"])


def test_without_a_recipe_it_describes_the_machine(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "doctor")
    assert code == 0
    assert "accelerate" in out
    assert "cores" in out


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "doctor", "--help")
    assert code == 0
    assert "Example: sslkit doctor" in " ".join(out.split())


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["mocov3_vits"], "[data] path: no folder or file 'imagenet'"),
        (["mocov3_vits", "--data", "/no/data"], "[data] path: no folder or file '/no/data'"),
        (["quickstart", "--set", "train.batch_size=20000"], "is more than the 10000 images"),
        (["quickstart", "--set", "train.epocs=3"], "did you mean 'epochs'?"),
        (["quikstart"], "did you mean 'quickstart'?"),
        (["--method", "moco_v2"], "missing: --data"),
        ([*SMALL, "--set", "train.batch_size=33"], "33 does not split into 2 equal parts"),
    ],
)
def test_bad_input_is_one_sentence_and_code_2(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    words: list[str],
    sentence: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, "doctor", *words)
    assert code == 2
    assert sentence in err
    assert "Traceback" not in err
