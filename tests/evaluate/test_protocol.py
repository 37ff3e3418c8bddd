"""Scores know their protocol and their uncertainty; scores of other protocols are not compared."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
from conftest import run, small_recipe
from scipy.stats import binom, binomtest

import sslkit
from sslkit.data.sources.image_identity import images_digest
from sslkit.data.sources.image_source import DataConfig, open_source
from sslkit.errors import UserError
from sslkit.evaluate import (
    FinetuneProtocol,
    KnnProtocol,
    TransferOptions,
    evaluate_finetune,
    evaluate_knn,
    evaluate_linear,
    load_encoder,
)
from sslkit.evaluate.compare_scores import best_sentence, comparable
from sslkit.evaluate.detection.annotations import open_annotated
from sslkit.evaluate.evaluation_result import bootstrap_interval
from sslkit.evaluate.features.readouts import Readout
from sslkit.evaluate.label_subsets import choose_subset
from sslkit.evaluate.labelled_data import open_pair
from sslkit.evaluate.probes.scoring import evaluate_sweep
from sslkit.evaluate.probes.sweep import SweepProtocol
from sslkit.evaluate.protocol import protocol_hash
from sslkit.files.jsonl_reader import read_lines


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folders = [str(tmp_path_factory.mktemp("encoder")) for _ in range(2)]
    for folder in folders:
        model = timm.create_model("test_resnet", num_classes=0)
        timm.models.save_for_hf(model, folder, safe_serialization=True)
    return folders


ALONE = TransferOptions(scratch=False)


def test_the_interval_is_the_bootstraps() -> None:
    right = np.random.default_rng(1).random(400) < 0.83
    drawn = np.random.default_rng(2).choice(right, (10_000, 400)).mean(axis=1)
    low, high = bootstrap_interval(float(right.mean()), 400)
    assert (low, high) == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.004)
    assert (low, high) == pytest.approx(binom.ppf([0.025, 0.975], 400, right.mean()) / 400, abs=0.003)
    exact = binomtest(50, 50).proportion_ci(0.95, "exact")
    assert bootstrap_interval(1.0, 50) == pytest.approx((exact.low, exact.high))
    assert bootstrap_interval(0.0, 50) == pytest.approx((1 - exact.high, 1 - exact.low))


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


def copied(class_folders: Path, folder: Path) -> Path:
    """The same files elsewhere, with other times."""
    shutil.copytree(class_folders, folder, copy_function=shutil.copyfile)
    return folder


def hash_of(encoder: str, data: Path, **options: Any) -> str:
    return evaluate_knn(encoder, DataConfig(path=str(data)), KnnProtocol(k=3), **options).protocol_hash


@pytest.mark.full
def test_copies_of_encoder_and_data_have_one_hash(encoders: list[str], class_folders: Path, tmp_path: Path) -> None:
    twin = shutil.copytree(encoders[0], tmp_path / "encoder")
    data = DataConfig(path=str(class_folders)), DataConfig(path=str(copied(class_folders, tmp_path / "deep" / "data")))
    quick = FinetuneProtocol("quick", 1, 8, 0.01, seed=3)
    for judge in (
        lambda model, data: evaluate_knn(model, data, KnnProtocol(k=3)),
        lambda model, data: evaluate_linear(model, data),
        lambda model, data: evaluate_sweep(model, data, SweepProtocol(epochs=1)),
        lambda model, data: evaluate_finetune(model, data, quick, labels="1-shot", options=ALONE),
    ):
        first, second = judge(encoders[0], data[0]), judge(str(twin), data[1])
        assert first.protocol_hash == second.protocol_hash
        assert str(class_folders) not in json.dumps(first.protocol)


@pytest.mark.full
@pytest.mark.parametrize("what", ["name", "size", "content", "one less"])
def test_other_images_have_another_hash(encoders: list[str], class_folders: Path, tmp_path: Path, what: str) -> None:
    data = copied(class_folders, tmp_path / "data")
    before = hash_of(encoders[0], data)
    file = sorted(data.rglob("*.png"))[5]
    if what == "name":
        file.rename(file.with_name(f"{file.stem}b.png"))
    elif what == "size":
        file.write_bytes(file.read_bytes() + b"0")
    elif what == "content":  # of the same size: a bit of a comment
        encoded = bytearray(file.read_bytes())
        encoded[-1] ^= 1
        file.write_bytes(encoded)
    else:
        file.unlink()
    assert hash_of(encoders[0], data) != before


def test_an_embedded_image_counts_by_its_bytes() -> None:
    source = open_source(DataConfig(path="builtin:fashion_mnist", split="test"))
    digests = {images_digest(source.subset(np.array(rows))) for rows in ([0, 1, 2], [0, 2, 1], [0, 1, 3], [0, 1])}
    assert len(digests) == 4
    assert images_digest(source.subset(np.array([0, 1, 2]))) in digests


@pytest.mark.full
def test_the_crop_is_the_encoders_own(encoders: list[str], class_folders: Path, tmp_path: Path) -> None:
    """A model's own crop is the same protocol as that crop asked for, and not that of a model with another."""
    own = load_encoder(encoders[0]).preprocessing
    first = evaluate_knn(encoders[0], DataConfig(path=str(class_folders)), KnnProtocol(k=3))
    assert {name: first.protocol[name] for name in own} == own
    asked, other = (hash_of(encoders[0], class_folders, readout=Readout(crop_pct=each)) for each in (0.95, 0.8))
    assert asked == first.protocol_hash == hash_of(encoders[0], class_folders)
    assert other != asked
    for name, value in (("crop_pct", 0.5), ("mean", [0.1, 0.2, 0.3]), ("interpolation", "bicubic"), ("input_size", 64)):
        changed = shutil.copytree(encoders[0], tmp_path / name)
        config = json.loads((changed / "config.json").read_text())
        config["pretrained_cfg"][name] = [3, value, value] if name == "input_size" else value
        (changed / "config.json").write_text(json.dumps(config))
        assert hash_of(str(changed), class_folders) != asked, name
    assert hash_of(encoders[0], class_folders, readout=Readout(layer=1)) != asked


def test_a_subset_is_which_images_not_which_words(encoders: list[str], class_folders: Path, tmp_path: Path) -> None:
    data = DataConfig(path=str(class_folders))
    pair = open_pair(data)
    chosen = choose_subset(pair.train, pair.train_labels.numpy(), "1-shot", 3)
    paths = pair.train.paths()
    for name, rows in (
        ("same", chosen),
        ("others", [*chosen[:-1], *({*range(len(paths))} - {*chosen})][: len(chosen)]),
    ):
        (tmp_path / name).write_text("".join(f"{paths[row]}\n" for row in rows))
    hashes = [
        evaluate_finetune(
            encoders[0],
            data,
            FinetuneProtocol("quick", 1, 8, 0.01, seed=seed),
            labels=words,
            options=ALONE,
        ).protocol_hash
        for words, seed in (("1-shot", 3), (str(tmp_path / "same"), 3), (str(tmp_path / "others"), 3), ("1-shot", 4))
    ]
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == 3


def test_the_monitors_score_is_that_of_eval_knn(
    capsys: pytest.CaptureFixture[str], class_folders: Path, tmp_path: Path
) -> None:
    monitor = {"every_epochs": 1, "data": str(class_folders), "k": 3}
    sslkit.train(small_recipe("moco_v2", "test_resnet", monitor=monitor, train={"max_steps": 2}), tmp_path / "run")
    code, _, _ = run(capsys, "eval", "knn", str(tmp_path / "run"), "--data", str(class_folders), "--k", "3")
    assert code == 0
    watched, judged = read_lines(tmp_path / "run" / "results.jsonl")
    assert (watched["by"], judged["by"]) == ("monitor", "eval")
    assert watched["protocol"] == judged["protocol"]
    assert (watched["protocol_hash"], watched["accuracy"]) == (judged["protocol_hash"], judged["accuracy"])


def test_annotated_pictures_are_known_wherever_they_lie(rendered: Callable[[str], Path], tmp_path: Path) -> None:
    for layout in ("voc", "coco"):
        folder = tmp_path / layout / "copy"
        shutil.copytree(rendered(layout), folder, copy_function=shutil.copyfile)
        settings = [open_annotated(place).settings() for place in (rendered(layout), folder)]
        assert settings[0] == settings[1]
        picture = open_annotated(folder).test[0].file
        picture.write_bytes(picture.read_bytes()[:-1] + b"9")
        moved = open_annotated(folder).settings()
        assert [name for name in moved if moved[name] != settings[0][name]] == ["test_digest"]


def row(digest: str, accuracy: float, **protocol: object) -> dict[str, object]:
    settings = {"protocol": protocol, "protocol_hash": digest, "accuracy": accuracy, "interval": (0, 1)}
    return {"evaluation": "knn k=20", **settings}


def test_only_the_same_protocol_is_compared() -> None:
    old, new, other = row("a", 0.5, k=20), row("a", 0.6, k=20), row("b", 0.9, k=10)
    groups = comparable({"x": [old, other, new], "y": [row("a", 0.7, k=20)]})
    assert [{model: found["accuracy"] for model, found in group.items()} for group in groups] == [{"x": 0.6, "y": 0.7}]
    with pytest.raises(UserError, match=r"no protocol in common.*k: 20 \(x\), 10 \(y\)"):
        comparable({"x": [old], "y": [other]})
    here, there = row("a", 0.5, k=20, test_digest="e5", chosen="a", mean=(0.5,)), row("b", 0.5, k=20, test_digest="0f")
    with pytest.raises(UserError) as refused:
        comparable(
            {"x": [here], "y": [row("c", 0.1, k=7, test_digest="7"), there, row("d", 0.2, k=5, test_digest="7")]}
        )
    assert str(refused.value).endswith(
        "in common: the labelled images differ; mean: (0.5,) (x), not recorded (y); the test images differ"
    )
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
    assert "neither a run folder nor a file with the output of eval --json" in err


def test_a_comparison_names_the_best_and_how_far_the_others_are() -> None:
    """Independent samples: the half-widths add in quadrature, so 0.02 and 0.03 make 0.0361."""
    rows = {"a": (0.70, 0.03), "b": (0.80, 0.02), "c": (0.79, 0.02)}
    group = {name: {"accuracy": mean, "interval": [mean - half, mean + half]} for name, (mean, half) in rows.items()}
    wanted = "The highest score is that of b: above a by 10.0 points (6.4 to 13.6) and no difference seen from c"
    assert best_sentence(group) == f"{wanted} (-1.8 to 3.8)"
    assert best_sentence({"a": group["a"]}) == ""
    assert best_sentence({**group, "d": {"accuracy": 0.1, "interval": None}}) == ""
