"""Fine-tuning: protocols' numbers, parameter groups, the classifier's place, and what it learns."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import small_recipe
from PIL import Image
from safetensors.torch import load_file
from timm.scheduler import CosineLRScheduler
from torch import nn

import sslkit
from sslkit.data.sources.image_source import DataConfig, ImageSource, open_source
from sslkit.engine.projector import first_projector_layers
from sslkit.errors import UserError
from sslkit.evaluate.features.encoder import Encoder, fingerprint
from sslkit.evaluate.features.extraction import extract_features, seed_from
from sslkit.evaluate.probes.finetune import (
    FinetuneProtocol,
    _EpochImages,
    _make_optimizer,
    _set_lr,
    _training_transform,
    finetune,
    make_classifier,
)
from sslkit.evaluate.probes.knn import share_correct
from sslkit.evaluate.probes.scoring import evaluate_finetune

SIZE = {"input_size": (3, 32, 32), "interpolation": "bilinear", "mean": (0.3,) * 3, "std": (0.35,) * 3, "crop_pct": 1.0}
QUICK = FinetuneProtocol("quick", epochs=3, batch_size=32, base_lr=0.05, smallest_crop=0.8)


def encoder_of(name: str, **model_args: object) -> Encoder:
    torch.manual_seed(0)
    return Encoder(timm.create_model(name, num_classes=0, **model_args), SIZE, name, name, dict(model_args))


@pytest.fixture(scope="module")
def two_classes() -> tuple[ImageSource, torch.Tensor]:
    """192 real pictures of trousers and boots."""
    source = open_source(DataConfig(path="builtin:fashion_mnist", split="test"))
    labels = source.labels()
    chosen = [index for index, label in enumerate(labels) if label in ("Trouser", "Ankle boot")][:192]
    numbers = torch.tensor([int(labels[index] == "Trouser") for index in chosen])
    return source.subset(np.array(chosen)), numbers


def test_protocols_have_their_sources_numbers() -> None:
    deit = FinetuneProtocol.from_name("deit")
    assert (deit.peak_lr(1024), deit.weight_decay, deit.warmup_epochs) == (pytest.approx(1e-3), 0.05, 5)
    assert (deit.mixup, deit.cutmix, deit.smoothing, deit.erase, deit.drop_path) == (0.8, 1.0, 0.1, 0.25, 0.1)
    transfer = FinetuneProtocol.from_name("moco_v3")
    assert (transfer.auto_augment, transfer.smallest_crop, transfer.peak_lr(1024)) == ("", 0.05, pytest.approx(6e-4))
    assert (transfer.epochs, transfer.weight_decay, transfer.warmup_epochs, transfer.erase) == (100, 0.1, 3, 0.0)
    simclr = FinetuneProtocol.from_name("simclr", 0.01)
    assert simclr.peak_lr(1024) == pytest.approx(0.005 * math.sqrt(1024))
    assert (simclr.epochs, simclr.weight_decay, simclr.optimizer) == (60, 0.0, "lars")
    assert (simclr.head_std, simclr.adapt_head) == (0.0, False)
    for labelled, trunk, head in ((0.1, 0.01, 0.2), (0.01, 0.02, 5.0), (1.0, 0.01, 0.2)):
        swav = FinetuneProtocol.from_name("swav", labelled)
        assert (swav.epochs, swav.batch_size, swav.base_lr) == (20, 256, trunk)
        assert swav.base_lr * swav.head_lr == pytest.approx(head)
    with pytest.raises(UserError, match="did you mean 'simclr'"):
        FinetuneProtocol.from_name("simclrr")


@pytest.mark.parametrize(
    "name", ["test_resnet", "test_vit", "test_convnext", "test_mambaout", "mobilenetv4_conv_small"]
)
def test_the_classifier_sits_where_timm_has_it(name: str) -> None:
    encoder = encoder_of(name, **({"img_size": 32} if name == "test_vit" else {}))
    model, head = make_classifier(encoder, 7, drop_path=0.1)
    images = torch.randn(2, 3, 32, 32)
    assert model.get_classifier() is head
    with torch.no_grad():
        logits = model.eval()(images)
        torch.testing.assert_close(logits, head(encoder.module.eval()(images)))
    assert logits.shape == (2, 7)


def test_layer_decay_and_the_heads_rate() -> None:
    model, head = make_classifier(encoder_of("test_vit", img_size=32), 5)
    protocol = replace(QUICK, optimizer="adamw", layer_decay=0.5, head_lr=3.0, weight_decay=0.1)
    groups = _make_optimizer(model, head, protocol, 1.0).param_groups
    scale_of = {param: (group["scale"], group["weight_decay"]) for group in groups for param in group["params"]}
    assert set(scale_of) == set(model.parameters())
    assert scale_of[head.weight] == (3.0, 0.1)
    assert scale_of[head.bias] == (3.0, 0.0)
    depth = len(model.blocks)
    assert scale_of[model.blocks[depth - 1].mlp.fc1.weight] == (0.5, 0.1)
    assert scale_of[model.blocks[0].mlp.fc1.weight] == (0.5**depth, 0.1)
    assert scale_of[model.patch_embed.proj.weight] == (0.5 ** (depth + 1), 0.1)
    assert scale_of[model.patch_embed.proj.bias][1] == 0.0


def test_positions_and_tokens_of_a_vit_do_not_decay() -> None:
    model, head = make_classifier(encoder_of("test_vit", img_size=32), 5)
    groups = _make_optimizer(model, head, FinetuneProtocol.from_name("deit"), 1.0).param_groups
    decay_of = {param: group["weight_decay"] for group in groups for param in group["params"]}
    assert decay_of[model.pos_embed] == decay_of[model.cls_token] == 0.0
    assert decay_of[model.blocks[0].mlp.fc1.weight] == 0.05


def test_simclrs_classifier_moves_by_its_own_gradient() -> None:
    """Its LARS leaves ``head_supervised`` alone: the step is rate times gradient, whatever the weights' norm is."""
    model, head = make_classifier(encoder_of("test_resnet"), 3)
    optimizer = _make_optimizer(model, head, FinetuneProtocol.from_name("simclr"), 0.1)
    for param in model.parameters():
        param.grad = torch.full_like(param, 0.5)
    body = model.layer1[0].conv1.weight
    before, body_before = head.weight.detach().clone(), body.detach().clone()
    optimizer.step()
    torch.testing.assert_close(before - head.weight.detach(), torch.full_like(before, 0.05))
    adapted = 0.001 * body_before.norm() / body.grad.norm() * 0.1 * 0.5
    torch.testing.assert_close(body_before - body.detach(), adapted.expand_as(body_before), rtol=1e-3, atol=1e-7)


def test_deits_rate_is_timms() -> None:
    protocol = replace(FinetuneProtocol.from_name("deit"), epochs=20)
    peak = protocol.peak_lr(1024)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=peak)
    optimizer.param_groups[0]["scale"] = 1.0
    theirs = CosineLRScheduler(
        torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=peak),
        t_initial=20,
        lr_min=1e-5,
        warmup_t=5,
        warmup_lr_init=1e-6,
    )
    for epoch in range(20):
        _set_lr(optimizer, protocol, epoch + 0.7, 1024)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(theirs._get_lr(epoch)[0], rel=1e-9)


def test_randaugment_survives_its_strongest_posterize() -> None:
    """timm asks for no bits at all in some 0.15 % of images, which Pillow 13 refuses."""
    transform = _training_transform(encoder_of("test_resnet"), FinetuneProtocol.from_name("deit"))
    [augment] = [part for part in transform.transforms if hasattr(part, "ops")]
    operation = next(each for each in augment.ops if each.name.startswith("Posterize"))
    operation.prob, operation.magnitude, operation.magnitude_std = 1.0, 10, 0.0
    image = Image.fromarray(np.arange(32 * 32 * 3, dtype=np.uint8).reshape(32, 32, 3))
    assert set(np.unique(np.asarray(operation(image)))) == {0, 128}
    operation.magnitude = 0
    assert np.array_equal(np.asarray(operation(image)), np.asarray(image) & 0xF0)


@pytest.mark.parametrize("batch_size", [7, 1])
def test_a_batch_that_is_odd(two_classes: tuple[ImageSource, torch.Tensor], batch_size: int) -> None:
    """Images are mixed in pairs."""
    source, labels = two_classes
    protocol = replace(FinetuneProtocol.from_name("deit"), epochs=1, batch_size=batch_size)
    chosen = source.subset(np.arange(20))
    if batch_size == 1:
        with pytest.raises(UserError, match="--batch-size of 2"):
            finetune(encoder_of("test_resnet"), chosen, labels[:20], 2, protocol)
    else:
        finetune(encoder_of("test_resnet"), chosen, labels[:20], 2, protocol)


@pytest.mark.full
def test_it_learns_repeats_and_leaves_the_encoder_alone(two_classes: tuple[ImageSource, torch.Tensor]) -> None:
    source, labels = two_classes
    train, test = np.arange(128), np.arange(128, 192)
    encoder = encoder_of("test_resnet")
    before, state = fingerprint(encoder.module), torch.get_rng_state()
    protocol = replace(QUICK, epochs=10, drop_path=0.1, mixup=0.2)
    models = [finetune(encoder, source.subset(train), labels[:128], 2, protocol, workers=each) for each in (0, 1)]
    assert fingerprint(models[0]) == fingerprint(models[1])
    assert fingerprint(encoder.module) == before
    assert torch.equal(torch.get_rng_state(), state)
    chosen, transform = source.subset(test), encoder.transform()
    logits = extract_features(models[0], chosen, transform, device=next(models[0].parameters()).device)
    assert share_correct(logits.argmax(dim=1), labels[128:]) > 0.9


@pytest.mark.parametrize("name", ["deit", "moco_v3", "simclr", "swav"])
def test_every_protocol_runs(two_classes: tuple[ImageSource, torch.Tensor], name: str) -> None:
    source, labels = two_classes
    said: list[str] = []
    protocol = replace(FinetuneProtocol.from_name(name), epochs=1, batch_size=16)
    encoder = encoder_of("test_resnet")
    model = finetune(encoder, source.subset(np.arange(33)), labels[:33], 2, protocol, log_message=said.append)
    assert said[0].startswith("epoch 1/1: loss ")
    assert fingerprint(model) != fingerprint(make_classifier(encoder, 2)[0])


def test_a_rate_too_high_is_said_before_the_weights_are_lost(two_classes: tuple[ImageSource, torch.Tensor]) -> None:
    source, labels = two_classes
    with pytest.raises(UserError, match="use a lower --lr"):
        finetune(encoder_of("test_vit", img_size=32), source, labels, 2, replace(QUICK, base_lr=1e30))


@pytest.fixture(scope="module")
def simclr_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finetune") / "run"
    recipe = small_recipe("simclr", "test_resnet", train={"max_steps": 2}, method={"projector_layers": 3})
    sslkit.train(recipe, folder)
    return folder


def test_simclr_v2_keeps_the_first_layer_of_its_head(simclr_run: Path) -> None:
    neck = first_projector_layers(simclr_run, 1).eval()
    newest = sorted((simclr_run / "checkpoints").glob("step-*"))[-1]
    saved = load_file(newest / "model.safetensors")
    assert [type(layer).__name__ for layer in neck] == ["Linear", "BatchNorm1d", "ReLU"]
    features = torch.randn(4, neck[0].in_features)
    hidden = features @ saved["projector.0.weight"].T
    mean, variance = saved["projector.1.running_mean"], saved["projector.1.running_var"]
    normed = (hidden - mean) / (variance + 1e-5).sqrt() * saved["projector.1.weight"] + saved["projector.1.bias"]
    torch.testing.assert_close(neck(features), normed.clamp_min(0), atol=1e-5, rtol=1e-5)
    model, head = make_classifier(encoder_of("test_resnet"), 3, neck=neck)
    assert head.in_features == neck[0].out_features
    assert isinstance(model.get_classifier(), nn.Sequential)
    for count in (0, 3):
        with pytest.raises(UserError, match=f"--head-layers {count}: the projector .* has 3 linear"):
            first_projector_layers(simclr_run, count)
    with pytest.raises(UserError, match="is not a run folder"):
        first_projector_layers(simclr_run / "encoder", 1)


def test_judged_beside_the_same_training_from_scratch(simclr_run: Path, class_folders: Path) -> None:
    data = DataConfig(path=str(class_folders))
    result = evaluate_finetune(
        str(simclr_run), data, replace(QUICK, epochs=1), labels="1-shot", neck=first_projector_layers(simclr_run, 1)
    )
    assert [score.encoder for score in result.scores] == [str(simclr_run), "from scratch"]
    assert "1-shot" in result.evaluation
    assert result.protocol["labelled_images"] == len(set(open_source(data).labels()))
    assert result.protocol["neck"] is True
    assert json.dumps(result.protocol)


def test_the_order_of_each_epoch_is_that_of_a_shuffled_loader(two_classes: tuple[ImageSource, torch.Tensor]) -> None:
    """A DataLoader for each epoch, with a generator of the seed and the epoch, as earlier versions had."""
    source, _ = two_classes
    protocol = replace(QUICK, seed=3)
    images = _EpochImages(source, nn.Identity(), protocol)
    found = list(images.batches(32))
    for epoch in range(protocol.epochs):
        generator = torch.Generator().manual_seed(seed_from(3, epoch))
        loader = torch.utils.data.DataLoader(range(192), 32, shuffle=True, generator=generator, drop_last=True)  # type: ignore[arg-type, var-annotated]
        own = found[6 * epoch : 6 * epoch + 6]
        assert [[position for _, position in batch] for batch in own] == [batch.tolist() for batch in loader]
        assert {of for batch in own for of, _ in batch} == {epoch}
    assert len(found) == 6 * protocol.epochs


def test_workers_start_once(two_classes: tuple[ImageSource, torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    source, labels = two_classes
    iterations = []
    start = torch.utils.data.DataLoader.__iter__
    monkeypatch.setattr(torch.utils.data.DataLoader, "__iter__", lambda self: iterations.append(self) or start(self))
    finetune(encoder_of("test_resnet"), source.subset(np.arange(32)), labels[:32], 2, QUICK)
    assert len(iterations) == 1
