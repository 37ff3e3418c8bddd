"""Checks of one training step: gradients, the method's contract, the views, and the first loss."""

import math

import torch
from torch import Tensor, nn

from sslkit.doctor.doctor_setup import START, DoctorSetup, StepRecord
from sslkit.doctor.findings import Finding, attempt, fault, fault_if_any, first_line, not_applicable, ok, warning
from sslkit.methods import Method, Progress
from sslkit.parts.batchnorm import has_batch_norm
from sslkit.parts.chance_loss import ChanceLoss
from sslkit.parts.memory_bank import MemoryBank
from sslkit.parts.momentum_teacher import MomentumTeacher
from sslkit.parts.queue import KeyQueue
from sslkit.text import pluralize

STEP, GRADIENT, CONTRACT, VIEWS_USED = "step", "gradient", "method contract", "views used"
FIRST_LOSS, LEAK = "first loss", "batch norm leak"

COMPARED = 4096  # elements of a tensor that are compared
UPDATES = START.total_updates


def check_training(setup: DoctorSetup) -> tuple[list[Finding], StepRecord | None]:
    """Make one step and run all checks on it; the record is None if the step fails."""
    try:
        record = setup.run_step(backward=True)
    except Exception as error:
        return [fault(STEP, f"the first training step stops with {first_line(error)}")], None
    loss = float(record.loss.detach())
    if not math.isfinite(loss):
        return [fault(STEP, f"the loss is {loss} on the first images of the run")], None
    return [
        ok(STEP, f"runs on {pluralize(setup.batch_size, 'image')} of your data, loss {loss:.4g}"),
        attempt(GRADIENT, lambda: check_gradient(setup.method, record)),
        attempt(VIEWS_USED, lambda: check_views_used(setup, record)),
        attempt(FIRST_LOSS, lambda: check_first_loss(setup, loss)),
        check_contract(setup, record),  # last: it changes the weights
    ], record


def check_gradient(method: Method, record: StepRecord) -> Finding:
    """Check that every trained module and every view's features receive a finite gradient that is not zero."""
    if not record.loss.requires_grad:
        return fault(GRADIENT, "the loss has no gradient: a tensor on the way to it is detached")
    teachers = list(method.teachers().values())
    trained = {
        name: params
        for name, module in method.named_children()
        if module not in teachers and (params := [param for param in module.parameters() if param.requires_grad])
    }
    for name in ("backbone", *method.heads):
        if name not in trained and any(True for _ in method.get_submodule(name).parameters()):
            return fault(GRADIENT, f"{name} is frozen: none of its parameters requires a gradient")
    for name, params in trained.items():
        if problem := _gradient_problem(params, may_skip=name == "backbone"):
            return fault(GRADIENT, f"{problem} {name}")
    for index, features in enumerate(record.student_features):
        if features.grad is None or not features.grad.any():
            return fault(
                GRADIENT,
                f"the student's features {index + 1} of {len(record.student_features)} receive no gradient: the "
                "objective detaches them. Features that need no gradient belong in teacher()",
            )
    unused = sum(param.grad is None for param in trained["backbone"])
    if unused:
        return warning(
            GRADIENT,
            f"{pluralize(unused, 'parameter')} of the backbone never receive a gradient. This works on 1 process; on "
            "several, DistributedDataParallel stops with an error: freeze them with requires_grad_(False)",
        )
    return ok(GRADIENT, f"reaches {', '.join(trained)} and the features of every view")


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
        return not_applicable(VIEWS_USED, "images are compared with the memory bank, not with a second view")
    exchanged = [setup.views[0], *[view.roll(1, dims=0) for view in setup.views[1:]]]
    loss, other = float(record.loss.detach()), float(setup.run_step(exchanged).loss)
    if abs(other - loss) < 1e-4 * abs(loss):
        loss = float(setup.run_step().loss)  # without a graph some kernels round differently
    if other != loss:
        return ok(VIEWS_USED, "the loss compares different views of an image")
    sentence = "the loss does not depend on the second view: the first view is compared with itself or with nothing"
    compares = method.negatives != "none" or bool(method.teachers())
    return fault(VIEWS_USED, sentence) if compares else warning(VIEWS_USED, sentence)


def check_first_loss(setup: DoctorSetup, loss: float) -> Finding:
    """Check that the first loss is not above chance.

    It is judged only if each query is compared with vectors that are random at first. If it is compared with the
    batch, the embeddings of a new network span so few directions that chance is above its formula.
    """
    chance = setup.method.chance_loss(setup.batch_size)
    if chance is None:
        return not_applicable(FIRST_LOSS, f"{loss:.4g}; the method does not declare its loss at chance")
    tolerance = first_loss_tolerance(setup.method, chance, setup.batch_size)
    if tolerance is not None and loss > chance.value + tolerance:
        return fault(
            FIRST_LOSS,
            f"{loss:.4g} is above chance ({chance.value:.4g} = {chance.formula}): the views of an image are less "
            "similar than views of different images. Check the order of the teacher's features",
        )
    return ok(FIRST_LOSS, f"{loss:.4g}; random embeddings would give {chance.value:.4g} = {chance.formula}")


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
        return not_applicable(LEAK, "no queue of negatives, or no BatchNorm in the backbone")
    leak = "a key has the same BatchNorm statistics as its query, which identify it among the keys of the queue"
    if not method.shuffle_keys:
        return fault(LEAK, f"{leak}: shuffle the keys (set method.shuffle = true)")
    if method.bn_groups == 1:
        return fault(LEAK, f"{leak}: set method.bn_groups = 8, as in the paper")
    return ok(LEAK, f"keys are shuffled between {method.bn_groups} BatchNorm groups")


def check_contract(setup: DoctorSetup, record: StepRecord) -> Finding:
    """Check what the method declares in `teachers` and `dictionaries`.

    A teacher is a copy that is not trained, does not move in a forward pass, and follows its student with the momentum
    it declares. A queue or memory bank changes after an update, not in a forward pass.
    """
    method = setup.method
    problems = [problem for name, teacher in method.teachers().items() if (problem := _copied(method, name, teacher))]
    if any(features.requires_grad for features in record.teacher_features):
        problems.append("teacher() returns features with a gradient: call the teacher's modules only")
    if problems:
        return fault(CONTRACT, "; ".join(problems))
    drawn = [
        name
        for name, teacher in method.teachers().items()
        if teacher.momentum_at(START) < 1.0 and not _equal(_weights(teacher), _weights(method.get_submodule(name)))
    ]
    try:
        problems = _problems_of_updates(setup)
    except Exception as error:
        problems = [f"the method stops between two steps: {first_line(error)}"]
    if drawn and not problems:
        return warning(
            CONTRACT,
            f"the teacher of {' and '.join(drawn)} does not start as a copy of the student, which learns to agree with "
            "other weights at first: make the MomentumTeacher after the student's weights are set",
        )
    teachers, dictionaries = ", ".join(method.teachers()) or "none", ", ".join(method.dictionaries()) or "none"
    return fault_if_any(
        CONTRACT,
        problems,
        f"teachers ({teachers}) and dictionaries ({dictionaries}) change after an update only, as declared",
    )


def _copied(method: Method, name: str, teacher: MomentumTeacher) -> str:
    """What is wrong with a teacher's parameters; empty if nothing is."""
    students = {id(param) for param in method.get_submodule(name).parameters()}
    if any(id(param) in students for param in teacher.parameters()):
        return f"the teacher of {name} is the student's own module: make a copy with MomentumTeacher"
    if any(param.requires_grad or param.grad is not None for param in teacher.parameters()):
        return f"the teacher of {name} is trained: its parameters must not require a gradient"
    return ""


def _problems_of_updates(setup: DoctorSetup) -> list[str]:
    """Change the student, make a forward pass, update, and compare the weights before and after each."""
    method = setup.method
    change_student(method)
    teachers = {name: _weights(teacher) for name, teacher in method.teachers().items()}
    rows = {name: dictionary_rows(part, setup.sample_ids) for name, part in method.dictionaries().items()}
    setup.run_step()
    for name, teacher in method.teachers().items():
        if not _equal(teachers[name], _weights(teacher)):
            return [f"the teacher of {name} moves in the forward pass: move it in after_update"]
    for name, part in method.dictionaries().items():
        if not torch.equal(rows[name], dictionary_rows(part, setup.sample_ids)):
            return [
                f"{name} changes in the forward pass, so keys can be their own negatives: keep new keys, and push them "
                "in after_update"
            ]
    problems: list[str] = []
    for updates in (1, UPDATES):
        teachers = {name: _weights(teacher) for name, teacher in method.teachers().items()}
        student = _student_weights(method)
        progress = Progress(updates, UPDATES)
        method.after_update(progress)
        if not _equal(student, _student_weights(method)):
            return ["after_update changes the student: it may move teachers only"]
        problems += [
            problem
            for name, teacher in method.teachers().items()
            if (problem := _movement(name, teachers[name], teacher, method.get_submodule(name), progress))
        ]
        if problems:
            return problems
    for name, part in method.dictionaries().items():
        changed = (dictionary_rows(part, setup.sample_ids) != rows[name]).any(dim=1)
        stands = not changed.all() if isinstance(part, MemoryBank) else not changed.any()
        if stands and method.negatives in ("queue", "bank"):
            problems.append(f"{name} does not receive the embeddings of the batch: push them in after_update")
    return problems


def _movement(name: str, before: list[Tensor], teacher: MomentumTeacher, student: nn.Module, progress: Progress) -> str:
    """What is wrong with a teacher's move, compared with the momentum it declares; empty if nothing is."""
    move = torch.cat([new - old for old, new in zip(before, _weights(teacher), strict=True)]).double()
    way = torch.cat([target - old for old, target in zip(before, _weights(student), strict=True)]).double()
    share = float(move @ way / way.square().sum().clamp_min(1e-300))
    aside = float((move - share * way).norm() / move.norm().clamp_min(1e-300))
    momentum = teacher.momentum_at(progress)
    at = f"after {progress.fraction:.0%} of the training"
    if share == 0.0:
        return f"the teacher of {name} does not move {at}; it declares momentum {momentum:g}" if momentum < 1 else ""
    if aside > 0.1:
        return f"the teacher of {name} moves, but not towards the student's {name}"
    if abs(share - (1.0 - momentum)) > 0.1 * (1.0 - momentum) + 1e-6:
        return f"the teacher of {name} moves with momentum {1.0 - share:.4g} {at}; it declares {momentum:g}"
    return ""


def change_student(method: Method) -> None:
    """Change every trained weight by about half its size: an average of two equal networks moves nothing."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for param in method.parameters():
            if param.requires_grad:
                size = param.square().mean().sqrt().clamp_min(1e-2)
                param.add_(torch.randn(param.shape, generator=generator) * size, alpha=0.5)


def dictionary_rows(part: KeyQueue | MemoryBank, sample_ids: Tensor) -> Tensor:
    """A copy of a queue's keys, or of the batch's rows of a memory bank."""
    return part.keys.clone() if isinstance(part, KeyQueue) else part.rows[sample_ids].clone()


def _student_weights(method: Method) -> list[Tensor]:
    return [_sample(param) for param in method.parameters() if param.requires_grad]


def _weights(module: nn.Module) -> list[Tensor]:
    return [_sample(param) for param in module.parameters()]


def _sample(tensor: Tensor) -> Tensor:
    """A copy of up to about `COMPARED` elements, evenly spaced."""
    flat = tensor.detach().flatten()
    return flat[:: max(len(flat) // COMPARED, 1)].clone()


def _equal(before: list[Tensor], after: list[Tensor]) -> bool:
    return len(before) == len(after) and all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
