"""Checks of one training step: gradients, the method's contract, the views, and the first loss."""

import math

import torch
from torch import nn

from sslkit.doctor.doctor_setup import START, DoctorSetup, StepRecord
from sslkit.doctor.findings import Check, Finding, describe_error
from sslkit.methods import Method, Progress
from sslkit.parts.batchnorm import has_batch_norm
from sslkit.parts.chance_loss import ChanceLoss
from sslkit.parts.queue import KeyQueue
from sslkit.text import pluralize

STEP, GRADIENT, CONTRACT = map(Check, ("step", "gradient", "method contract"))
VIEWS_USED, FIRST_LOSS, LEAK = map(Check, ("views used", "first loss", "batch norm leak"))


def check_training(setup: DoctorSetup) -> tuple[list[Finding], StepRecord | None]:
    """Make one step and run all checks on it; the record is None if the step fails."""
    try:
        record = setup.run_step(backward=True)
    except Exception as error:
        return [STEP.fault(f"the first training step stops with {describe_error(error)}")], None
    loss = float(record.loss.detach())
    if not math.isfinite(loss):
        return [STEP.fault(f"the loss is {loss} on the first images of the run")], None
    return [
        STEP.ok(f"runs on {pluralize(setup.batch_size, 'image')} of your data, loss {loss:.4g}"),
        GRADIENT.attempt(lambda _: check_gradient(setup.method, record)),
        VIEWS_USED.attempt(lambda _: check_views_used(setup, record)),
        FIRST_LOSS.attempt(lambda _: check_first_loss(setup, loss)),
        check_contract(setup, record),  # last: it changes teachers and dictionaries
    ], record


def check_gradient(method: Method, record: StepRecord) -> Finding:
    """Check that every trained module and every view's features receive a finite gradient that is not zero."""
    if not record.loss.requires_grad:
        return GRADIENT.fault("the loss has no gradient: a tensor on the way to it is detached")
    teachers = list(method.teachers().values())
    trained = {
        name: params
        for name, module in method.named_children()
        if module not in teachers and (params := [param for param in module.parameters() if param.requires_grad])
    }
    for name in ("backbone", *method.heads):
        if name not in trained and any(True for _ in method.get_submodule(name).parameters()):
            return GRADIENT.fault(f"{name} is frozen: none of its parameters requires a gradient")
    for name, params in trained.items():
        if problem := _gradient_problem(params, may_skip=name == "backbone"):
            return GRADIENT.fault(f"{problem} {name}")
    for index, features in enumerate(record.student_features):
        if features.grad is None or not features.grad.any():
            return GRADIENT.fault(
                f"the student's features {index + 1} of {len(record.student_features)} receive no gradient: the "
                "objective detaches them. Features that need no gradient belong in teacher()"
            )
    if unused := sum(param.grad is None for param in trained["backbone"]):
        return GRADIENT.warning(
            f"{pluralize(unused, 'parameter')} of the backbone never receive a gradient. This works on 1 process; on "
            "several, DistributedDataParallel stops with an error: freeze them with requires_grad_(False)"
        )
    return GRADIENT.ok(f"reaches {', '.join(trained)} and the features of every view")


def _gradient_problem(params: list[nn.Parameter], *, may_skip: bool) -> str:
    """What is wrong with a module's gradients, to be followed by its name; empty if nothing is."""
    grads = [param.grad for param in params if param.grad is not None]
    if not any(grad.any() for grad in grads):
        return "no gradient reaches"
    if len(grads) < len(params) and not may_skip:
        return f"no gradient reaches {pluralize(len(params) - len(grads), 'parameter')} of"
    return "" if all(grad.isfinite().all() for grad in grads) else "a gradient is not finite in"


def check_views_used(setup: DoctorSetup, record: StepRecord) -> Finding:
    """Check that the loss changes if the second views are exchanged between images."""
    method = setup.method
    if method.negatives == "bank":
        return VIEWS_USED.not_applicable("images are compared with the memory bank, not with a second view")
    exchanged = [setup.views[0], *[view.roll(1, dims=0) for view in setup.views[1:]]]
    loss, other = float(record.loss.detach()), float(setup.run_step(exchanged).loss)
    if abs(other - loss) < 1e-4 * abs(loss):
        loss = float(setup.run_step().loss)  # without a graph some kernels round differently
    if other != loss:
        return VIEWS_USED.ok("the loss compares different views of an image")
    compares = method.negatives != "none" or bool(method.teachers())
    return (VIEWS_USED.fault if compares else VIEWS_USED.warning)(
        "the loss does not depend on the second view: the first view is compared with itself or with nothing"
    )


def check_first_loss(setup: DoctorSetup, loss: float) -> Finding:
    """Check that the first loss is not above chance.

    It is judged only if each query is compared with vectors that are random at first. If it is compared with the
    batch, the embeddings of a new network span so few directions that chance is above its formula.
    """
    chance = setup.method.chance_loss(setup.batch_size)
    if chance is None:
        return FIRST_LOSS.not_applicable(f"{loss:.4g}; the method does not declare its loss at chance")
    tolerance = first_loss_tolerance(setup.method, chance, setup.batch_size)
    if tolerance is not None and loss > chance.value + tolerance:
        return FIRST_LOSS.fault(
            f"{loss:.4g} is above chance ({chance.value:.4g} = {chance.formula}): the views of an image are less "
            "similar than views of different images. Check the order of the teacher's features"
        )
    return FIRST_LOSS.ok(f"{loss:.4g}; random embeddings would give {chance.value:.4g} = {chance.formula}")


def first_loss_tolerance(method: Method, chance: ChanceLoss, batch_size: int) -> float | None:
    """How far above chance the first loss may be by accident; None if that is not known."""
    if method.negatives == "bank":
        return 5 * chance.standard_error(batch_size) + (chance.tolerance(1) if chance.is_info_nce else 0.5)
    if method.negatives == "queue":
        return chance.scale * 2 * chance.standard_error(1) + chance.tolerance(1)
    if chance.negatives is None:
        return 10 * chance.standard_error(1)  # a new network gives all images nearly the same embedding
    return None


def check_batch_norm_leak(method: Method) -> Finding:
    """Check that keys are shuffled between BN groups if the negatives come from other batches."""
    if method.negatives != "queue" or not has_batch_norm(method.backbone):
        return LEAK.not_applicable("no queue of negatives, or no BatchNorm in the backbone")
    leak = "a key has the same BatchNorm statistics as its query, which identify it among the keys of the queue"
    if not method.shuffle_keys:
        return LEAK.fault(f"{leak}: shuffle the keys (set method.shuffle = true)")
    if method.bn_groups == 1:
        return LEAK.fault(f"{leak}: set method.bn_groups = 8, as in the paper")
    return LEAK.ok(f"keys are shuffled between {method.bn_groups} BatchNorm groups")


def check_contract(setup: DoctorSetup, record: StepRecord) -> Finding:
    """Check that teachers are not trained, and that queues and memory banks change after an update only.

    How teachers move is a matter of the method alone; `tests/methods/contract_checks.py` tests it.
    """
    method = setup.method
    for name, teacher in method.teachers().items():
        if any(param.requires_grad for param in teacher.parameters()):
            return CONTRACT.fault(f"the teacher of {name} is trained: make a copy of {name} with MomentumTeacher")
    if any(features.requires_grad for features in record.teacher_features):
        return CONTRACT.fault("teacher() returns features with a gradient: call the teacher's modules only")
    try:
        before = _dictionary_sums(method)
        setup.run_step()
        computed = _dictionary_sums(method)
        method.after_update(Progress(1, START.total_updates))
        updated = _dictionary_sums(method)
    except Exception as error:
        return CONTRACT.fault(f"the method stops between two steps: {describe_error(error)}")
    for name in before:
        if computed[name] != before[name]:
            return CONTRACT.fault(
                f"{name} changes in the forward pass, so keys can be their own negatives: push new keys in after_update"
            )
        if updated[name] == before[name] and method.negatives in ("queue", "bank"):
            return CONTRACT.fault(f"{name} does not receive the embeddings of the batch: push them in after_update")
    teachers, dictionaries = ", ".join(method.teachers()) or "none", ", ".join(before) or "none"
    return CONTRACT.ok(
        f"teachers ({teachers}) are not trained; dictionaries ({dictionaries}) change after an update only"
    )


def _dictionary_sums(method: Method) -> dict[str, float]:
    """The sum of each queue and memory bank, which differs after any change."""
    rows = {
        name: part.keys if isinstance(part, KeyQueue) else part.rows for name, part in method.dictionaries().items()
    }
    return {name: float(tensor.sum(dtype=torch.float64)) for name, tensor in rows.items()}
