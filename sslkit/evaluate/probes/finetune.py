"""Fine-tuning of the whole encoder on labelled images: semi-supervised learning, and transfer to other data."""

import math
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from sslkit.data.sources.image_source import ImageSource
from sslkit.distributed.collectives import upload
from sslkit.errors import UserError
from sslkit.evaluate.features.devices import evaluation_device, feature_precision
from sslkit.evaluate.features.encoder import Encoder
from sslkit.evaluate.features.extraction import TransformedImages, image_loader, keep_random_state, seed_from
from sslkit.evaluate.features.transforms import training_transform
from sslkit.evaluate.input_checks import check_rates, check_seed, choose_protocol
from sslkit.parts.layerwise_optimizers import Lars
from sslkit.parts.schedules import cosine, linear, per_epoch, warmup_then_cosine, warmup_then_steps
from sslkit.progress import track
from sslkit.random_draws import DrawPurpose

FEW_LABELS = 0.03  # share of labelled images below which SwAV's 1 % learning rates apply, not its 10 % ones


@dataclass(frozen=True)
class FinetuneProtocol:
    """How the encoder and a new classifier are trained. Learning rates are the encoder's.

    Attributes:
        batch_size: Images per update; at most the number of images.
        base_lr: Learning rate at a batch size of ``base_batch``, scaled with the batch size by ``lr_rule``.
        weight_decay: Not applied to biases and norms, except with ``sgd``.
        head_lr: Learning rate of the classifier divided by the encoder's.
        layer_decay: Learning rate of each block divided by the next block's.
        warmup_epochs: Length of the linear warm-up from ``warmup_start``.
        decay: ``cosine`` to ``final_lr``; ``epoch_cosine``, timm's and DeiT's, which changes once per epoch and
            includes the warm-up in the cosine; or ``steps``, times 0.2 at 60 % and 80 %.
        mixup: Alpha of mixup; ``cutmix`` is that of CutMix; 0 for none.
        erase: Probability of random erasing.
        auto_augment: timm's policy string; empty for crops and flips only.
        smallest_crop: Smallest area of a random crop, relative to the image.
        head_std: Standard deviation of the classifier's initial weights.
        adapt_head: Whether ``lars`` (SimCLR's) adapts the classifier's learning rate; not in SimCLR.
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
    def from_name(name: str, labelled: float = 1.0) -> "FinetuneProtocol":
        """The protocol of this name, for this share of labelled images, on which SwAV's learning rates depend.

        - ``deit``: DeiT's code, with which MoCo v3 fine-tunes, without repeated augmentation and weight averaging.
        - ``moco_v3``: MoCo v3's transfer learning, with its numbers for CIFAR-10.
        - ``simclr`` and ``swav``: the papers' semi-supervised protocols.
        """
        protocol = choose_protocol("finetune", name, _PROTOCOLS)
        return replace(protocol, base_lr=0.02, head_lr=250.0) if name == "swav" and labelled < FEW_LABELS else protocol

    def peak_lr(self, batch_size: int) -> float:
        """The encoder's peak learning rate at this batch size."""
        power = {"none": 0.0, "linear": 1.0, "sqrt": 0.5}[self.lr_rule]
        return float(self.base_lr * (batch_size / self.base_batch) ** power)


# What DeiT and MoCo v3 have in common, and what differs between them.
_VIT_UPDATES: dict[str, Any] = {"batch_size": 1024, "base_batch": 512, "lr_rule": "linear", "optimizer": "adamw"}
_VIT_SCHEDULE = {"warmup_start": 1e-6, "decay": "epoch_cosine", "final_lr": 1e-5}
_VIT_REGULARIZATION = {"drop_path": 0.1, "mixup": 0.8, "cutmix": 1.0, "smoothing": 0.1}
_VIT = _VIT_UPDATES | _VIT_SCHEDULE | _VIT_REGULARIZATION
_DEIT: dict[str, Any] = {"base_lr": 5e-4, "weight_decay": 0.05, "warmup_epochs": 5, "erase": 0.25}
_MOCO_V3: dict[str, Any] = {"base_lr": 3e-4, "weight_decay": 0.1, "warmup_epochs": 3, "smallest_crop": 0.05}
_SIMCLR: dict[str, Any] = {"base_lr": 0.005, "base_batch": 1, "lr_rule": "sqrt", "optimizer": "lars"}
_PROTOCOLS = {
    "deit": FinetuneProtocol("deit", epochs=150, auto_augment="rand-m9-mstd0.5-inc1", **_VIT, **_DEIT),
    "moco_v3": FinetuneProtocol("moco_v3", epochs=100, **_VIT, **_MOCO_V3),
    "simclr": FinetuneProtocol("simclr", 60, 1024, **_SIMCLR, head_std=0.0, adapt_head=False),
    "swav": FinetuneProtocol("swav", epochs=20, batch_size=256, base_lr=0.01, head_lr=20.0, decay="steps"),
}


def finetune(
    encoder: Encoder,
    source: ImageSource,
    labels: Tensor,
    num_classes: int,
    protocol: FinetuneProtocol,
    *,
    neck: nn.Module | None = None,
    workers: int = 0,
    log_message: Callable[[str], None] = lambda _message: None,
) -> nn.Module:
    """Train a copy of the encoder with a new classifier. The encoder itself does not change.

    ``labels`` are (len(source),) int64. ``neck``, (B, D) -> (B, E), is trained between features and classifier; SimCLR
    v2 keeps its head's first layer. ``log_message`` is called with the loss of every epoch. Returns the classifier in
    eval mode, (B, 3, H, W) -> (B, num_classes). Raises `UserError` if there are fewer than two images, or the loss is
    not finite.
    """
    source = source.without_labels()
    batch_size = _even_batch_size(protocol, len(source))
    device = evaluation_device()
    with keep_random_state(cuda=True):
        torch.manual_seed(protocol.seed)
        model, head = make_classifier(encoder, num_classes, protocol.drop_path, neck, protocol.head_std)
        model.to(device).train()
        optimizer = _make_optimizer(model, head, protocol, protocol.peak_lr(batch_size))
        mixup, loss_function = _mixup_and_loss(protocol, num_classes)
        steps = len(source) // batch_size
        images_of_epoch = _EpochImages(source, _training_transform(encoder, protocol), protocol)
        # One loader for all epochs, so that its workers start once.
        batches = images_of_epoch.batches(batch_size)
        loader, _ = image_loader(
            images_of_epoch, batch_size, workers, batch_sampler=batches, pin_memory=device.type == "cuda"
        )
        loaded = iter(loader)
        for epoch in range(protocol.epochs):
            total = torch.zeros((), dtype=torch.float64, device=device)  # read once, as reading waits for the device
            shown = track(islice(loaded, steps), f"epoch {epoch + 1} of {protocol.epochs}", "step", total=steps)
            for step, (images, positions) in enumerate(shown):
                _set_lr(optimizer, protocol, epoch + step / steps, batch_size)
                _seed_all(protocol.seed, epoch, step)
                images = images.to(device, non_blocking=True)
                targets = upload(labels[positions], device)
                if mixup:
                    images, targets = mixup(images, targets)
                with feature_precision(device):
                    loss = loss_function(model(images).float(), targets)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                total += loss.detach()
            if not math.isfinite(mean := float(total) / steps):
                raise UserError(f"finetune: the loss is not finite in epoch {epoch + 1}; use a lower --lr")
            log_message(f"epoch {epoch + 1}/{protocol.epochs}: loss {mean:.3f}")
    return model.eval()


class _EpochImages(TransformedImages):
    """Transformed images, indexed by epoch and position; the transform depends on both."""

    def __init__(self, source: ImageSource, transform: Any, protocol: FinetuneProtocol) -> None:
        super().__init__(source, transform)
        self.seed, self.epochs = protocol.seed, protocol.epochs

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:  # type: ignore[override]
        epoch, position = key
        return self.make(position, (self.seed, epoch))

    def batches(self, batch_size: int) -> Iterator[list[tuple[int, int]]]:
        """Keys of the whole batches of all epochs, each epoch in an order of its own."""
        for epoch in range(self.epochs):
            generator = torch.Generator().manual_seed(seed_from(self.seed, epoch))
            torch.empty((), dtype=torch.int64).random_(generator=generator)  # what a DataLoader draws before the order
            order = torch.randperm(len(self), generator=generator)
            for batch in order[: len(order) // batch_size * batch_size].split(batch_size):
                yield [(epoch, position) for position in batch.tolist()]


def _even_batch_size(protocol: FinetuneProtocol, num_images: int) -> int:
    """The batch size, at most the number of images, and even because mixup takes pairs."""
    batch_size = min(protocol.batch_size, num_images)
    if batch_size < 2:
        raise UserError(f"finetune: needs 2 or more labelled images and a --batch-size of 2 or more, not {batch_size}")
    return batch_size - batch_size % 2


def make_classifier(
    encoder: Encoder, num_classes: int, drop_path: float = 0.0, neck: nn.Module | None = None, head_std: float = 0.01
) -> tuple[nn.Module, nn.Linear]:
    """Copy the encoder and add a linear classifier where timm puts it. Returns the model and the classifier."""
    model = encoder.copy(**({"drop_path_rate": drop_path} if drop_path else {}))
    model.reset_classifier(num_classes)  # type: ignore[operator]
    path, head = next((name, part) for name, part in model.named_modules() if part is model.get_classifier())  # type: ignore[operator]
    if not isinstance(head, nn.Linear):
        raise UserError(
            f"finetune: the classifier of {encoder.architecture} is a {type(head).__name__}, but only Linear is "
            "supported; use kNN or linear evaluation"
        )
    if neck is not None:
        width = next(part.out_features for part in reversed(list(neck.modules())) if isinstance(part, nn.Linear))
        head = nn.Linear(width, num_classes)
        parent, _, attribute = path.rpartition(".")
        setattr(model.get_submodule(parent), attribute, nn.Sequential(deepcopy(neck), head))
    nn.init.normal_(head.weight, std=head_std)
    nn.init.zeros_(head.bias)
    return model, head


def _training_transform(encoder: Encoder, protocol: FinetuneProtocol) -> Any:
    options = {"scale": (protocol.smallest_crop, 1.0), "auto_augment": protocol.auto_augment or None}
    transform: Any = training_transform(encoder.preprocessing, **options, re_prob=protocol.erase, re_mode="pixel")
    for part in transform.transforms:
        for operation in getattr(part, "ops", []):
            if operation.name.startswith("Posterize"):
                operation.aug_fn = _posterize
    return transform


def _posterize(image: Image.Image, bits: int, **_options: Any) -> Image.Image:
    """timm's posterize, but with at least one bit. timm also draws 0 bits, which Pillow 13 rejects."""
    return ImageOps.posterize(image, max(bits, 1)) if bits < 8 else image


def _mixup_and_loss(protocol: FinetuneProtocol, num_classes: int) -> tuple[Mixup | None, nn.Module]:
    """Mixup and CutMix, which also smooth the labels, and the matching loss."""
    if not (protocol.mixup or protocol.cutmix):
        return None, nn.CrossEntropyLoss(label_smoothing=protocol.smoothing)
    mixup = Mixup(protocol.mixup, protocol.cutmix, label_smoothing=protocol.smoothing, num_classes=num_classes)
    return mixup, SoftTargetCrossEntropy()


def _make_optimizer(model: nn.Module, head: nn.Linear, protocol: FinetuneProtocol, lr: float) -> Optimizer:
    """Each parameter group has a ``scale``: its learning rate relative to the schedule's."""
    if protocol.layer_decay < 1 or protocol.optimizer == "adamw":
        groups: list[dict[str, Any]] = param_groups_layer_decay(
            model,
            weight_decay=protocol.weight_decay,
            layer_decay=protocol.layer_decay,
            no_weight_decay_list=model.no_weight_decay() if hasattr(model, "no_weight_decay") else (),  # type: ignore[operator]
        )
    else:
        groups = [{"params": list(model.parameters()), "weight_decay": protocol.weight_decay}]
    head_params, adapt = set(head.parameters()), {"adapt": protocol.adapt_head}
    groups = [
        {**group, **options, "params": params, "scale": factor * group.get("lr_scale", 1.0)}
        for of_head, factor, options in ((False, 1.0, {}), (True, protocol.head_lr, adapt))
        for group in groups
        if (params := [param for param in group["params"] if (param in head_params) == of_head])
    ]
    if protocol.optimizer == "adamw":
        return AdamW(groups, lr=lr)
    if protocol.optimizer == "lars":
        return Lars(groups, lr=lr, rate_in_momentum=True)
    return SGD(groups, lr=lr, momentum=0.9)


def _set_lr(optimizer: Optimizer, protocol: FinetuneProtocol, epoch: float, batch_size: int) -> None:
    peak, epochs = protocol.peak_lr(batch_size), protocol.epochs
    warmup, start = protocol.warmup_epochs, protocol.warmup_start
    if protocol.decay == "epoch_cosine":
        epoch = per_epoch(epoch)
        rising = epoch < warmup
        lr = linear(epoch, warmup, start, peak) if rising else cosine(epoch, epochs, peak, protocol.final_lr)
    elif protocol.decay == "steps":
        lr = warmup_then_steps(epoch, [0.6 * epochs, 0.8 * epochs], 0.2, warmup, peak, start)
    else:
        lr = warmup_then_cosine(epoch, epochs, warmup, peak, start, protocol.final_lr)
    for group in optimizer.param_groups:
        group["lr"] = lr * group["scale"]


def _seed_all(*key: int) -> None:
    """Seed what drop path and mixup draw from, so that they do not depend on the number of workers."""
    seed = seed_from(*key, DrawPurpose.FINETUNE_DROPOUT)
    torch.manual_seed(seed)
    np.random.seed(seed)
