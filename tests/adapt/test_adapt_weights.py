"""sslkit adapt: trained for real on a few garments, judged, handed back, continued, and refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from conftest import cli_error, run
from PIL import Image
from torch import nn

import sslkit.engine.loop
from sslkit.adapt import AdaptOptions, AdaptResult, adapt_weights
from sslkit.adapt.adapt_recipe import Wishes
from sslkit.data.sources.image_source import DataConfig, open_source
from sslkit.evaluate import load_encoder
from sslkit.files.jsonl_reader import rows_of

CLASSES = (0, 1, 7)  # the last but one has a slash in its name


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(5)
    timm.models.save_for_hf(timm.create_model("test_resnet", num_classes=0), str(folder), safe_serialization=True)
    return str(folder)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 garments of three classes, a folder for each."""
    folder = tmp_path_factory.mktemp("photos")
    source = open_source(DataConfig(path="builtin:fashion_mnist", split="test"))
    labels = np.array(source.labels())
    for name in np.unique(labels)[list(CLASSES)]:
        (folder / str(name)).mkdir()
        for row in np.flatnonzero(labels == name)[:20]:
            Image.fromarray(source.read(int(row))).save(folder / str(name) / f"{row}.png")
    return folder


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("noise")
    generator = np.random.default_rng(0)
    for index in range(48):
        (folder / f"class{index % 3}").mkdir(exist_ok=True)
        pixels = generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"class{index % 3}" / f"{index}.png")
    return folder


def adapt(weights: str, data: Path, output: Path, labelled: Path | None = None, **wishes: Any) -> AdaptResult:
    config = DataConfig(path=str(labelled)) if labelled else None
    chosen = {"size": 32, "epochs": 1, **wishes}
    chosen["stated"] = ("data.workers=0", *chosen.get("stated", ()))
    retain = chosen.pop("retain", None)
    options = AdaptOptions(
        labelled=config, retain=DataConfig(path=str(retain)) if retain else None, wishes=Wishes(**chosen)
    )
    return adapt_weights(weights, DataConfig(path=str(data)), output, options)


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    state = other.state_dict()
    return all(torch.equal(value, state[name]) for name, value in one.state_dict().items())


def test_too_little_training_hands_the_start_back(weights: str, photos: Path, tmp_path: Path) -> None:
    """One epoch on sixty images: no difference, on images that are those trained on, and both are said."""
    result = adapt(weights, photos, tmp_path / "out", photos, stated=("train.batch_size=16",))
    assert result.answer is not None
    answer = result.answer
    assert not answer.gained
    assert "no difference seen" in answer.verdict
    assert "encoder/ holds the start" in answer.verdict
    assert any("60 of the 60 judged images are images of --data" in each for each in answer.remarks)
    assert any("cannot be seen" in each for each in answer.remarks)
    written = timm.create_model(f"local-dir:{tmp_path / 'out' / 'encoder'}", pretrained=True)
    assert same_weights(written, load_encoder(weights).module)
    assert not same_weights(written, load_encoder(str(tmp_path / "out" / "run")).module)
    assert written.pretrained_cfg["input_size"] == (3, 32, 32)
    assert load_encoder(str(tmp_path / "out")).preprocessing["crop_pct"] == 1.0
    rows = [row for row in rows_of(tmp_path / "out/run/results.jsonl") if row["by"] == "adapt"]
    assert [row["evaluation"] for row in rows] == ["adapt kNN, target", "adapt linear probe, target"]
    assert rows[0]["scores"][1] == {"encoder": "start", "accuracy": answer.comparisons[0].start}
    assert json.loads((tmp_path / "out/answer.json").read_text())["verdict"] == answer.verdict
    again = adapt(
        weights, photos, tmp_path / "out", photos, stated=("train.batch_size=16",)
    )  # judged again, not trained again
    assert again.answer == answer
    assert len(rows_of(tmp_path / "out/run/results.jsonl")) == len(rows)


def test_a_gain_is_written(photos: Path, tmp_path: Path) -> None:
    """The start is spoilt: all images have the same features. The end, which separates them, is written."""
    spoilt = tmp_path / "spoilt"
    torch.manual_seed(5)
    model = timm.create_model("test_resnet", num_classes=0)
    with torch.no_grad():
        for layer in model.layer4.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.weight.zero_()
                layer.bias.fill_(0.1)
    timm.models.save_for_hf(model, str(spoilt), safe_serialization=True)
    stated = ("adapt.anchor=0.0", "adapt.anchor_size=0", "adapt.freeze_batch_norm=false", "optim.lr=0.003")
    result = adapt(str(spoilt), photos, tmp_path / "out", photos, epochs=6, stated=stated)
    assert result.answer is not None
    answer = result.answer
    knn = answer.comparisons[0]
    assert answer.gained
    assert knn.difference.low > 0.0
    assert knn.end > knn.start
    point = tmp_path / "out/encoder"
    assert not same_weights(timm.create_model(f"local-dir:{point}", pretrained=True), load_encoder(str(spoilt)).module)
    assert "Adapted: better by" in answer.verdict


def test_noise_is_called_noise(weights: str, noise: Path, tmp_path: Path) -> None:
    labelled = adapt(weights, noise, tmp_path / "labelled", noise).answer
    assert labelled is not None
    assert not labelled.gained
    assert any("look like noise" in each for each in labelled.remarks)
    blind = adapt(weights, noise, tmp_path / "blind").answer
    assert blind is not None
    assert not blind.gained
    assert any("look like noise" in each for each in blind.remarks)
    assert blind.verdict.startswith("Without labels it is not known")
    assert same_weights(load_encoder(str(tmp_path / "blind")).module, load_encoder(weights).module)


@pytest.mark.full
def test_the_retained_set_is_judged_alike(weights: str, photos: Path, noise: Path, tmp_path: Path) -> None:
    answer = adapt(weights, noise, tmp_path / "out", noise, retain=photos).answer
    assert answer is not None
    assert [each.measure for each in answer.retained] == ["kNN", "linear probe"]
    assert answer.retained[0].difference.images == 60
    assert any(line.startswith("retained, kNN: ") for line in answer.lines())


@pytest.mark.full
def test_a_stopped_adaptation_continues(
    weights: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after two steps; the same call ends with the weights of one that nobody stopped."""
    whole = adapt(weights, photos, tmp_path / "whole", photos, epochs=2)
    poll = sslkit.engine.loop.poll_flags

    polled = iter(range(1000))

    def stop_early(run: Any, batch: Any) -> Any:
        if next(polled) == 1:
            run.stop.received = "SIGTERM"
        return poll(run, batch)

    with monkeypatch.context() as patched:
        patched.setattr(sslkit.engine.loop, "poll_flags", stop_early)
        stopped = adapt(weights, photos, tmp_path / "stopped", photos, epochs=2)
    assert stopped.stopped
    assert stopped.answer is None
    assert not (tmp_path / "stopped/encoder").exists()
    continued = adapt(weights, photos, tmp_path / "stopped", photos, epochs=2)
    assert continued.answer == whole.answer
    ends = [load_encoder(str(tmp_path / name / "run")).module for name in ("whole", "stopped")]
    assert same_weights(*ends)


def test_command(weights: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["adapt", weights, "--data", str(photos), "--labelled", str(photos), "--epochs", "1", "--size", "32"]
    words += ["--set", "data.workers=0"]
    code, out, _ = run(capsys, *words, "--output", str(tmp_path / "out"), "--json")
    assert code == 0
    answer = json.loads(out)
    assert answer["gained"] is False
    assert answer["comparisons"][0]["difference"]["images"] == 60
    code, out, _ = run(capsys, *words, "--output", str(tmp_path / "out"))
    assert code == 0
    assert answer["verdict"] in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--way", "most"], "--way most: must be one of all, last, lora"),
        (["--epochs", "1", "--hours", "2"], "give one of them"),
        (["--way", "lora"], "no linear layers of attention or MLP"),
        (["--labelled", "{noise}/class0"], "--labelled"),
        (["--set", "optim.lrr=1"], "optim"),
    ],
)
def test_mistakes(words: list[str], message: str, weights: str, photos: Path, noise: Path, tmp_path: Path) -> None:
    given = [word.format(noise=noise) for word in words]
    given += [] if "--epochs" in given else ["--epochs", "1"]
    found = cli_error(["adapt", weights, "--data", str(photos), "--output", str(tmp_path / "out"), *given])
    assert message in found
    assert not (tmp_path / "out/run/recipe.toml").exists()


def test_too_few_images_and_a_foreign_folder(weights: str, photos: Path, noise: Path, tmp_path: Path) -> None:
    few = tmp_path / "few"
    few.mkdir()
    for file in sorted(noise.rglob("*.png"))[:5]:
        (few / file.name).write_bytes(file.read_bytes())
    found = cli_error(["adapt", weights, "--data", str(few), "--output", str(tmp_path / "out")])
    assert "has 5 images; adapting needs 16 or more" in found
    found = cli_error(["adapt", weights, "--data", str(photos), "--output", str(few)])
    assert "is not empty and holds no adaptation" in found
    assert found.rstrip().endswith(f"--output {few}-2")
    assert "did you mean 'resnet18'?" in cli_error(["adapt", "resnet_18", "--data", str(photos)])


@pytest.mark.full
def test_another_adaptation_is_not_continued(weights: str, photos: Path, tmp_path: Path) -> None:
    """Nor judged: the folder keeps what it holds, and the message names what differs."""
    out = tmp_path / "out"
    first = adapt(weights, photos, out)
    assert first.answer is not None
    before = (out / "answer.json").read_text()
    common = ["adapt", weights, "--data", str(photos), "--output", str(out), "--set", "data.workers=0", "--size", "32"]
    assert "train.epochs: 1 -> 2" in cli_error([*common, "--epochs", "2"])
    assert "adapt.last_blocks" in cli_error([*common, "--way", "last"])
    refused = cli_error([*common, "--size", "64"])
    assert f"to adapt in a new folder: sslkit adapt {weights}" in refused
    assert f"--size 64 --output {out}-2" in refused
    assert "--set views.size=64: give --size 64 instead" in cli_error([*common, "--set", "views.size=64"])
    other = tmp_path / "other"
    timm.models.save_for_hf(timm.create_model("test_resnet", num_classes=0), str(other), safe_serialization=True)
    assert "backbone.pretrained" in cli_error([*common[:1], str(other), *common[2:]])
    assert (out / "answer.json").read_text() == before
    assert adapt(weights, photos, out, size=0, epochs=0).answer == first.answer  # size and length are the run's


@pytest.mark.full
def test_the_size_is_chosen(photos: Path, tmp_path: Path) -> None:
    """A ViT for 160 pixels is judged at four sizes, and written for the one that was best."""
    folder = tmp_path / "weights"
    torch.manual_seed(5)
    timm.models.save_for_hf(timm.create_model("test_vit", num_classes=0), str(folder), safe_serialization=True)
    answer = adapt(str(folder), photos, tmp_path / "out", photos, size=0, way="last").answer
    assert answer is not None
    plain = {use.size: use.accuracy for use in answer.uses if use.epoch == 0 and not use.whitened}
    assert sorted(plain) == [32, 64, 160]
    trained = {use.size for use in answer.uses if use.epoch}
    assert trained == {max(plain, key=lambda size: plain[size])}
    written = timm.create_model(f"local-dir:{tmp_path / 'out/encoder'}", pretrained=True)
    assert written.pretrained_cfg["input_size"] == (3, answer.size, answer.size)
    assert written.patch_embed.img_size == (answer.size, answer.size)


def test_weights_of_other_channels_are_refused(photos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "weights"
    model = timm.create_model("test_resnet", num_classes=0, in_chans=4)
    timm.models.save_for_hf(model, str(folder), safe_serialization=True)
    found = cli_error(["adapt", str(folder), "--data", str(photos), "--output", str(tmp_path / "out")])
    assert "takes images of 4 channels, sslkit adapt only RGB" in found
