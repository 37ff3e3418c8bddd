"""Cost of a step of the training loop relative to the bare backbone passes, and in other implementations.

    python benchmarks/training_step.py [--methods moco_v2 moco_v3] [--backbone resnet18] [--size 64] [--batch 64]
    python benchmarks/training_step.py --all        # every method compared with the bare passes
    python benchmarks/training_step.py --device cuda --bf16 --batch 256 --size 224

The limit is the bare backbone: forward and backward of the student on its views, and forward of a copy on the teacher's
views, on the same batch. "Plain" is the official step, reimplemented: the queue as a matrix, the logits of all K + 1
keys in one matrix, cross-entropy, a teacher update per parameter. lightly's step uses its modules like its own example.
All end with the optimizer step. Times are measured alternately; use the ratios.
"""

import argparse
import copy
import itertools
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import timm
import torch
from side_by_side import in_turn, machine, ratios, table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from sslkit.data.batch import Batch
from sslkit.data.sources.image_source import open_source
from sslkit.engine.accelerator import make_accelerator
from sslkit.engine.setup import build_method, set_up_training
from sslkit.engine.steps_in_flight import steps_to_measure
from sslkit.methods import METHODS
from sslkit.profiling.stage_timer import synchronize
from sslkit.recipe.resolve import Recipe, build_recipe

NUM_SAMPLES = 10_000  # rows of a memory bank
K, DIM, TEMPERATURE = 65_536, 128, 0.2
# Backbone, side and batch of realistic cost: with small ones MoCo v3's heads would dominate.
SIZES = {"moco_v2": ("resnet50", 112, 32), "moco_v3": ("vit_small_patch16_224", 160, 32)}
SLICES = 4
Step = Callable[[], object]


def recipe_of(method: str, backbone: str, size: int, batch: int, *, bf16: bool = False) -> Recipe:
    """The paper's recipe at this size, with one BatchNorm group, so that all implementations make the same calls."""
    options = {"bn_groups": 1} if "bn_groups" in METHODS[method].Options.model_fields else {}
    return build_recipe(
        {
            "method": {"name": method, **options},
            "backbone": {"name": backbone},
            "data": {"path": "builtin:fashion_mnist", "workers": 0},  # as many threads as the others have
            "views": {"size": size, "small_crops": 0},
            "train": {"batch_size": batch, "precision": "bf16" if bf16 else "no"},
        }
    )


def sslkit_step(recipe: Recipe, views: list[Tensor], slices: int = 1) -> Step:
    """A step of the training loop on pixels: it normalises, reduces loss and flags, and judges the gradient's norm."""
    device = views[0].device
    if slices > 1:
        recipe = replace(recipe, train=recipe.train.model_copy(update={"micro_batch": len(views[0]) // slices}))
    accelerator = make_accelerator(recipe)
    state = set_up_training(recipe, open_source(recipe.data).without_labels(), accelerator)
    state.method.train()
    shape = (len(views[0]), *views[0].shape[2:], 3)
    pixels = [torch.randint(256, shape, dtype=torch.uint8, device=device) for _ in views]
    batch = Batch(pixels, torch.arange(len(views[0]), device=device))
    steps = steps_to_measure(state)

    def step() -> None:
        steps.start(batch)
        steps.finish(all_steps=False)

    return step


def bare_passes(recipe: Recipe, views: list[Tensor]) -> Step:
    """Forward and backward of the backbone on the student's views, and forward of a copy on the teacher's."""
    torch.manual_seed(0)
    method = build_method(recipe, NUM_SAMPLES).to(views[0].device, memory_format=torch.channels_last)
    student = method.backbone
    teacher = copy.deepcopy(student)
    student_views = len(method.student([view[:2] for view in views]))

    def step() -> None:
        sum(student(view).sum() for view in views[:student_views]).backward()
        with torch.no_grad():
            for index in method.teacher_views:
                teacher(views[index])

    return step


def mlp(*widths: int, batch_norm: bool) -> nn.Sequential:
    """Linear layers with the layers between them."""
    layers: list[nn.Module] = []
    for number, (inside, outside) in enumerate(itertools.pairwise(widths)):
        layers.append(nn.Linear(inside, outside, bias=not batch_norm))
        layers += [nn.BatchNorm1d(outside)] if batch_norm else []
        layers += [nn.ReLU()] if number < len(widths) - 2 else []
    return nn.Sequential(*layers)


def encoder(recipe: Recipe, device: torch.device, *widths: int, batch_norm: bool) -> nn.Module:
    """A backbone and its projector."""
    backbone = timm.create_model(recipe.backbone.name, num_classes=0, **_sized(recipe))
    whole = nn.Sequential(backbone, mlp(backbone.num_features, *widths, batch_norm=batch_norm))
    return whole.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def _sized(recipe: Recipe) -> dict[str, Any]:
    return {"img_size": recipe.views.size} if recipe.backbone.name.startswith("vit") else {}


@torch.no_grad()
def move(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """Teacher update: the official loop over parameters."""
    for old, new in zip(teacher.parameters(), student.parameters(), strict=True):
        old.data = old.data * momentum + new.data * (1.0 - momentum)


def plain_moco_v2(recipe: Recipe, views: list[Tensor]) -> Step:
    """MoCo v2 step with a (B, 1 + K) matrix of logits."""
    device = views[0].device
    student = encoder(recipe, device, 2048, DIM, batch_norm=False)
    teacher = copy.deepcopy(student).requires_grad_(False)
    queue, position = normalize(torch.randn(DIM, K, device=device), dim=0), itertools.count()
    optimizer = torch.optim.SGD(student.parameters(), 0.03, momentum=0.9, weight_decay=1e-4)
    batch = len(views[0])

    def step() -> None:
        query = normalize(student(views[0]), dim=1)
        with torch.no_grad():
            move(teacher, student, 0.999)
            order = torch.randperm(batch)
            key = normalize(teacher(views[1][order]), dim=1)[torch.argsort(order)]
        positive = torch.einsum("nc,nc->n", query, key).unsqueeze(-1)
        negative = torch.einsum("nc,ck->nk", query, queue.clone().detach())
        logits = torch.cat([positive, negative], dim=1) / TEMPERATURE
        loss = cross_entropy(logits, torch.zeros(batch, dtype=torch.long, device=device))
        start = next(position) * batch % K
        queue[:, start : start + batch] = key.T
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def plain_moco_v3(recipe: Recipe, views: list[Tensor]) -> Step:
    """MoCo v3 step: predictions of each view against keys of the other view, in both directions."""
    device = views[0].device
    student = encoder(recipe, device, 4096, 4096, 256, batch_norm=True)
    teacher = copy.deepcopy(student).requires_grad_(False)
    predictor = mlp(256, 4096, 256, batch_norm=True).to(device)
    optimizer = torch.optim.AdamW([*student.parameters(), *predictor.parameters()], 1e-4, weight_decay=0.1)
    batch = len(views[0])

    def contrast(query: Tensor, key: Tensor) -> Tensor:
        logits = torch.einsum("nc,mc->nm", normalize(query, dim=1), normalize(key, dim=1)) / TEMPERATURE
        return cross_entropy(logits, torch.arange(batch, device=device)) * (2 * TEMPERATURE)

    def step() -> None:
        queries = [predictor(student(view)) for view in views]
        with torch.no_grad():
            move(teacher, student, 0.99)
            keys = [teacher(view) for view in views]
        loss = contrast(queries[0], keys[1]) + contrast(queries[1], keys[0])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def lightly_moco_v2(recipe: Recipe, views: list[Tensor]) -> Step:
    """lightly's loss with its memory bank, head and momentum update."""
    utils: Any = import_module("lightly.models.utils")
    device = views[0].device
    backbone = timm.create_model(recipe.backbone.name, num_classes=0).to(device, memory_format=torch.channels_last)
    head = import_module("lightly.models.modules").MoCoProjectionHead(backbone.num_features, 2048, DIM).to(device)
    backbone_teacher, head_teacher = copy.deepcopy(backbone), copy.deepcopy(head)
    utils.deactivate_requires_grad(backbone_teacher)
    utils.deactivate_requires_grad(head_teacher)
    loss_of = import_module("lightly.loss").NTXentLoss(temperature=TEMPERATURE, memory_bank_size=(K, DIM)).to(device)
    optimizer = torch.optim.SGD([*backbone.parameters(), *head.parameters()], 0.03, momentum=0.9, weight_decay=1e-4)

    def step() -> None:
        utils.update_momentum(backbone, backbone_teacher, m=0.999)
        utils.update_momentum(head, head_teacher, m=0.999)
        query = head(backbone(views[0]).flatten(start_dim=1))
        with torch.no_grad():
            key = head_teacher(backbone_teacher(views[1]).flatten(start_dim=1))
        loss = loss_of(query, key)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


CONTENDERS = {
    "moco_v2": {"plain transcription": plain_moco_v2, "lightly": lightly_moco_v2},
    "moco_v3": {"plain transcription": plain_moco_v3},
}


def on_device(step: Step, device: torch.device, *, bf16: bool) -> Step:
    """The same function under autocast, if requested, followed by a device synchronisation."""

    def call() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            step()
        synchronize(device)

    return call


def measure(method: str, recipe: Recipe, words: argparse.Namespace) -> list[list[str]]:
    """Rows of the table."""
    size, batch, device = recipe.views.size, recipe.train.batch_size, torch.device(words.device)
    views = [torch.randn(batch, 3, size, size).to(device, memory_format=torch.channels_last) for _ in range(2)]
    steps: dict[str, Step] = {"bare passes": bare_passes(recipe, views), "sslkit": sslkit_step(recipe, views)}
    if recipe.backbone.name.startswith("vit"):  # in a ResNet, each slice has its own batch statistics
        steps[f"sslkit, {SLICES} slices"] = sslkit_step(recipe, views, SLICES)
    for name, make in ({} if words.all else CONTENDERS[method]).items():
        if name != "lightly" or find_spec("lightly"):
            steps[name] = make(recipe, views)
    works = {name: on_device(step, device, bf16=words.bf16) for name, step in steps.items()}
    what = f"{method}, {recipe.backbone.name}, {size} px, batch {batch}"
    found = ratios(in_turn(works, words.rounds, warm_up=2), "bare passes")
    return [[what, name, *(f"{number:.3f}" for number in found[name])] for name in works if name != "bare passes"]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="*", default=list(CONTENDERS))
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--backbone", default="")
    parser.add_argument("--size", type=int, default=0)
    parser.add_argument("--batch", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action="store_true")
    words = parser.parse_args()
    print(machine("torch", "timm", "lightly"), f"{torch.get_num_threads()} thread(s)")
    rows = []
    for method in METHODS if words.all else words.methods:
        backbone, size, batch = SIZES.get(method, ("resnet18", 64, 64))
        recipe = recipe_of(
            method, words.backbone or backbone, words.size or size, words.batch or batch, bf16=words.bf16
        )
        rows += measure(method, recipe, words)
    print(table(["what", "step of", "times the bare passes", "lower quartile", "upper quartile"], rows))


if __name__ == "__main__":
    main()
