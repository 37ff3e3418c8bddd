"""The examples of lightly and stable-pretraining on the small sets, scored like the cells of plan_experiments.py.

    python benchmarks/plan_others.py runs/small_sets [--only NAME ...] [--sets NAME ...] [--seeds 0 1 2] [--size 32]

Settings are those of their CIFAR-10 examples at 32 pixels (lightly 1.6: MoCo and SimCLR of its benchmark;
stable-pretraining 0.1.8: SimCLR), with the backbone, the images and the epochs of the cells. Loss, projector,
optimizer, transform and teacher are those packages' own classes; the loop around them is plain PyTorch. Both packages
must be installed; sslkit does not need them.
"""

import argparse
import copy
import json
import math
import random
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from lightly.loss import NTXentLoss
from lightly.models import utils
from lightly.models.modules import heads
from lightly.transforms import SimCLRTransform
from own_scorer import score
from PIL import Image
from plan_experiments import MEASURED, VARIANTS
from small_sets import SmallSet, load
from stable_pretraining.data import transforms
from stable_pretraining.losses import NTXEntLoss
from stable_pretraining.optim import LARS, LinearWarmupCosineAnnealing
from torch import Tensor, nn

Step = Callable[[Tensor, Tensor], Tensor]
CIFAR = {"mean": [0.4914, 0.4822, 0.4465], "std": [0.2470, 0.2435, 0.2616]}
IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


def lightly_transform(size: int) -> Any:
    """Two views by SimCLR's transform at half the colour changes and without blur, as the benchmark has it."""

    return SimCLRTransform(input_size=size, cj_strength=0.5, gaussian_blur=0.0)


def lightly_moco(backbone: nn.Module, epochs: int, steps: int) -> tuple[Step, Any, Any]:
    """MoCo: symmetric, bank of 4 096, temperature 0.1, teacher momentum 0.99, SGD at 0.06 for a batch of 128."""

    width = backbone.num_features
    head = heads.MoCoProjectionHead(width, width, 128)
    teacher, teacher_head = copy.deepcopy(backbone), copy.deepcopy(head)
    for module in (teacher, teacher_head):
        utils.deactivate_requires_grad(module)
    criterion = NTXentLoss(temperature=0.1, memory_bank_size=(4096, 128))

    def half(queries: Tensor, keys: Tensor) -> Tensor:
        with torch.no_grad():
            keys, order = utils.batch_shuffle(keys)
            encoded = utils.batch_unshuffle(teacher_head(teacher(keys)), order)
        loss: Tensor = criterion(head(backbone(queries)), encoded)
        return loss

    def step(first: Tensor, second: Tensor) -> Tensor:
        utils.update_momentum(backbone, teacher, 0.99)
        utils.update_momentum(head, teacher_head, 0.99)
        return 0.5 * (half(first, second) + half(second, first))

    return step, *_sgd([backbone, head], epochs, steps)


def lightly_simclr(backbone: nn.Module, epochs: int, steps: int) -> tuple[Step, Any, Any]:
    """SimCLR: temperature 0.5, SGD at 0.06 for a batch of 128."""

    width = backbone.num_features
    head = heads.SimCLRProjectionHead(width, width, 128)
    criterion = NTXentLoss(temperature=0.5)

    def step(first: Tensor, second: Tensor) -> Tensor:
        loss: Tensor = criterion(head(backbone(first)), head(backbone(second)))
        return loss

    return step, *_sgd([backbone, head], epochs, steps)


def _sgd(modules: list[nn.Module], epochs: int, steps: int) -> tuple[Any, Any]:
    weights = [weight for module in modules for weight in module.parameters()]
    optimizer = torch.optim.SGD(weights, lr=0.06, momentum=0.9, weight_decay=5e-4)
    # Cosine by epochs, as the benchmark steps its scheduler.
    return optimizer, torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda done: 0.5 * (1 + math.cos(math.pi * (done // steps) / epochs))
    )


def stable_transform(size: int) -> Any:
    """Two views by the transform of the example."""

    def one() -> Any:
        return transforms.Compose(
            transforms.RGB(),
            transforms.RandomResizedCrop((size, size)),
            transforms.RandomHorizontalFlip(p=0.5),
            transforms.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, p=0.8),
            transforms.RandomGrayscale(p=0.2),
            transforms.ToImage(**CIFAR),
        )

    views = (one(), one())
    return lambda image: [view({"image": image})["image"] for view in views]


def stable_simclr(backbone: nn.Module, epochs: int, steps: int) -> tuple[Step, Any, Any]:
    """SimCLR: projector 2048-2048-256, temperature 0.5, LARS at 5 for a batch of 256, a tenth of warm-up, cosine."""

    head = nn.Sequential(
        *(nn.Linear(backbone.num_features, 2048), nn.BatchNorm1d(2048), nn.ReLU(inplace=True)),
        *(nn.Linear(2048, 2048), nn.BatchNorm1d(2048), nn.ReLU(inplace=True), nn.Linear(2048, 256)),
    )
    criterion = NTXEntLoss(temperature=0.5)

    def step(first: Tensor, second: Tensor) -> Tensor:
        loss: Tensor = criterion(head(backbone(first)), head(backbone(second)))
        return loss

    optimizer = LARS([*backbone.parameters(), *head.parameters()], lr=5, weight_decay=1e-6)
    return step, optimizer, LinearWarmupCosineAnnealing(optimizer, total_steps=epochs * steps)


EXAMPLES = {
    "lightly MoCo": (lightly_moco, lightly_transform, 128, IMAGENET),
    "lightly SimCLR": (lightly_simclr, lightly_transform, 128, IMAGENET),
    "stable-pretraining SimCLR": (stable_simclr, stable_transform, 256, CIFAR),
}


def batches(images: SmallSet, transform: Any, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch of pairs of views, without a last incomplete batch."""
    pictures = images.train[0]
    order = torch.randperm(len(pictures)).tolist()
    for start in range(0, len(order) - size + 1, size):
        pairs = [transform(Image.fromarray(pictures[index])) for index in order[start : start + size]]
        first, second = (torch.stack([pair[view] for pair in pairs]) for view in range(2))
        yield first, second


def run_example(name: str, images: SmallSet, epochs: int, size: int, seed: int, backbone: str) -> dict[str, float]:
    """Train one example and score its encoder."""
    build, make_transform, batch_size, normalization = EXAMPLES[name]
    for seeding in (random.seed, np.random.seed, torch.manual_seed):
        seeding(seed)
    started = time.perf_counter()
    model: Any = timm.create_model(backbone, num_classes=0)
    steps = len(images.train[0]) // batch_size
    step, optimizer, schedule = build(model, epochs, steps)
    transform = make_transform(size)
    for _ in range(epochs):
        for first, second in batches(images, transform, batch_size):
            loss = step(first, second)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    seconds = time.perf_counter() - started
    model.pretrained_cfg |= {"input_size": (3, size, size), **normalization}
    return {**score(model.eval(), images), "loss": round(loss.item(), 3), "seconds": round(seconds, 1)}


def main() -> None:
    """Run the cells that are missing, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of small_sets.py")
    parser.add_argument("--only", nargs="*", default=list(EXAMPLES))
    parser.add_argument("--sets", nargs="*", default=["emoji", "tiles", "garments"])
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--size", type=int, default=32, help="of the views, in pixels")
    words = parser.parse_args()
    torch.set_num_threads(1)
    spec: dict[str, Any] = tomllib.loads(VARIANTS.read_text(encoding="utf-8"))
    for seed in words.seeds:
        for name in words.only:
            for chosen in words.sets:
                variant = name if words.size == 32 else f"{name}, {words.size} pixels"
                key = f"{variant}, {chosen}, seed {seed}"
                if key in json.loads(MEASURED.read_text(encoding="utf-8")):
                    continue
                epochs, backbone = spec["set"][chosen]["train.epochs"], spec["base"]["backbone.name"]
                scores = run_example(name, load(chosen, words.folder), epochs, words.size, seed, backbone)
                now = json.loads(MEASURED.read_text(encoding="utf-8"))
                now[key] = {"variant": variant, "set": chosen, "seed": seed, "scores": scores}
                MEASURED.write_text(json.dumps(now, indent=1) + "\n", encoding="utf-8")
                print(variant, chosen, seed, scores, flush=True)


if __name__ == "__main__":
    main()
