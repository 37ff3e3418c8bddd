"""Fine-tuning: the whole encoder trained on labelled images, all of them or a few.

Semi-supervised learning (1 % or 10 % of the labels) and transfer to other data are the same thing on other images.
"""

import copy
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data import Mixup, create_transform
from timm.loss import SoftTargetCrossEntropy
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, AdamW, Optimizer
from torch.utils.data import DataLoader

from sslkit.data.loading.loader import start_worker
from sslkit.data.loading.shared_memory import explain_death, prefetch_of
from sslkit.data.sources.image_source import ImageSource
from sslkit.errors import UserError, near_miss
from sslkit.evaluate.features.extraction import AHEAD, Encoder, TransformedImages, batch_bytes, build
from sslkit.evaluate.input_checks import check_rates, check_seed
from sslkit.parts.layerwise_optimizers import Lars
from sslkit.parts.schedules import per_epoch, warmup_then_cosine, warmup_then_steps
from sslkit.random_draws import DrawPurpose

Say = Callable[[str], None]

TESTED = 256  # images at a time in testing
FEW = 0.03  # share of labelled images below which SwAV's rates for 1 % are meant, not those for 10 %


@dataclass(frozen=True)
class FinetuneProtocol:
    """How an encoder and a new classifier are trained together.

    Attributes:
        name: What it is called in tables.
        epochs: Passes over the labelled images.
        batch_size: Images of an update; never more than there are.
        base_lr: Rate at a batch of ``base_batch``.
        base_batch: Batch that ``base_lr`` is meant for.
        lr_rule: How the rate grows with the batch.
        optimizer: ``lars`` is SimCLR's.
        weight_decay: Of weights; biases and norms have none, except under ``sgd``.
        head_lr: The classifier's rate, in units of the encoder's.
        layer_decay: Each block's rate is the next one's times this.
        warmup_epochs: Linear, from ``warmup_start``.
        decay: ``cosine`` to ``final_lr``; ``epoch_cosine``, timm's and so DeiT's: it moves once an epoch, and counts
            the warm-up's epochs as its own; or ``steps`` of a factor 0.2 at 60 % and 80 %.
        warmup_start: Rate at the first update of the warm-up.
        final_lr: Rate at the end of the cosine.
        drop_path: Share of residual branches left out, for architectures that have it.
        mixup: Alpha of mixup; 0 for none.
        cutmix: Alpha of CutMix; 0 for none.
        smoothing: Of the labels.
        erase: Share of images with a random rectangle erased.
        auto_augment: timm's policy string; empty for crops and mirrors only.
        smallest_crop: Share of the area that a random crop has at least.
        head_std: Of the classifier's first weights.
        adapt_head: Whether ``lars`` fits the classifier's rate to its norm too; SimCLR's does not.
        seed: Of classifier, order and augmentation.
    """

    name: str
    epochs: int
    batch_size: int
    base_lr: float
    base_batch: int = 256
    lr_rule: Literal["none", "linear", "sqrt"] = "none"
    optimizer: Literal["adamw", "sgd", "lars"] = "sgd"
    weight_decay: float = 0.0
    head_lr: float = 1.0
    layer_decay: float = 1.0
    warmup_epochs: float = 0.0
    decay: Literal["cosine", "epoch_cosine", "steps"] = "cosine"
    warmup_start: float = 0.0
    final_lr: float = 0.0
    drop_path: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    smoothing: float = 0.0
    erase: float = 0.0
    auto_augment: str = ""
    smallest_crop: float = 0.08
    head_std: float = 0.01
    adapt_head: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        check_seed(self.seed, "finetune, --seed")
        check_rates((self.base_lr, self.layer_decay), "finetune, --lr and --layer-decay")

    @staticmethod
    def named(name: str, labelled: float = 1.0) -> "FinetuneProtocol":
        """The protocol of this name; SwAV has other rates where about 1 % of the images are ``labelled`` than at 10 %.

        ``deit`` is DeiT's code as MoCo v3 fine-tunes with it (without its repeated augmentation and weight average),
        ``moco_v3`` is MoCo v3's transfer with its numbers for CIFAR-10, ``simclr`` and ``swav`` are their
        semi-supervised protocols.
        """
        protocols = {
            "deit": _DEIT,
            "moco_v3": _MOCO_V3_TRANSFER,
            "simclr": _SIMCLR,
            "swav": _SWAV_1_PERCENT if labelled < FEW else _SWAV,
        }
        if name not in protocols:
            raise UserError(
                f"finetune: unknown protocol {name!r}{near_miss(name, protocols)}; there are {sorted(protocols)}"
            )
        return protocols[name]

    def peak_lr(self, batch_size: int) -> float:
        """The encoder's highest rate at this batch size."""
        power = {"none": 0.0, "linear": 1.0, "sqrt": 0.5}[self.lr_rule]
        return float(self.base_lr * (batch_size / self.base_batch) ** power)


_DEIT = FinetuneProtocol(
    "deit",
    epochs=150,
    batch_size=1024,
    base_lr=5e-4,
    base_batch=512,
    lr_rule="linear",
    optimizer="adamw",
    weight_decay=0.05,
    warmup_epochs=5,
    warmup_start=1e-6,
    decay="epoch_cosine",
    final_lr=1e-5,
    drop_path=0.1,
    mixup=0.8,
    cutmix=1.0,
    smoothing=0.1,
    erase=0.25,
    auto_augment="rand-m9-mstd0.5-inc1",
)
_MOCO_V3_TRANSFER = replace(
    _DEIT,
    name="moco_v3",
    epochs=100,
    base_lr=3e-4,
    weight_decay=0.1,
    warmup_epochs=3,
    erase=0.0,
    auto_augment="",
    smallest_crop=0.05,
)
_SIMCLR = FinetuneProtocol(
    "simclr",
    epochs=60,
    batch_size=1024,
    base_lr=0.005,
    base_batch=1,
    lr_rule="sqrt",
    optimizer="lars",
    head_std=0.0,
    adapt_head=False,
)
_SWAV = FinetuneProtocol("swav", epochs=20, batch_size=256, base_lr=0.01, head_lr=20.0, decay="steps")
_SWAV_1_PERCENT = replace(_SWAV, base_lr=0.02, head_lr=250.0)


def finetune(
    encoder: Encoder,
    source: ImageSource,
    labels: Tensor,
    num_classes: int,
    protocol: FinetuneProtocol,
    *,
    neck: nn.Module | None = None,
    workers: int = 0,
    say: Say = lambda _sentence: None,
) -> nn.Module:
    """Train a copy of ``encoder`` under a new classifier; the encoder itself stays as it is.

    Args:
        encoder: Where to start.
        source: Labelled images.
        labels: (len(source),) int64.
        num_classes: Outputs of the classifier.
        protocol: How.
        neck: (B, D) -> (B, E), trained too, between features and classifier: SimCLR v2 keeps its head's first layer.
        workers: Processes that decode and augment.
        say: Told of every epoch.

    Returns:
        The classifier in eval mode, (B, 3, H, W) -> (B, num_classes).
    """
    source = source.without_labels()
    batch_size = min(protocol.batch_size, len(source))
    batch_size -= batch_size % 2  # images are mixed in pairs
    if batch_size < 2:
        few = min(protocol.batch_size, len(source))
        raise UserError(f"fine-tuning needs at least two labelled images and --batch-size 2, not {few}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with _random_state_kept():
        torch.manual_seed(protocol.seed)
        model, head = make_classifier(encoder, num_classes, protocol.drop_path, neck, protocol.head_std)
        model.to(device).train()
        optimizer = _make_optimizer(model, head, protocol, protocol.peak_lr(batch_size))
        transform = _training_transform(encoder, protocol)
        target_of = _Targets(protocol, num_classes)
        steps = len(source) // batch_size
        for epoch in range(protocol.epochs):
            key = (protocol.seed, epoch)
            loader = _epoch_loader(TransformedImages(source, transform, key), batch_size, workers)
            total = 0.0
            for step, (images, positions) in enumerate(loader):
                _set_rates(optimizer, protocol, epoch + step / steps, batch_size)
                _seed_all(*key, step)
                images, targets = target_of(images.to(device), labels[positions].to(device))
                with torch.autocast(device.type, torch.bfloat16) if device.type == "cuda" else nullcontext():
                    loss = target_of.loss(model(images).float(), targets)
                if not bool(loss.isfinite()):
                    raise UserError(f"the loss of fine-tuning is not finite in epoch {epoch + 1}; take a lower --lr")
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                total += float(loss.detach())
            say(f"epoch {epoch + 1}/{protocol.epochs}: loss {total / steps:.3f}")
    return model.eval()


def _epoch_loader(images: TransformedImages, batch_size: int, workers: int) -> DataLoader[tuple[Tensor, int]]:
    """Whole batches in an order that the images' key decides."""
    order = torch.Generator().manual_seed(int(np.random.SeedSequence(images.key).generate_state(1)[0]))
    options: dict[str, Any] = {"num_workers": workers, "worker_init_fn": start_worker}
    if workers:
        options["prefetch_factor"] = prefetch_of(batch_bytes(images.transform, batch_size), workers, "--workers", AHEAD)
    return DataLoader(images, batch_size, shuffle=True, generator=order, drop_last=True, **options)


def make_classifier(
    encoder: Encoder, num_classes: int, drop_path: float = 0.0, neck: nn.Module | None = None, head_std: float = 0.01
) -> tuple[nn.Module, nn.Linear]:
    """A copy of the encoder with timm's own place for a classifier filled; also the classifier itself."""
    model = _with_drop_path(encoder, drop_path)
    model.load_state_dict(encoder.module.state_dict())
    model.reset_classifier(num_classes)  # type: ignore[operator]
    place, head = next((name, part) for name, part in model.named_modules() if part is model.get_classifier())  # type: ignore[operator]
    if not isinstance(head, nn.Linear):
        raise UserError(f"{encoder.architecture}: its classifier is a {type(head).__name__}; fine-tuning knows Linear")
    if neck is not None:
        width = next(part.out_features for part in reversed(list(neck.modules())) if isinstance(part, nn.Linear))
        head = nn.Linear(width, num_classes)
        owner, _, attribute = place.rpartition(".")
        setattr(model.get_submodule(owner), attribute, nn.Sequential(copy.deepcopy(neck), head))
    nn.init.normal_(head.weight, std=head_std)
    nn.init.zeros_(head.bias)
    return model, head


def _with_drop_path(encoder: Encoder, drop_path: float) -> nn.Module:
    if drop_path:
        try:
            return build(encoder.architecture, {**encoder.model_args, "drop_path_rate": drop_path}, encoder.small_stem)
        except TypeError:  # an architecture without residual branches to drop
            pass
    return build(encoder.architecture, encoder.model_args, encoder.small_stem)


def _training_transform(encoder: Encoder, protocol: FinetuneProtocol) -> Any:
    kept = ("input_size", "interpolation", "mean", "std")
    transform = create_transform(
        **{key: encoder.preprocessing[key] for key in kept},
        is_training=True,
        scale=(protocol.smallest_crop, 1.0),
        color_jitter=0.0,
        auto_augment=protocol.auto_augment or None,
        re_prob=protocol.erase,
        re_mode="pixel",
    )
    for part in transform.transforms:
        for operation in getattr(part, "ops", []):
            if operation.name.startswith("Posterize"):
                operation.aug_fn = _posterize
    return transform


def _posterize(image: Image.Image, bits: int, **_options: Any) -> Image.Image:
    """timm's, but that it keeps one bit where timm keeps none (a black image), which Pillow 13 refuses."""
    return ImageOps.posterize(image, max(bits, 1)) if bits < 8 else image


class _Targets:
    """Mixes images, smooths labels, and has the loss that goes with them."""

    def __init__(self, protocol: FinetuneProtocol, num_classes: int) -> None:
        self.smoothing = protocol.smoothing
        self.mix: Mixup | None = None
        if protocol.mixup or protocol.cutmix:
            self.mix = Mixup(protocol.mixup, protocol.cutmix, label_smoothing=self.smoothing, num_classes=num_classes)

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        if self.mix is None:
            return images, labels
        mixed: tuple[Tensor, Tensor] = self.mix(images, labels)
        return mixed

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        if self.mix is None:
            return cross_entropy(logits, targets, label_smoothing=self.smoothing)
        loss: Tensor = SoftTargetCrossEntropy()(logits, targets)
        return loss


def _make_optimizer(model: nn.Module, head: nn.Linear, protocol: FinetuneProtocol, lr: float) -> Optimizer:
    """Groups carry ``scale``: their rate in units of the schedule's."""
    if protocol.layer_decay < 1 or protocol.optimizer == "adamw":
        groups: list[dict[str, Any]] = param_groups_layer_decay(
            model,
            weight_decay=protocol.weight_decay,
            layer_decay=protocol.layer_decay,
            no_weight_decay_list=model.no_weight_decay() if hasattr(model, "no_weight_decay") else (),  # type: ignore[operator]
        )
    else:
        groups = [{"params": list(model.parameters()), "weight_decay": protocol.weight_decay}]
    own = set(head.parameters())
    heads = [{**group, "params": [param for param in group["params"] if param in own]} for group in groups]
    bodies = [{**group, "params": [param for param in group["params"] if param not in own]} for group in groups]
    for group, factor in [*((each, 1.0) for each in bodies), *((each, protocol.head_lr) for each in heads)]:
        group["scale"] = factor * group.pop("lr_scale", 1.0)
    for group in heads:
        group["adapt"] = protocol.adapt_head
    groups = [group for group in [*bodies, *heads] if group["params"]]
    if protocol.optimizer == "adamw":
        return AdamW(groups, lr=lr)
    if protocol.optimizer == "lars":
        return Lars(groups, lr=lr, rate_in_momentum=True)
    return SGD(groups, lr=lr, momentum=0.9)


def _set_rates(optimizer: Optimizer, protocol: FinetuneProtocol, epoch: float, batch_size: int) -> None:
    peak, epochs, warmup = protocol.peak_lr(batch_size), protocol.epochs, protocol.warmup_epochs
    if protocol.decay == "epoch_cosine":
        number = per_epoch(epoch)
        whole = warmup_then_cosine(number, epochs, 0.0, peak, final=protocol.final_lr)
        rising = warmup_then_cosine(number, epochs, warmup, peak, protocol.warmup_start)
        rate = rising if number < warmup else whole
    elif protocol.decay == "steps":
        milestones = [0.6 * epochs, 0.8 * epochs]
        rate = warmup_then_steps(epoch, milestones, 0.2, warmup, peak, protocol.warmup_start)
    else:
        rate = warmup_then_cosine(epoch, epochs, warmup, peak, protocol.warmup_start, protocol.final_lr)
    for group in optimizer.param_groups:
        group["lr"] = rate * group["scale"]


def _seed_all(*key: int) -> None:
    """What drop path and mixup draw from: the same whether images were augmented here or by workers."""
    draw = int(np.random.SeedSequence([*key, DrawPurpose.FINETUNE_DROPOUT]).generate_state(1)[0])
    torch.manual_seed(draw)
    np.random.seed(draw)


@contextmanager
def _random_state_kept() -> Iterator[None]:
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@torch.inference_mode()
def classify(model: nn.Module, encoder: Encoder, source: ImageSource, workers: int = 0) -> Tensor:
    """The class of every image, (len(source),) int64, by a classifier in eval mode."""
    device = next(model.parameters()).device
    images = TransformedImages(source.without_labels(), encoder.transform())
    nbytes = batch_bytes(images.transform, TESTED) if workers else 0
    prefetch = prefetch_of(nbytes, workers, "--workers", AHEAD)
    loader = DataLoader(images, TESTED, num_workers=workers, worker_init_fn=start_worker, prefetch_factor=prefetch)
    with explain_death(nbytes):
        return torch.cat([model(batch.to(device)).argmax(dim=1).cpu() for batch, _ in loader])
