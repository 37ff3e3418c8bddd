"""Scores know their protocol and their uncertainty; scores of other protocols are not compared."""

import json
from pathlib import Path

import numpy as np
import pytest
import timm
from scipy.stats import binom
from test_cli import run

from sslkit.data.source import DataConfig
from sslkit.errors import UserError
from sslkit.evaluate import KnnProtocol, evaluate_knn
from sslkit.evaluate.compare import comparable
from sslkit.evaluate.protocol import bootstrap_interval, protocol_hash


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folders = [str(tmp_path_factory.mktemp("encoder")) for _ in range(2)]
    for folder in folders:
        model = timm.create_model("test_resnet", num_classes=0)
        timm.models.save_for_hf(model, folder, safe_serialization=True)
    return folders


def test_the_interval_is_the_bootstraps() -> None:
    right = np.random.default_rng(1).random(400) < 0.83
    drawn = np.random.default_rng(2).choice(right, (10_000, 400)).mean(axis=1)
    low, high = bootstrap_interval(float(right.mean()), 400)
    assert (low, high) == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.004)
    assert (low, high) == pytest.approx(binom.ppf([0.025, 0.975], 400, right.mean()) / 400, abs=0.003)
    assert bootstrap_interval(1.0, 50) == (1.0, 1.0)


def test_the_hash_knows_every_setting_and_no_order() -> None:
    settings = {"k": 20, "temperature": 0.07, "layer": None}
    assert protocol_hash(settings) == protocol_hash(dict(reversed(settings.items())))
    assert len({protocol_hash({**settings, key: 1}) for key in settings} | {protocol_hash(settings)}) == 4


def test_scores_carry_their_protocol(encoders: list[str], class_folders: Path) -> None:
    data = DataConfig(path=str(class_folders))
    first, second = (evaluate_knn(encoder, data, KnnProtocol(k=3)) for encoder in encoders)
    assert first.protocol_hash == second.protocol_hash
    assert first.protocol_hash != evaluate_knn(encoders[0], data, KnnProtocol(k=5)).protocol_hash
    builtin = DataConfig(path="builtin:fashion_mnist")
    assert builtin.path not in json.dumps(first.protocol)
    low, high = first.scores[0].interval
    assert low <= first.scores[0].accuracy <= high


def row(digest: str, accuracy: float, **protocol: object) -> dict[str, object]:
    settings = {"protocol": protocol, "protocol_hash": digest, "accuracy": accuracy, "interval": (0, 1)}
    return {"evaluation": "knn k=20", **settings}


def test_only_the_same_protocol_is_compared() -> None:
    old, new, other = row("a", 0.5, k=20), row("a", 0.6, k=20), row("b", 0.9, k=10)
    groups = comparable({"x": [old, other, new], "y": [row("a", 0.7, k=20)]})
    assert [{model: found["accuracy"] for model, found in group.items()} for group in groups] == [{"x": 0.6, "y": 0.7}]
    with pytest.raises(UserError, match=r"no protocol in common.*k: 20 \(x\), 10 \(y\)"):
        comparable({"x": [old], "y": [other]})
    with pytest.raises(UserError, match="y has no scores of linear"):
        comparable({"x": [{**old, "evaluation": "linear"}], "y": [other]}, "linear")
    with pytest.raises(UserError, match="two or more"):
        comparable({"x": [old]})


def test_compare_on_the_command_line(
    capsys: pytest.CaptureFixture[str], encoders: list[str], class_folders: Path, tmp_path: Path
) -> None:
    files = []
    for name, encoder, k in (("a", encoders[0], "3"), ("b", encoders[1], "3"), ("c", encoders[0], "5")):
        code, out, _ = run(capsys, "eval", "knn", encoder, "--data", str(class_folders), "--k", k, "--json")
        assert code == 0
        files.append(tmp_path / f"{name}.json")
        files[-1].write_text(out)
    code, out, _ = run(capsys, "eval", "compare", str(files[0]), str(files[1]))
    assert code == 0
    assert "95 % interval" in out
    code, out, _ = run(capsys, "eval", "compare", str(files[0]), str(files[1]), "--json")
    assert [list(group) for group in json.loads(out)] == [[str(files[0]), str(files[1])]]
    code, _, err = run(capsys, "eval", "compare", str(files[0]), str(files[2]))
    assert code == 2
    assert "k: 3 (" in err
    code, _, err = run(capsys, "eval", "compare", str(files[0]), str(tmp_path))
    assert code == 2
    assert "neither a run folder nor a file that --json wrote" in err
