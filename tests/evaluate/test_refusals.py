"""What evaluation refuses in one sentence instead of scoring: no numbers, impossible rates and seeds, few images."""

import json
from pathlib import Path

import pytest
import timm
import torch
from conftest import cli_error
from PIL import Image
from torch import Tensor

from sslkit.cli import main
from sslkit.data.sources.image_source import DataConfig
from sslkit.errors import UserError
from sslkit.evaluate import LinearProtocol, evaluate_linear, knn_accuracy, linear_accuracy
from sslkit.evaluate.detection.detector_training import DetectProtocol
from sslkit.evaluate.evaluation_result import RANDOM_DRAWS
from sslkit.evaluate.labelled_data import open_pair
from sslkit.evaluate.probes.finetune import FinetuneProtocol
from sslkit.evaluate.probes.knn import KnnProtocol
from sslkit.evaluate.probes.sweep import SweepProtocol, sweep


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The same encoder whole, and with a weight that is not a number."""
    torch.manual_seed(9)  # not a seed of the random twins
    model, folders = timm.create_model("test_resnet", num_classes=0), {}
    for name in ("whole", "nan"):
        folders[name] = str(tmp_path_factory.mktemp("encoder") / name)
        timm.models.save_for_hf(model, folders[name], safe_serialization=True)
        model.conv1[0].weight.data[0, 0, 0, 0] = float("nan")
    return folders


@pytest.mark.parametrize("words", [["knn", "--k", "3"], ["linear"], ["sweep", "--epochs", "1"], ["diagnose"]])
@pytest.mark.parametrize("cache", [True, False])
def test_an_encoder_whose_features_are_not_numbers(
    encoders: dict[str, str], class_folders: Path, words: list[str], cache: bool
) -> None:
    if words[0] == "diagnose" and not cache:
        words = [*words, "--images", "4", "--views", "2"]
    else:
        words = words if cache else [*words, "--no-cache"]
    command = ["eval", words[0], encoders["nan"], "--data", str(class_folders), *words[1:]]
    assert cli_error(command) == (
        f"sslkit: {encoders['nan']}: the features are not finite (NaN or infinity), so they cannot be evaluated"
    )


def blobs(rows: int) -> tuple[Tensor, Tensor]:
    labels = torch.arange(rows) % 4
    return 5 * torch.eye(4)[labels] + torch.randn(rows, 4, generator=torch.Generator().manual_seed(rows)), labels


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("side", ["train", "test"])
def test_features_that_are_not_numbers_given_from_python(value: float, side: str) -> None:
    (train, labels), (test, truth) = blobs(40), blobs(20)
    {"train": train, "test": test}[side][7, 2] = value
    for score in (
        lambda: knn_accuracy(train, labels, test, truth, KnnProtocol(3)),
        lambda: linear_accuracy(train, labels, test, truth),
        lambda: linear_accuracy(
            lambda _epoch: train, labels, test, truth, LinearProtocol.from_name("dino", is_vit=True)
        ),
        lambda: sweep({"out": train}, labels, {"out": test}, truth, SweepProtocol(epochs=1)),
    ):
        with pytest.raises(UserError, match="the features are not finite"):
            score()


@pytest.mark.parametrize("precision", [torch.float16, torch.bfloat16, torch.float64])
def test_features_of_any_precision_score_as_in_float32(precision: torch.dtype) -> None:
    (train, labels), (test, truth) = blobs(200), blobs(80)
    train, test = train.to(precision), test.to(precision)
    for centre in (False, True):
        protocol = KnnProtocol(5, centre=centre)
        expected = knn_accuracy(train.float(), labels, test.float(), truth, protocol)
        assert knn_accuracy(train, labels, test, truth, protocol) == expected
        assert knn_accuracy(train, labels, test.double(), truth, protocol) == expected
    for name in ("logistic", "moco_v3"):
        named = LinearProtocol.from_name(name, is_vit=True)
        assert linear_accuracy(train, labels, test, truth, named) == linear_accuracy(
            train.float(), labels, test.float(), truth, named
        )
    grid = SweepProtocol(epochs=2)
    assert sweep({"out": train}, labels, {"out": test}, truth, grid) == sweep(
        {"out": train.float()}, labels, {"out": test.float()}, truth, grid
    )


def test_too_few_training_images() -> None:
    (train, labels), (test, truth) = blobs(40), blobs(20)
    with pytest.raises(UserError, match="at least 2 training images, not 1"):
        linear_accuracy(train[:1], labels[:1], test, truth)
    with pytest.raises(UserError, match="at least 3 training images, not 2"):
        sweep({"out": train[:2]}, labels[:2], {"out": test}, truth, SweepProtocol(epochs=1))
    assert 0 <= linear_accuracy(train[:2], labels[:2], test, truth).accuracy <= 1
    assert 0 <= sweep({"out": train[:3]}, labels[:3], {"out": test}, truth, SweepProtocol(epochs=1)).accuracy <= 1


@pytest.mark.parametrize(
    ("command", "words", "sentence"),
    [
        ("sweep", "--lr nan", "--lr: must be finite and above 0, not nan"),
        ("sweep", "--lr 0.1,inf", "--lr: must be finite and above 0, not inf"),
        ("sweep", "--lr -1", "--lr: must be finite and above 0, not -1"),
        ("sweep", "--lr 0", "--lr: must be finite and above 0, not 0"),
        ("sweep", "--weight-decay -1", "--weight-decay: must be finite and 0 or more, not -1"),
        ("sweep", "--weight-decay nan", "--weight-decay: must be finite and 0 or more, not nan"),
        ("sweep", "--weight-decay inf", "--weight-decay: must be finite and 0 or more, not inf"),
        ("sweep", "--seed 99999999999999999999", "--seed: the seed must be between 0 and 9223372036854775806"),
        ("sweep", "--seed -1", "--seed: the seed must be between 0 and"),
        ("diagnose", "--seed 99999999999999999999", "--seed: the seed must be between 0 and"),
        ("finetune", "--seed -1", "--seed: the seed must be between 0 and"),
        ("finetune", "--seed 99999999999999999999", "--seed: the seed must be between 0 and"),
        ("finetune", "--lr nan", "Invalid value for '--lr'"),
        ("finetune", "--lr inf", "--lr and --layer-decay: must be finite and above 0, not inf"),
        ("finetune", "--labels nan-shot", "--labels nan-shot: must be a whole number of images per class"),
        ("finetune", "--labels inf-shot", "--labels inf-shot: must be a whole number of images per class"),
        ("finetune", "--labels 0%", "--labels 0%: the share must be above 0%"),
        ("finetune", "--labels nan%", "--labels nan%: the share must be above 0%"),
        ("finetune", "--labels 101%", "--labels 101%: the share must be above 0% and at most 100%"),
        ("detect", "--seed -1", "--seed: the seed must be between 0 and"),
        ("detect", "--lr nan", "Invalid value for '--lr'"),
        ("detect", "--lr inf", "--lr: must be finite and 0 or more, not inf"),
    ],
)
def test_words_that_no_evaluation_can_use(
    encoders: dict[str, str], class_folders: Path, command: str, words: str, sentence: str
) -> None:
    said = cli_error(["eval", command, encoders["whole"], "--data", str(class_folders), *words.split(" ")])
    assert sentence in said


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"caf\xe9.png\n", "cannot be read as a text file"),
        (b"\n \n", "the file is empty; write one image name per line"),
    ],
)
def test_lists_of_labels_that_are_none(
    encoders: dict[str, str], class_folders: Path, tmp_path: Path, content: bytes, sentence: str
) -> None:
    (tmp_path / "names.txt").write_bytes(content)
    words = ["eval", "finetune", encoders["whole"], "--data", str(class_folders), "--labels"]
    assert f"--labels {tmp_path / 'names.txt'}: {sentence}" in cli_error([*words, str(tmp_path / "names.txt")])


def test_protocols_made_in_python_are_checked_too() -> None:
    for make in (LinearProtocol, SweepProtocol, lambda seed: FinetuneProtocol("x", 1, 8, 0.1, seed=seed)):
        with pytest.raises(UserError, match="the seed must be between 0"):
            make(seed=-1)
    with pytest.raises(UserError, match="not -1"):
        DetectProtocol("x", 1, (), (64,), 0, base_lr=-1.0)
    with pytest.raises(UserError, match="2 images per batch"):
        SweepProtocol(batch_size=1)


def test_a_damaged_cache_is_extracted_again(
    capsys: pytest.CaptureFixture[str],
    encoders: dict[str, str],
    class_folders: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SSLKIT_CACHE", str(tmp_path))
    printed = []
    for _ in range(2):
        with pytest.raises(SystemExit) as ended:
            main(["eval", "knn", encoders["whole"], "--data", str(class_folders), "--k", "3", "--json"])
        assert not ended.value.code
        printed.append(json.loads(capsys.readouterr().out))
        files = sorted(tmp_path.rglob("features.safetensors"))
        for file in files:
            file.write_bytes(file.read_bytes()[:-5])
    assert len(files) == 2 * (1 + RANDOM_DRAWS)
    assert printed[0] == printed[1]


def test_a_split_is_not_scored_on_itself() -> None:
    with pytest.raises(UserError, match="--test-split train is also the training split"):
        open_pair(DataConfig(path="builtin:fashion_mnist"), "train", "train")


def test_a_split_without_labels_is_not_picked(tmp_path: Path) -> None:
    """As Kaggle's ``test``: another with labels is, else a part of what is learned from. By name it is refused."""
    picture = Image.new("RGB", (8, 8))
    for name in ("train/a", "train/b", "test"):
        (tmp_path / name).mkdir(parents=True)
        for number in range(5):
            picture.save(tmp_path / name / f"{number}.png")
    pair = open_pair(DataConfig(path=str(tmp_path)))
    assert (len(pair.train), len(pair.test), pair.classes) == (8, 2, ["a", "b"])
    assert pair.description.endswith("; splits without labels: test (--test-split names another)")
    with pytest.raises(UserError, match="has no labels"):
        open_pair(DataConfig(path=str(tmp_path)), "train", "test")
    for name in "ab":
        (tmp_path / "val" / name).mkdir(parents=True)
        picture.save(tmp_path / "val" / name / "0.png")
    pair = open_pair(DataConfig(path=str(tmp_path)))
    assert (pair.split, len(pair.test)) == ("train / val", 2)


def test_logistic_regression_has_no_epochs() -> None:
    with pytest.raises(UserError, match="does not apply to the protocol logistic"):
        evaluate_linear("test_resnet", DataConfig(path="builtin:fashion_mnist"), "logistic", epochs=5)
