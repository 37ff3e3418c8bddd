"""``sslkit doctor`` as a stranger types it."""

import json
from pathlib import Path

import pytest
from conftest import run
from methods.mutants import MUTANTS

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
    code, out, err = run(capsys, "doctor", *SMALL)
    assert code == 0
    assert "batch norm leak" in out
    assert "0 fault" in out
    assert "not applicable: processes agree" in " ".join(out.split())
    assert "16 images, on the CPU" in err
    assert not list(tmp_path.iterdir())  # nothing is written


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
