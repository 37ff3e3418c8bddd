"""Conformance tests of a method: one function for each promise, which raises AssertionError if it is broken.

`sslkit doctor` checks what depends on a user's recipe. These functions check what only the author of a method can get
wrong: the objective, how teachers move, and what queues hold. `test_contract.py` runs all of them on every registered
method, those of installed packages included, and `mutants.py` holds methods with one error each that one of them must
find.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from conftest import small_recipe
from methods.objective_probe import (
    START,
    ObjectiveProbe,
    assert_gradient,
    assert_loss_level,
    assert_pairs,
    assert_positive,
)
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.nn.modules.batchnorm import _BatchNorm

from sslkit.doctor.doctor_setup import spread_order
from sslkit.engine.setup import build_method
from sslkit.methods import BatchInfo, Method, Progress
from sslkit.methods.base import Features, Permutation, Views
from sslkit.parts.batch_slices import local_bn_groups
from sslkit.parts.batchnorm import has_batch_norm
from sslkit.parts.queue import KeyQueue
from sslkit.recipe.resolve import Recipe

BATCH, SIZE, NUM_SAMPLES = 8, 32, 20


@dataclass
class MethodCase:
    """A method in training mode and a batch of random images, whose views resemble each other.

    Attributes:
        recipe: What the method was built from.
        method: In float32, with 2 BN groups or fewer.
        views: Normalised, each (B, 3, H, W).
        student_features: Of `views`, with a graph.
        teacher_features: Of `views`.
    """

    recipe: Recipe
    method: Method
    views: Views
    student_features: Features
    teacher_features: Features

    @property
    def info(self) -> BatchInfo:
        """Sample ids of the batch."""
        return BatchInfo(torch.arange(BATCH))

    @property
    def order(self) -> Permutation | None:
        """A permutation that distributes each BN group over all of them, if the method shuffles keys."""
        return spread_order(BATCH, self.method.bn_groups) if self.method.shuffle_keys else None

    def probe(self) -> ObjectiveProbe:
        """The method's objective alone."""
        counts = len(self.student_features), len(self.teacher_features)
        return ObjectiveProbe(type(self.method), self.recipe.method, *counts)


def make_case(name: str, model: str, /, **options: object) -> MethodCase:
    """Build a registered method on a small backbone."""
    recipe = small_recipe(name, model, method=options, train={"batch_size": BATCH})
    torch.manual_seed(0)
    method = build_method(recipe, NUM_SAMPLES).train()
    images = torch.randn(BATCH, 3, SIZE, SIZE)
    num_views = len(recipe.views.view_policies())
    views = [images + 0.1 * torch.randn_like(images) for _ in range(num_views)]
    case = MethodCase(recipe, method, views, [], [])
    case.student_features = queries_of(case, views)
    case.teacher_features = keys_of(case, views, case.order) if method.teacher_views else []
    return case


def queries_of(case: MethodCase, views: Views) -> Features:
    """The student's features, as `Method.forward` computes them."""
    torch.manual_seed(0)
    return case.method.student_in_slices(views, local_bn_groups(case.method.bn_groups), case.order)


@torch.no_grad()
def keys_of(case: MethodCase, views: Views, order: Permutation | None) -> Features:
    """The features that are keys: the teacher's, or those of the student's key views."""
    method, groups = case.method, local_bn_groups(case.method.bn_groups)
    torch.manual_seed(0)
    if method.teacher_views:
        return method.teacher_in_slices(views, groups, order)
    features = method.student_in_slices(views, groups, order)
    return [features[index] for index in method.student_key_views] or features


def objective_alone(check: Callable[[ObjectiveProbe], None]) -> Callable[[MethodCase], None]:
    """A check of the objective as a check of the method."""
    return lambda case: check(case.probe())


def assert_teacher_is_used(case: MethodCase) -> None:
    """Each teacher is called, and its BatchNorm uses the statistics of the batch."""
    called = set()
    hooks = [
        teacher.module.register_forward_hook(lambda *_, name=name: called.add(name))
        for name, teacher in case.method.teachers().items()
    ]
    case.method(case.views, case.info, START, case.order)
    for hook in hooks:
        hook.remove()
    for name, teacher in case.method.teachers().items():
        assert name in called or not list(teacher.parameters()), f"the teacher of {name} is never called"
        layers = [layer for layer in teacher.modules() if isinstance(layer, _BatchNorm)]
        assert all(layer.training for layer in layers), f"the teacher of {name} uses running statistics"


def assert_teacher_keeps_statistics(case: MethodCase) -> None:
    """`after_update` leaves the teachers' running statistics alone: they collect their own."""
    case.method(case.views, case.info, START, case.order)
    before = {name: [b.clone() for b in teacher.buffers()] for name, teacher in case.method.teachers().items()}
    case.method.after_update(Progress(1, 100))
    for name, teacher in case.method.teachers().items():
        for old, new in zip(before[name], teacher.buffers(), strict=True):
            assert torch.equal(old, new), f"running statistics of the teacher of {name} are averaged"


def assert_teacher_starts_as_copy(case: MethodCase) -> None:
    """A teacher that moves starts with its student's weights: else the student learns to agree with other weights."""
    for name, teacher in case.method.teachers().items():
        if teacher.momentum_at(START) < 1.0:
            same = torch.equal(weights(teacher), weights(case.method.get_submodule(name)))
            assert same, f"the teacher of {name} does not start as a copy of the student"


def assert_teacher_moves_as_declared(case: MethodCase) -> None:
    """`after_update` moves each teacher towards its student with the momentum it declares, and changes no student.

    A forward pass moves no teacher.
    """
    method = case.method
    state = copy.deepcopy(method.state_dict())
    change_student(method)
    before = {name: weights(teacher) for name, teacher in method.teachers().items()}
    method(case.views, case.info, START, case.order)
    for name, teacher in method.teachers().items():
        assert torch.equal(before[name], weights(teacher)), f"the teacher of {name} moves in the forward pass"
    for updates in (1, START.total_updates):
        progress = Progress(updates, START.total_updates)
        trained = [param for param in method.parameters() if param.requires_grad]
        student = [param.detach().clone() for param in trained]
        before = {name: weights(teacher) for name, teacher in method.teachers().items()}
        method.after_update(progress)
        assert all(map(torch.equal, student, trained)), "after_update changes the student: it may move teachers only"
        for name, teacher in method.teachers().items():
            move = (weights(teacher) - before[name]).double()
            way = (weights(method.get_submodule(name)) - before[name]).double()
            share = float(move @ way / way.square().sum().clamp_min(1e-300))
            aside, momentum = (move - share * way).norm(), teacher.momentum_at(progress)
            # A momentum of almost 1 moves by no more than rounding.
            assert aside <= 0.1 * move.norm() + 1e-6 * way.norm(), (
                f"the teacher of {name} moves, but not towards the student's {name}"
            )
            assert abs(share - (1.0 - momentum)) < 0.1 * (1.0 - momentum) + 1e-6, (
                f"the teacher of {name} moves with momentum {1.0 - share:.4g}; it declares {momentum:g}"
            )
    method.load_state_dict(state)


def change_student(method: Method) -> None:
    """Change every trained weight by about half its size: an average of two equal networks moves nothing."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for param in method.parameters():
            if param.requires_grad:
                size = param.square().mean().sqrt().clamp_min(1e-2)
                param.add_(torch.randn(param.shape, generator=generator) * size, alpha=0.5)


def weights(module: nn.Module) -> Tensor:
    """A copy of all parameters, as one vector."""
    return torch.cat([torch.zeros(0), *(param.detach().flatten() for param in module.parameters())])


def assert_gradient_stops_at_teacher(case: MethodCase) -> None:
    """No trained module learns through the teacher's features."""
    method, passed = case.method, list[tuple[str, Tensor]]()
    if not case.teacher_features:
        return

    def keep(name: str, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if any(isinstance(each, Tensor) and each.requires_grad for each in inputs) and output.requires_grad:
            passed.append((name, output))

    teachers = list(method.teachers().values())
    hooks = [
        child.register_forward_hook(lambda _module, inputs, output, name=name: keep(name, inputs, output))
        for name, child in method.named_children()
        if child not in teachers and any(param.requires_grad for param in child.parameters())
    ]
    student = [features.detach() for features in case.student_features]
    teacher = [features.detach().clone().requires_grad_() for features in case.teacher_features]
    with frozen_parameters(method):
        loss = method.objective(student, teacher, case.info, START).loss
    for hook in hooks:
        hook.remove()
    if loss.requires_grad and passed:
        grads = torch.autograd.grad(loss, [output for _, output in passed], allow_unused=True)
        leaks = {name for (name, _), grad in zip(passed, grads, strict=True) if grad is not None and grad.any()}
        assert not leaks, f"{leaks} learn through the teacher's features"


@contextmanager
def frozen_parameters(method: Method) -> Iterator[None]:
    """Let no parameter require a gradient."""
    trained = [param for param in method.parameters() if param.requires_grad]
    for param in trained:
        param.requires_grad_(False)
    yield
    for param in trained:
        param.requires_grad_(True)


def assert_key_order(case: MethodCase) -> None:
    """In eval mode no image depends on another, so shuffled keys equal unshuffled ones, row by row."""
    if not case.method.shuffle_keys:
        return
    case.method.eval()
    shuffled, straight = (keys_of(case, case.views, order) for order in (case.order, None))
    case.method.train()
    for one, other in zip(shuffled, straight, strict=True):
        assert not differing_rows(one, other).any(), "shuffled keys do not come back in their order"


def assert_batch_norm_does_not_leak(case: MethodCase) -> None:
    """A key that is compared with keys of other batches or groups has other batch companions than its query.

    The companions of an image are the images whose features change if it changes.
    """
    method = case.method
    compares_groups = method.negatives == "queue" or (method.shuffle_keys and method.bn_groups > 1)
    if not has_batch_norm(method.backbone) or not compares_groups:
        return
    changed = [view.clone() for view in case.views]
    for view in changed:
        view[0] = -view[0]
    of_query = differing_rows(queries_of(case, case.views)[0], queries_of(case, changed)[0])
    of_key = differing_rows(*(keys_of(case, views, case.order)[0] for views in (case.views, changed)))
    of_query[0] = of_key[0] = False
    fewest, shared = min(int(of_query.sum()), int(of_key.sum())), int((of_query & of_key).sum())
    assert not fewest or shared < fewest, "a key is computed among the same images as its query"


def differing_rows(one: Tensor, other: Tensor) -> Tensor:
    """(B,) bool: the rows that differ by more than rounding."""
    return (one - other).detach().abs().amax(dim=1) > 1e-4 * one.detach().abs().max().clamp_min(1e-12)


def assert_queue_holds_keys(case: MethodCase) -> None:
    """What enters a queue of negatives is what the teacher's last head returned, and the pointer moves by as much."""
    method = case.method
    if method.negatives != "queue":
        return
    embeddings: list[Tensor] = []
    last_head = [name for name in method.heads if name in method.teachers()][-1]
    module = method.teachers()[last_head].module
    hook = module.register_forward_hook(lambda _module, _inputs, output: embeddings.append(output.detach()))
    (queue,) = (part for part in method.dictionaries().values() if isinstance(part, KeyQueue))
    before, pointer = queue.keys.clone(), int(queue.pointer)
    method(case.views, case.info, START, case.order)
    hook.remove()
    method.after_update(Progress(1, 100))
    new = queue.keys[(queue.keys != before).any(dim=1)]
    assert len(new), "no key enters the queue"
    if embeddings:
        keys = normalize(torch.cat(embeddings), dim=1)
        assert (new @ keys.T).amax(dim=1).min() > 0.999, "the queue receives something else than the teacher's keys"
    assert int(queue.pointer) == (pointer + len(new)) % len(queue.keys), "the pointer does not move by the new keys"


CHECKS: dict[str, Callable[[MethodCase], None]] = {
    "pairs": objective_alone(assert_pairs),
    "positive": objective_alone(assert_positive),
    "loss level": objective_alone(assert_loss_level),
    "gradient": objective_alone(assert_gradient),
    "stop-gradient": assert_gradient_stops_at_teacher,
    "teacher used": assert_teacher_is_used,
    "teacher copied": assert_teacher_starts_as_copy,
    "teacher moves": assert_teacher_moves_as_declared,
    "teacher statistics": assert_teacher_keeps_statistics,
    "key order": assert_key_order,
    "batch norm leak": assert_batch_norm_does_not_leak,
    "queue": assert_queue_holds_keys,
}


def failing_checks(case: MethodCase) -> list[str]:
    """Names of the checks that a method fails."""
    failed = []
    for name, check in CHECKS.items():
        try:
            check(case)
        except AssertionError:
            failed.append(name)
    return failed
