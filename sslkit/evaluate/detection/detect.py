"""Detection: an encoder fine-tuned as the backbone of Faster or Mask R-CNN, scored by COCO's average precision.

The transfer of MoCo (arXiv:1911.05722, section 4.2): all layers trained, BatchNorm too.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.utils.data import DataLoader, Dataset

from sslkit.data.decode.background import WHITE
from sslkit.data.loading.loader import start_worker
from sslkit.data.loading.shared_memory import explain_death, prefetch_of
from sslkit.errors import UserError, near_miss
from sslkit.evaluate.detection.annotated_image import Picture
from sslkit.evaluate.detection.annotations import AnnotatedPair, open_annotated
from sslkit.evaluate.detection.average_precision import (
    Found,
    Precision,
    average_precision,
    decode_mask,
    encode_mask,
    require_pycocotools,
)
from sslkit.evaluate.detection.detector import Arch, choose_arch, make_detector
from sslkit.evaluate.detection.masks import check_masks
from sslkit.evaluate.features.extraction import Encoder, load_encoder
from sslkit.evaluate.input_checks import check_rates, check_seed
from sslkit.evaluate.probes.scoring import Judgement, Score
from sslkit.evaluate.protocol import pictures_settings
from sslkit.parts.backbone import family
from sslkit.parts.schedules import warmup_then_steps

Say = Callable[[str], None]
Target = dict[str, Tensor]
Batch = list[tuple[Tensor, Target]]

REFERENCE_BATCH = 16
NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)


@dataclass(frozen=True)
class DetectProtocol:
    """How a detector is trained and tested. The numbers are those of MoCo's detectron2 configurations.

    Attributes:
        name: What it is called in tables.
        steps: Updates.
        milestones: Shares of the steps after which the rate falls to a tenth.
        short_sides: Shorter sides in pixels, ascending, one drawn for each training picture; the last one in testing.
        longest_side: Neither side becomes longer.
        anchor_sizes: Sides of square anchors in pixels.
        regions: Of a picture that the head learns from; in testing it looks at twice as many, at most 1000.
        batch_size: Pictures of an update.
        base_lr: Rate at 16 pictures; it grows with the batch. 0 takes 0.02 with SGD, and for plain ViTs, which are
            trained with AdamW as in ViTDet (arXiv:2203.16527), 2.5e-5, its 1e-4 at 64 pictures.
        warmup_steps: Linear, from a thousandth of the rate; never more than a tenth of the steps.
        precise_bn_steps: Batches over which BatchNorm's statistics are measured after the last update; never more
            than a tenth of the steps.
        seed: Of new layers, order and augmentation.
    """

    name: str
    steps: int
    milestones: tuple[float, ...]
    short_sides: tuple[int, ...]
    warmup_steps: int
    longest_side: int = 1333
    anchor_sizes: tuple[float, ...] = (32.0, 64.0, 128.0, 256.0, 512.0)
    regions: int = 512
    batch_size: int = REFERENCE_BATCH
    base_lr: float = 0.0
    precise_bn_steps: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        check_seed(self.seed, "detect, --seed")
        check_rates((self.base_lr,), "detect, --lr", zero=True)

    @staticmethod
    def named(name: str) -> "DetectProtocol":
        """``voc`` is MoCo's on PASCAL VOC 07+12, 24k updates; ``coco`` its 2x schedule on COCO, 180k updates."""
        if name not in _PROTOCOLS:
            raise UserError(
                f"detect: unknown protocol {name!r}{near_miss(name, _PROTOCOLS)}; there are {sorted(_PROTOCOLS)}"
            )
        return _PROTOCOLS[name]

    def at_short_side(self, side: int) -> "DetectProtocol":
        """The same on smaller or larger pictures: every length in pixels shrinks or grows with the tested side."""
        factor = side / self.short_sides[-1]
        return replace(
            self,
            short_sides=tuple(sorted({max(round(each * factor), 1) for each in self.short_sides})),
            longest_side=round(self.longest_side * factor),
            anchor_sizes=tuple(each * factor for each in self.anchor_sizes),
        )

    def peak_lr(self, vit: bool) -> float:
        """The highest rate at this batch size."""
        return (self.base_lr or (2.5e-5 if vit else 0.02)) * self.batch_size / REFERENCE_BATCH

    def lr_at(self, step: int, vit: bool) -> float:
        """The rate of an update, counted from 0."""
        warmup = min(self.warmup_steps, self.steps // 10)
        falls = [share * self.steps for share in self.milestones]
        peak = self.peak_lr(vit)
        return warmup_then_steps(step, falls, 0.1, warmup, peak, peak / 1000)


_PROTOCOLS = {
    "voc": DetectProtocol("voc", 24_000, (18 / 24, 22 / 24), tuple(range(480, 801, 32)), warmup_steps=100),
    # MoCo's configuration for COCO names no warm-up: detectron2's default holds.
    "coco": DetectProtocol("coco", 180_000, (12 / 18, 16 / 18), tuple(range(640, 801, 32)), warmup_steps=1000),
}


def _check_pictures(pair: AnnotatedPair, protocol: DetectProtocol, workers: int, *, masks: bool) -> int:
    """Refuse all that can be found out before hours of training; return the bytes of the largest batch."""
    if masks and pair.format == "voc":
        raise UserError("--masks: VOC's annotations have boxes only; give a folder in COCO format")
    pictures = [*pair.train, *pair.test]
    if masks:
        check_masks(pictures)
    for picture in pictures:
        picture.check_size()
        shorter, longer = sorted((picture.width, picture.height))
        if longer > protocol.longest_side * shorter:
            raise UserError(
                f"{picture.file}: is {picture.width} x {picture.height} pixels; with a longer side of "
                f"{protocol.longest_side} nothing of the shorter one is left, so leave it out"
            )
    batch_bytes = protocol.batch_size * max(3 * picture.width * picture.height for picture in pictures)
    prefetch_of(batch_bytes, workers, "--workers", 2)
    return batch_bytes


def _load_rgb_encoder(model: str) -> Encoder:
    encoder = load_encoder(model)
    if encoder.channels != 3:
        raise UserError(f"{model}: detection takes encoders of RGB; kNN and linear evaluation take any channels")
    return encoder


def evaluate_detect(
    model: str,
    folder: str | Path,
    protocol: DetectProtocol,
    *,
    arch: str = "",
    masks: bool = False,
    scratch: bool = True,
    baselines: Sequence[str] = (),
    train_split: str = "",
    test_split: str = "",
    workers: int = 0,
    background: str = WHITE,
    say: Say = lambda _sentence: None,
) -> Judgement:
    """Train a detector over the encoder and score it, beside the same training from random weights.

    Args:
        model: As `load_encoder` takes it.
        folder: Annotated pictures; see `open_annotated`.
        protocol: How; see `DetectProtocol.named`.
        arch: ``c4`` or ``fpn``; empty takes c4 for ResNets, else fpn.
        masks: Whether masks are learned and scored too (Mask R-CNN); only with COCO's format.
        scratch: Whether the architecture is also trained from random weights.
        baselines: timm names to train too, under the same protocol.
        train_split: What is learned from; see `open_annotated`.
        test_split: What is scored on.
        workers: Processes that decode pictures.
        background: What transparent pixels are composited over.
        say: Told of progress.

    Returns:
        Scores whose ``accuracy`` is the AP of boxes and whose ``measures`` are all numbers, with their intervals.

    Raises:
        UserError: What `open_annotated`, `check_masks` and `make_detector` refuse, a picture of another size than its
            annotation says, or a loss that is not finite.
    """
    require_pycocotools()
    pair = open_annotated(folder, train_split, test_split, background)
    batch_bytes = _check_pictures(pair, protocol, workers, masks=masks)
    encoder = _load_rgb_encoder(model)
    chosen = choose_arch(encoder, arch)
    contestants = [encoder, *([encoder.random_twin(protocol.seed)] if scratch else []), *map(load_encoder, baselines)]
    scores = []
    for contestant in contestants:
        name = "from scratch" if contestant.description == "random init" else contestant.description
        say(name)
        with explain_death(batch_bytes):
            detector = train_detector(contestant, pair, protocol, arch=chosen, masks=masks, workers=workers, say=say)
            scored = score_detector(detector, pair, masks=masks, workers=workers)
        own = scored.measures["AP"], scored.intervals["AP"]
        scores.append(Score(name, *own, "", scored.measures, scored.intervals, contestant.revision))
    settings = {"kind": "detect", **vars(protocol), "arch": chosen, "masks": masks}
    settings |= {"peak_lr": protocol.peak_lr(_is_vit(encoder)), "selection": "none, the last update"}
    settings |= {name: list(encoder.preprocessing[name]) for name in ("mean", "std")} | pictures_settings(pair)
    named = f"detect {protocol.name} {chosen}{masks * ' masks'}, {protocol.steps} steps of {protocol.batch_size}"
    return Judgement(named, pair.description, settings, scores, measure="box AP")


def train_detector(
    encoder: Encoder,
    pair: AnnotatedPair,
    protocol: DetectProtocol,
    *,
    arch: Arch,
    masks: bool = False,
    workers: int = 0,
    say: Say = lambda _sentence: None,
) -> nn.Module:
    """Train a detector over a copy of ``encoder``; the encoder itself stays as it is.

    Args:
        encoder: Where to start.
        pair: Pictures; only those of ``train`` are looked at.
        protocol: How.
        arch: How the encoder is put under the detector.
        masks: Whether masks are learned too.
        workers: Processes that decode.
        say: Told of the loss, twenty times.

    Returns:
        The detector in eval mode.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    vit = _is_vit(encoder)
    measured = min(protocol.precise_bn_steps, max(protocol.steps // 10, 1))
    with torch.random.fork_rng():
        torch.manual_seed(protocol.seed)
        kept = ("short_sides", "longest_side", "anchor_sizes", "regions")
        shape: dict[str, Any] = {name: getattr(protocol, name) for name in kept}
        detector: nn.Module = make_detector(encoder, len(pair.classes), arch, masks=masks, **shape).to(device).train()
        optimizer = _make_optimizer(detector, protocol.peak_lr(vit), vit)
        batches = _batches(pair.train, protocol, protocol.steps + measured, masks, workers)
        total, often = 0.0, max(protocol.steps // 20, 1)
        for step, batch in enumerate(itertools.islice(batches, protocol.steps)):
            torch.manual_seed(_draw(protocol.seed, step))
            loss = _loss(detector, batch, device)
            if not bool(loss.isfinite()):
                raise UserError(f"the loss of detection is not finite at step {step + 1}; take a lower --lr")
            for group in optimizer.param_groups:
                group["lr"] = protocol.lr_at(step, vit)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += float(loss.detach())
            if (step + 1) % often == 0:
                say(f"step {step + 1}/{protocol.steps}: loss {total / often:.3f}")
                total = 0.0
        _measure_batchnorm(detector, batches, device, protocol.seed)
    return detector.eval()


@torch.inference_mode()
def find_objects(detector: nn.Module, pictures: list[Picture], *, masks: bool = False, workers: int = 0) -> list[Found]:
    """What a detector in eval mode finds in every picture, one picture at a time."""
    device = next(detector.parameters()).device
    # Its own generator: a loader draws a seed for workers that here need none.
    options: dict[str, Any] = {"num_workers": workers, "worker_init_fn": start_worker, "generator": torch.Generator()}
    loader = DataLoader(_Pictures(pictures), batch_size=None, **options)
    found = []
    for image in loader:
        (result,) = detector([image.to(device).float() / 255])
        arrays = {name: tensor.cpu().numpy() for name, tensor in result.items()}
        outlines = [encode_mask((mask[0] > 0.5).astype(np.uint8)) for mask in arrays["masks"]] if masks else []
        found.append(Found(arrays["boxes"].astype(np.float64), arrays["labels"], arrays["scores"], outlines))
    return found


def score_detector(detector: nn.Module, pair: AnnotatedPair, *, masks: bool = False, workers: int = 0) -> Precision:
    """AP, AP50 and AP75 of boxes, and of masks as ``mask AP`` and so on, on the pictures of ``test``."""
    found = find_objects(detector, pair.test, masks=masks, workers=workers)
    boxes = average_precision(pair.test, found, pair.classes)
    if not masks:
        return boxes
    outlined = average_precision(pair.test, found, pair.classes, "segm")
    return Precision(
        boxes.measures | {f"mask {name}": value for name, value in outlined.measures.items()},
        boxes.intervals | {f"mask {name}": interval for name, interval in outlined.intervals.items()},
    )


class _Pictures(Dataset[Tensor]):
    """Pictures as (3, H, W) uint8."""

    def __init__(self, pictures: list[Picture]) -> None:
        self.pictures = pictures

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> Tensor:
        return torch.from_numpy(self.pictures[index].pixels().transpose(2, 0, 1).copy())


class _TrainingPictures(Dataset[tuple[Tensor, Target]]):
    """Pictures in a new order each pass, half of them mirrored: item ``i`` depends on the seed and ``i`` alone."""

    def __init__(self, pictures: list[Picture], count: int, seed: int, masks: bool) -> None:
        self.pictures, self.count, self.seed, self.masks = pictures, count, seed, masks

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, position: int) -> tuple[Tensor, Target]:
        turn, place = divmod(position, len(self.pictures))
        picture = self.pictures[_order(self.seed, turn, len(self.pictures))[place]]
        mirrored = bool(np.random.default_rng([self.seed, position, 1]).random() < 0.5)
        usable = picture.usable()
        pixels, boxes = picture.pixels().transpose(2, 0, 1), picture.boxes[usable]
        target = {"labels": torch.from_numpy(picture.labels[usable])}
        if mirrored:
            pixels = pixels[:, :, ::-1]
            boxes = np.stack([picture.width - boxes[:, 2], boxes[:, 1], picture.width - boxes[:, 0], boxes[:, 3]], 1)
        target["boxes"] = torch.from_numpy(boxes).float()
        if self.masks:
            drawn = [decode_mask(picture.segments[index], *pixels.shape[1:]) for index in usable.nonzero()[0]]
            stacked = np.stack(drawn)
            target["masks"] = torch.from_numpy((stacked[:, :, ::-1] if mirrored else stacked).copy())
        return torch.from_numpy(pixels.copy()), target


@lru_cache(maxsize=2)
def _order(seed: int, turn: int, count: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, turn]).permutation(count)


def _batches(
    pictures: list[Picture], protocol: DetectProtocol, steps: int, masks: bool, workers: int
) -> Iterator[Batch]:
    useful = [picture for picture in pictures if picture.usable().any()]
    items = _TrainingPictures(useful, steps * protocol.batch_size, protocol.seed, masks)
    options: dict[str, Any] = {"num_workers": workers, "worker_init_fn": start_worker, "collate_fn": list}
    return iter(DataLoader(items, protocol.batch_size, **options))


def _loss(detector: nn.Module, batch: Batch, device: torch.device) -> Tensor:
    images = [image.to(device).float() / 255 for image, _ in batch]
    targets = [{name: tensor.to(device) for name, tensor in target.items()} for _, target in batch]
    total: Tensor = sum(detector(images, targets).values(), torch.zeros((), device=device))
    return total


def _make_optimizer(detector: nn.Module, lr: float, vit: bool) -> Optimizer:
    """Norms and position embeddings are not decayed; biases are, as in detectron2."""
    exempt = {param for part in detector.modules() if isinstance(part, NORMS) for param in part.parameters()}
    exempt |= {param for name, param in detector.named_parameters() if "pos_embed" in name}
    decayed = [param for param in detector.parameters() if param not in exempt]
    groups = [
        {"params": decayed, "weight_decay": 0.1 if vit else 1e-4},
        {"params": [param for param in detector.parameters() if param in exempt], "weight_decay": 0.0},
    ]
    return AdamW(groups, lr=lr) if vit else SGD(groups, lr=lr, momentum=0.9)


@torch.no_grad()
def _measure_batchnorm(detector: nn.Module, batches: Iterator[Batch], device: torch.device, seed: int) -> None:
    """Replace BatchNorm's running statistics by means over ``batches`` (detectron2's PRECISE_BN)."""
    norms = [part for part in detector.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        return
    kept = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean
    for step, batch in enumerate(batches):
        torch.manual_seed(_draw(seed, step, 1))
        _loss(detector, batch, device)
    for norm, momentum in zip(norms, kept, strict=True):
        norm.momentum = momentum


def _draw(*key: int) -> int:
    return int(np.random.SeedSequence(key).generate_state(1)[0])


def _is_vit(encoder: Encoder) -> bool:
    return family(encoder.architecture) == "vit"
