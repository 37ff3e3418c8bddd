"""Training of a detector: MoCo's transfer (arXiv:1911.05722, section 4.2), with all layers and BatchNorm trained."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.utils.data import DataLoader, Dataset

from sslkit.data.loading.loader import start_worker
from sslkit.errors import UserError
from sslkit.evaluate.detection.annotated_image import AnnotatedImage
from sslkit.evaluate.detection.annotations import AnnotatedPair
from sslkit.evaluate.detection.average_precision import decode_mask
from sslkit.evaluate.detection.detector import Arch, make_detector
from sslkit.evaluate.features.encoder import Encoder
from sslkit.evaluate.features.extraction import seed_from
from sslkit.evaluate.input_checks import check_rates, check_seed, choose_protocol
from sslkit.parts.schedules import warmup_then_steps
from sslkit.progress import track

Target = dict[str, Tensor]
Batch = list[tuple[Tensor, Target]]

REFERENCE_BATCH = 16
SIZES = ("short_sides", "longest_side", "anchor_sizes", "regions")
NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)


@dataclass(frozen=True)
class DetectProtocol:
    """How a detector is trained and tested. The defaults are those of MoCo's detectron2 configurations.

    Attributes:
        steps: Number of updates.
        milestones: Shares of the steps after which the learning rate is divided by 10.
        short_sides: Shorter sides in pixels, ascending, one drawn for each training image; the last one in testing.
        longest_side: Maximum of the longer side in pixels. ``anchor_sizes`` are the sides of square anchors.
        regions: Regions per training image that the head is trained on. In testing twice as many, at most 1000.
        base_lr: Learning rate at a batch size of 16, scaled with the batch size. 0 for 0.02 with SGD; for plain ViTs,
            which are trained with AdamW as in ViTDet (arXiv:2203.16527), 2.5e-5, from its 1e-4 at 64 images.
        warmup_steps: Linear warm-up from a thousandth of the learning rate, at most a tenth of the steps.
        precise_bn_steps: Batches for BatchNorm's statistics after the last update, at most a tenth of the steps.
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
    def from_name(name: str) -> "DetectProtocol":
        """``voc``: MoCo's for PASCAL VOC 07+12, 24k updates; ``coco``: its 2x schedule for COCO, 180k updates."""
        return choose_protocol("detect", name, _PROTOCOLS)

    def at_short_side(self, side: int) -> "DetectProtocol":
        """The same protocol for other image sizes: all lengths in pixels are scaled with the tested shorter side."""
        factor = side / self.short_sides[-1]
        return replace(
            self,
            short_sides=tuple(sorted({max(round(each * factor), 1) for each in self.short_sides})),
            longest_side=round(self.longest_side * factor),
            anchor_sizes=tuple(each * factor for each in self.anchor_sizes),
        )

    def peak_lr(self, vit: bool) -> float:
        """The peak learning rate at this batch size."""
        return (self.base_lr or (2.5e-5 if vit else 0.02)) * self.batch_size / REFERENCE_BATCH

    def lr_at(self, step: int, vit: bool) -> float:
        """The learning rate of an update, counted from 0."""
        milestones, peak = [share * self.steps for share in self.milestones], self.peak_lr(vit)
        return warmup_then_steps(step, milestones, 0.1, min(self.warmup_steps, self.steps // 10), peak, peak / 1000)


_PROTOCOLS = {
    "voc": DetectProtocol("voc", 24_000, (18 / 24, 22 / 24), tuple(range(480, 801, 32)), warmup_steps=100),
    # MoCo's configuration for COCO does not set the warm-up, so detectron2's default applies.
    "coco": DetectProtocol("coco", 180_000, (12 / 18, 16 / 18), tuple(range(640, 801, 32)), warmup_steps=1000),
}


def train_detector(
    encoder: Encoder,
    pair: AnnotatedPair,
    protocol: DetectProtocol,
    *,
    arch: Arch,
    masks: bool = False,
    workers: int = 0,
    log_message: Callable[[str], None] = lambda _message: None,
) -> nn.Module:
    """Train a detector on a copy of the encoder, on the images of ``pair.train``. The encoder itself does not change.

    ``arch`` is from `choose_arch`; ``log_message`` is called with the loss twenty times. Returns the detector in eval
    mode. Raises `UserError` if the loss is not finite.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    vit = encoder.is_vit  # trained with AdamW
    bn_steps = min(protocol.precise_bn_steps, max(protocol.steps // 10, 1))
    with torch.random.fork_rng():
        torch.manual_seed(protocol.seed)
        sizes: dict[str, Any] = {name: getattr(protocol, name) for name in SIZES}
        detector: nn.Module = make_detector(encoder, len(pair.classes), arch, masks=masks, **sizes).to(device).train()
        optimizer = _make_optimizer(detector, protocol.peak_lr(vit), vit)
        batches = _batches(pair.train, protocol, protocol.steps + bn_steps, masks, workers)
        total, log_every = 0.0, max(protocol.steps // 20, 1)
        tracked = track(itertools.islice(batches, protocol.steps), "training", "step", protocol.steps)
        for step, batch in enumerate(tracked):
            torch.manual_seed(seed_from(protocol.seed, step))
            loss = _loss(detector, batch, device)
            if not bool(loss.isfinite()):
                raise UserError(f"detect: the loss is not finite at step {step + 1}; use a lower --lr")
            for group in optimizer.param_groups:
                group["lr"] = protocol.lr_at(step, vit)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += float(loss.detach())
            if (step + 1) % log_every == 0:
                log_message(f"step {step + 1}/{protocol.steps}: loss {total / log_every:.3f}")
                total = 0.0
        _compute_batchnorm_statistics(detector, batches, device, protocol.seed)
    return detector.eval()


class _TrainingImages(Dataset[tuple[Tensor, Target]]):
    """Images in a new order in each pass, half of them flipped. Item ``i`` depends on the seed and ``i`` only."""

    def __init__(self, images: list[AnnotatedImage], count: int, seed: int, masks: bool) -> None:
        self.images, self.count, self.seed, self.masks = images, count, seed, masks

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, position: int) -> tuple[Tensor, Target]:
        epoch, place = divmod(position, len(self.images))
        image = self.images[_order(self.seed, epoch, len(self.images))[place]]
        flipped = bool(np.random.default_rng([self.seed, position, 1]).random() < 0.5)
        trainable = image.trainable()
        pixels, boxes = image.pixels().transpose(2, 0, 1), image.boxes[trainable]
        mirror = slice(None, None, -1 if flipped else 1)
        if flipped:
            boxes = np.stack([image.width - boxes[:, 2], boxes[:, 1], image.width - boxes[:, 0], boxes[:, 3]], 1)
        target = {"labels": torch.from_numpy(image.labels[trainable]), "boxes": torch.from_numpy(boxes).float()}
        if self.masks:
            decoded = [decode_mask(image.segments[index], *pixels.shape[1:]) for index in trainable.nonzero()[0]]
            target["masks"] = torch.from_numpy(np.stack(decoded)[:, :, mirror].copy())
        return torch.from_numpy(pixels[:, :, mirror].copy()), target


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, count: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(count)


def _batches(
    images: list[AnnotatedImage], protocol: DetectProtocol, steps: int, masks: bool, workers: int
) -> Iterator[Batch]:
    with_objects = [image for image in images if image.trainable().any()]
    items = _TrainingImages(with_objects, steps * protocol.batch_size, protocol.seed, masks)
    options: dict[str, Any] = {"num_workers": workers, "worker_init_fn": start_worker, "collate_fn": list}
    return iter(DataLoader(items, protocol.batch_size, **options))


def _loss(detector: nn.Module, batch: Batch, device: torch.device) -> Tensor:
    images = [image.to(device).float() / 255 for image, _ in batch]
    targets = [{name: tensor.to(device) for name, tensor in target.items()} for _, target in batch]
    total: Tensor = sum(detector(images, targets).values(), torch.zeros((), device=device))
    return total


def _make_optimizer(detector: nn.Module, lr: float, vit: bool) -> Optimizer:
    """Weight decay does not apply to norms and position embeddings. It applies to biases, as in detectron2."""
    exempt = {param for part in detector.modules() if isinstance(part, NORMS) for param in part.parameters()}
    exempt |= {param for name, param in detector.named_parameters() if "pos_embed" in name}
    groups = [
        {"params": [param for param in detector.parameters() if (param in exempt) == spared], "weight_decay": decay}
        for spared, decay in ((False, 0.1 if vit else 1e-4), (True, 0.0))
    ]
    return AdamW(groups, lr=lr) if vit else SGD(groups, lr=lr, momentum=0.9)


@torch.no_grad()
def _compute_batchnorm_statistics(
    detector: nn.Module, batches: Iterator[Batch], device: torch.device, seed: int
) -> None:
    """Replace BatchNorm's running statistics by averages over ``batches`` (detectron2's PRECISE_BN)."""
    norms = [part for part in detector.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a cumulative average
    for step, batch in enumerate(batches if norms else ()):
        torch.manual_seed(seed_from(seed, step, 1))
        _loss(detector, batch, device)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
