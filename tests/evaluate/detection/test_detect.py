"""Detectors wired, trained and tabulated as the papers' are."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from conftest import small_recipe
from rich.console import Console
from torch import nn
from torch.optim import AdamW

import sslkit
from sslkit.cli import main
from sslkit.errors import UserError
from sslkit.evaluate.detection.annotations import open_annotated
from sslkit.evaluate.detection.detect import detect_objects, score_detector
from sslkit.evaluate.detection.detector import RegionPool, make_detector
from sslkit.evaluate.detection.detector_training import (
    DetectProtocol,
    _compute_batchnorm_statistics,
    _make_optimizer,
    _TrainingImages,
    train_detector,
)
from sslkit.evaluate.features.encoder import Encoder, build_backbone, fingerprint

PREPROCESSING = {
    **{"input_size": (3, 32, 32), "interpolation": "bilinear", "crop_pct": 1.0},
    **{"mean": (0.3, 0.31, 0.32), "std": (0.35, 0.36, 0.37)},
}
TINY = {"layers": [1, 1, 1, 1], "channels": [16, 32, 48, 64]}
QUICK = replace(
    DetectProtocol.from_name("voc").at_short_side(64),
    steps=2,
    batch_size=2,
    regions=8,
    precise_bn_steps=1,
    base_lr=0.08,
)
SHAPE: dict[str, Any] = {"short_sides": (48, 64), "longest_side": 107, "anchor_sizes": (4.0, 8.0, 16.0, 32.0, 64.0)}


def tiny_encoder(seed: int = 0) -> Encoder:
    torch.manual_seed(seed)
    return Encoder(
        build_backbone("resnet18", TINY, small_stem=True), PREPROCESSING, "tiny", "resnet18", TINY, small_stem=True
    )


def encoder_of(name: str, **model_args: Any) -> Encoder:
    torch.manual_seed(0)
    return Encoder(timm.create_model(name, num_classes=0, **model_args), PREPROCESSING, name, name, model_args)


def test_mirrored_pictures_keep_boxes_and_masks_together(rendered: Callable[[str], Path]) -> None:
    pictures = open_annotated(rendered("coco")).train
    items = _TrainingImages(pictures, 48, seed=0, masks=True)
    seen: dict[float, int] = {}
    for position in range(48):
        image, target = items[position]
        for box, mask in zip(target["boxes"], target["masks"], strict=True):
            rows, columns = mask.any(dim=1).nonzero().flatten(), mask.any(dim=0).nonzero().flatten()
            assert box.tolist() == [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
            garment = image[0][mask.bool()].float()
            assert garment.min() > 20  # the mask covers the garment, not the ground
        seen[float(image.double().mean())] = seen.get(float(image.double().mean()), 0) + 1
    assert set(seen.values()) == {2}, "each picture once a pass"


def test_protocols_have_their_sources_numbers() -> None:
    voc, coco = DetectProtocol.from_name("voc"), DetectProtocol.from_name("coco")
    assert (voc.steps, voc.batch_size, voc.warmup_steps, voc.peak_lr(vit=False)) == (24000, 16, 100, 0.02)
    assert voc.short_sides == (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)
    assert coco.short_sides == (640, 672, 704, 736, 768, 800)
    assert (coco.steps, coco.warmup_steps) == (180000, 1000)
    # detectron2's WarmupMultiStepLR: a thousandth, then linear; a tenth after each milestone.
    expected = {0: 2e-5, 50: 0.02 * (0.001 * 0.5 + 0.5), 100: 0.02, 17999: 0.02, 18000: 2e-3, 21999: 2e-3, 22000: 2e-4}
    assert {step: voc.lr_at(step, vit=False) for step in expected} == pytest.approx(expected)
    assert [coco.lr_at(step, vit=False) for step in (119999, 120000, 160000)] == pytest.approx([0.02, 2e-3, 2e-4])
    small = replace(voc.at_short_side(200), batch_size=4, steps=400)
    assert (small.short_sides[0], small.short_sides[-1], small.longest_side) == (120, 200, 333)
    assert small.anchor_sizes == (8, 16, 32, 64, 128)
    assert (small.peak_lr(vit=False), small.lr_at(40, vit=False)) == pytest.approx((0.005, 0.005))
    assert small.lr_at(300, vit=False) == pytest.approx(0.0005)
    with pytest.raises(UserError, match="did you mean 'coco'"):
        DetectProtocol.from_name("cocoo")


def test_regions_are_sampled_at_pixel_centres() -> None:
    """On a ramp, the mean over a bin is the ramp's value at the bin's centre, half a pixel left in map coordinates."""
    for stride in (4, 16):
        pool = RegionPool((stride,), 5, middle_region=56.0)
        ramp = torch.arange(40.0).expand(1, 1, 40, 40)
        box = torch.tensor([[7.0, 9.0, 7.0 + 5 * stride, 9.0 + 10 * stride]])
        centres = 7.0 + stride * (torch.arange(5) + 0.5)
        torch.testing.assert_close(pool({"0": ramp}, [box])[0, 0, 2], centres / stride - 0.5)


def test_regions_go_to_the_level_of_their_size() -> None:
    """arXiv:1612.03144, equation 1: level 4 for 224 pixels, one more for each doubling; ours counts from 0 at 2."""
    sides = torch.tensor([10.0, 111.0, 113.0, 223.0, 224.0, 447.0, 449.0, 3000.0])
    boxes = torch.stack([torch.zeros(8), torch.zeros(8), sides / 2, sides * 2], dim=1)
    paper = [min(max(int(np.floor(4 + np.log2(side / 224))), 2), 5) - 2 for side in sides.tolist()]
    pool = RegionPool((4, 8, 16, 32), 1, middle_region=224.0)
    assert pool.levels_of(boxes).tolist() == paper
    maps = {str(level): torch.full((2, 1, 20, 20), float(level)) for level in range(4)}
    assert pool(maps, [boxes[:3].clamp_max(30), boxes[:1]]).flatten().tolist() == [0.0] * 4
    large = torch.tensor([[0.0, 0.0, 250.0, 250.0]])
    assert pool(maps, [large, boxes[:1]]).flatten().tolist() == [2.0, 0.0]


def test_c4_is_mocos(rendered: Callable[[str], Path]) -> None:
    encoder = encoder_of("resnet18")
    detector = make_detector(encoder, 2, "c4", masks=True, **SHAPE)
    assert detector.backbone.strides == (16,)
    assert detector.transform.image_mean == [0.3, 0.31, 0.32]
    assert detector.transform.image_std == [0.35, 0.36, 0.37]
    stage = detector.roi_heads.box_head.stage
    assert isinstance(stage.norm, nn.BatchNorm2d)
    assert detector.roi_heads.mask_head is stage
    own = encoder.module.state_dict()
    for name, tensor in stage.res5.state_dict().items():
        assert torch.equal(tensor, own[f"layer4.{name}"])
    for name, tensor in detector.backbone.stages.state_dict().items():
        assert torch.equal(tensor, own[name])
    assert all(param.requires_grad for param in detector.parameters())
    assert detector.rpn.anchor_generator.sizes == ((4.0, 8.0, 16.0, 32.0, 64.0),)
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        features = detector.eval().backbone(images)["0"]
        expected = encoder.module.eval().forward_intermediates(images, indices=[3], intermediates_only=True)[0]
    torch.testing.assert_close(features, expected)


@pytest.mark.parametrize(
    ("name", "model_args", "strides"),
    [
        ("test_resnet", {}, (4, 8, 16, 32)),
        ("test_convnext", {}, (4, 8, 16, 32)),
        ("test_vit", {"img_size": 32}, (4, 8, 16, 32)),
    ],
)
def test_pyramids_have_four_levels_and_a_pooled_one(
    name: str, model_args: dict[str, Any], strides: tuple[int, ...]
) -> None:
    detector = make_detector(encoder_of(name, **model_args), 2, "fpn", masks=False, **SHAPE)
    assert detector.backbone.strides == strides
    with torch.no_grad():
        maps = detector.eval().backbone(torch.zeros(1, 3, 64, 128))
    sides = {key: tuple(each.shape[1:]) for key, each in maps.items()}
    expected = {str(level): (256, 64 // stride, 128 // stride) for level, stride in enumerate(strides)}
    assert sides == {**expected, "pool": (256, 1, 2)}


@pytest.mark.parametrize(
    ("name", "arch", "sentence"),
    [
        ("test_vit", "c4", "supports ResNets only"),
        ("vit_tiny_patch14_dinov2", "fpn", "patches of 14 pixels"),
        ("mixer_s32_224", "fpn", "does not take images of any size"),
    ],
)
def test_encoders_that_cannot_are_refused(name: str, arch: Any, sentence: str) -> None:
    args: dict[str, Any] = {}
    if name == "vit_tiny_patch14_dinov2":
        name, args = "vit_tiny_patch16_224", {"patch_size": 14, "img_size": 28}
    with pytest.raises(UserError, match=sentence):
        make_detector(encoder_of(name, **args), 2, arch, masks=False, **SHAPE)


def test_batchnorm_is_measured_over_batches() -> None:
    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, images: list[torch.Tensor], targets: list[Any]) -> dict[str, torch.Tensor]:
            return {"loss": self.norm(torch.stack(images)).sum()}

    detector = Norm()
    pictures = torch.randint(0, 256, (3, 2, 3, 5, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    _compute_batchnorm_statistics(
        detector, iter([[(image, {}) for image in batch] for batch in pictures]), torch.device("cpu"), 0
    )
    values = (pictures.double() / 255).transpose(1, 2).flatten(2)
    torch.testing.assert_close(detector.norm.running_mean.double(), values.mean(dim=2).mean(dim=0), atol=1e-6, rtol=0)
    torch.testing.assert_close(detector.norm.running_var.double(), values.var(dim=2).mean(dim=0), atol=1e-6, rtol=0)
    assert detector.norm.momentum == 0.1


def test_training_repeats_moves_everything_and_leaves_the_encoder_alone(rendered: Callable[[str], Path]) -> None:
    pair, encoder = open_annotated(rendered("coco")), tiny_encoder()
    before, state = fingerprint(encoder.module), torch.get_rng_state()
    detectors = [train_detector(encoder, pair, QUICK, arch="c4", masks=True, workers=each) for each in (0, 1)]
    assert fingerprint(detectors[0]) == fingerprint(detectors[1])
    assert fingerprint(encoder.module) == before
    detect_objects(detectors[0], pair.test[:1], masks=True)
    assert torch.equal(torch.get_rng_state(), state)
    fresh = make_detector(encoder, 2, "c4", masks=True, **SHAPE).state_dict()
    moved = {name for name, tensor in detectors[0].state_dict().items() if not torch.equal(tensor, fresh[name])}
    for name in ("conv1.weight", "bn1.weight", "bn1.running_mean", "layer1.0.conv1.weight"):
        assert f"backbone.stages.{name}" in moved


def test_vits_are_trained_as_vitdets(rendered: Callable[[str], Path]) -> None:
    encoder = encoder_of("test_vit", img_size=32)
    detector = make_detector(encoder, 2, "fpn", masks=False, **SHAPE)
    optimizer = _make_optimizer(detector, 1e-4, vit=True)
    decay_of = {param: group["weight_decay"] for group in optimizer.param_groups for param in group["params"]}
    assert isinstance(optimizer, AdamW)
    assert set(decay_of) == set(detector.parameters())
    vit = detector.backbone.model
    assert [decay_of[each] for each in (vit.pos_embed, vit.blocks[0].norm1.weight, vit.norm.bias)] == [0.0] * 3
    assert [decay_of[each] for each in (vit.patch_embed.proj.weight, vit.blocks[0].mlp.fc1.bias)] == [0.1] * 2
    pair = open_annotated(rendered("coco"))
    trained = train_detector(encoder, pair, replace(QUICK, steps=1, base_lr=0.0), arch="fpn")
    # AdamW's first step is the rate itself, whatever the gradient: 2.5e-5 at 16 pictures, of which QUICK has 2.
    moved = (trained.backbone.model.blocks[0].norm1.weight - vit.blocks[0].norm1.weight).abs()
    assert moved.max().item() == pytest.approx(replace(QUICK, base_lr=0.0).lr_at(0, vit=True), rel=0.02)
    assert replace(QUICK, base_lr=0.0).peak_lr(vit=True) == pytest.approx(2.5e-5 / 8)


def test_a_rate_too_high_is_said(rendered: Callable[[str], Path]) -> None:
    pair = open_annotated(rendered("coco"))
    with pytest.raises(UserError, match="use a lower --lr"):
        train_detector(tiny_encoder(), pair, replace(QUICK, steps=12, base_lr=1e20), arch="c4")


@pytest.mark.full
def test_the_command_tabulates_and_records(
    rendered: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "a run whose path is longer than a column"
    tiny = {"name": "resnet18", "args": TINY, "small_stem": True}
    sslkit.train(small_recipe("moco_v2", "resnet18", train={"max_steps": 1}, backbone=tiny), run)
    numbers = ["--steps", "2", "--batch-size", "2", "--regions", "8", "--short-side", "64", "--masks"]
    command = ["eval", "detect", str(run), "--data", str(rendered("coco")), *numbers]
    with pytest.raises(SystemExit) as left:
        main([*command, "--json"])
    assert left.value.code == 0
    result = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert [score["encoder"] for score in result["scores"]] == [str(run), "from scratch"]
    names = ["AP", "AP50", "AP75", "mask AP", "mask AP50", "mask AP75"]
    assert all(list(score["measures"]) == names for score in result["scores"])
    own, baseline = result["scores"]
    assert baseline["difference"]["points"] == pytest.approx(100 * (own["accuracy"] - baseline["accuracy"]))
    assert "training from scratch" in result["verdict"]
    assert (result["protocol"]["arch"], result["protocol"]["short_sides"][-1]) == ("c4", 64)
    row = json.loads((run / "results.jsonl").read_text().splitlines()[-1])
    assert (row["measure"], row["evaluation"]) == ("box AP", "detect voc c4 masks, 2 steps of 2")
    monkeypatch.setattr(sys.modules["sslkit.cli.output"], "console", Console(width=80))
    with pytest.raises(SystemExit):
        main(command)
    table = capsys.readouterr().out
    assert "…" not in table, "nothing is cut at 80 columns"
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in table.splitlines() if "mask AP75" in line]
    assert len(rows[0]) == 3, "a row for each measure, a column for each encoder"
    with pytest.raises(SystemExit) as left:
        main(["eval", "detect", str(run), "--data", str(rendered("coco")), "--arch", "c5"])
    assert left.value.code == 2
    assert capsys.readouterr().err == "sslkit: --arch: must be c4 or fpn, not 'c5'\n"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_it_learns_to_find_boots(garments: Any, tmp_path: Path) -> None:
    """A net of 0.2 million weights from nothing, 80 updates of 4 pictures: it had 0.15 when this was written."""
    garments.render(tmp_path / "boots", "coco", {"train": 120, "val": 40}, side=64, classes=1)
    pair = open_annotated(tmp_path / "boots")
    protocol = replace(QUICK, steps=80, batch_size=4, base_lr=0.32, regions=24, precise_bn_steps=10)
    untrained = train_detector(tiny_encoder(), pair, replace(protocol, steps=1), arch="c4")
    trained = train_detector(tiny_encoder(), pair, protocol, arch="c4")
    before, after = (score_detector(each, pair).measures["AP50"] for each in (untrained, trained))
    assert before < 0.02
    assert after > 0.05
