"""Does the gradient reach all that learns, and nothing else?"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from sslkit.doctor.diagnosed_setup import START, Observation, Patient, children, is_the_student, teachers
from sslkit.doctor.findings import Finding, fault, judge, not_applicable, ok, warning
from sslkit.engine.optim import make_optimizer
from sslkit.methods import BatchInfo, Method

GRADIENT, FROZEN, STOP = "gradient", "teacher frozen", "stop-gradient"


def check_gradient(patient: Patient, seen: Observation) -> Finding:
    """Every trained part and every view's features must receive a finite gradient that is not all zero."""
    if not seen.loss.requires_grad:
        return fault(GRADIENT, "the loss carries no gradient at all: something on the way to it is detached")
    complaints, reached, idle = [], [], 0
    for name, part in children(patient.method).items():
        if part in teachers(patient.method).values():
            continue
        complaint, without = _look_at_part(name, part, learns=name in ("backbone", *patient.method.heads))
        complaints += [complaint] if complaint else []
        reached += [name] if complaint == "" else []
        idle += without
    if complaints:
        return fault(GRADIENT, "; ".join(complaints))
    for view, features in enumerate(seen.student):
        if features.grad is None or not features.grad.any():
            return fault(
                GRADIENT,
                f"the student's features {view + 1} of {len(seen.student)} receive no gradient: they are detached in "
                "the objective (features that need none belong into teacher())",
            )
    if idle:
        return warning(
            GRADIENT,
            f"{idle} tensors of the backbone never receive gradient: an unused branch. One process does not mind; "
            "several would stop with an error of DistributedDataParallel",
        )
    return ok(GRADIENT, f"reaches {', '.join(reached)} and the features of every view")


def _look_at_part(name: str, part: nn.Module, *, learns: bool) -> tuple[str | None, int]:
    """A complaint (empty: none; None: nothing there to learn) and the number of idle tensors of a backbone."""
    trained = {key: param for key, param in part.named_parameters() if param.requires_grad}
    if not trained:
        frozen = learns and any(True for _ in part.parameters())
        return (f"{name} is frozen: none of its parameters takes gradient" if frozen else None), 0
    without = [key for key, param in trained.items() if param.grad is None]
    if not any(_has_gradient(param) for param in trained.values()):
        return f"no gradient reaches {name}: it would never learn", 0
    if without and name != "backbone":
        return f"no gradient reaches {', '.join(without)} of {name}", 0
    if not all(torch.isfinite(param.grad).all() for param in trained.values() if param.grad is not None):
        return f"the gradient of {name} is not finite", 0
    return "", len(without)


def _has_gradient(param: nn.Parameter) -> bool:
    return param.grad is not None and bool(param.grad.any())


def check_teacher_frozen(patient: Patient) -> Finding:
    """No tensor of a teacher may take gradient or be the optimizer's."""
    found = teachers(patient.method)
    if not found:
        return not_applicable(FROZEN, "no teacher")
    held = {
        id(param) for group in make_optimizer(patient.recipe, patient.method).param_groups for param in group["params"]
    }
    complaints = []
    for name, part in found.items():
        if is_the_student(patient.method, name):
            complaints.append(
                f"{name} is the student's own {name.removeprefix('teacher_')}, not a copy: use MomentumTeacher"
            )
        elif any(param.requires_grad for param in part.parameters()):
            complaints.append(f"{name} has parameters with requires_grad: use MomentumTeacher")
        elif any(param.grad is not None for param in part.parameters()):
            complaints.append(f"{name} has received gradient")
        elif any(id(param) in held for param in part.parameters()):
            complaints.append(f"{name} is moved by the optimizer")
    return judge(FROZEN, complaints, "no tensor of the teacher takes gradient or is in the optimizer")


def check_stop_gradient(patient: Patient, seen: Observation) -> Finding:
    """With a teacher: nothing trained may learn through the teacher's features."""
    method, found = patient.method, teachers(patient.method)
    if not seen.teacher:
        return not_applicable(STOP, "no teacher, and no predictor or prototypes beside which a gradient stops")
    if any(param.requires_grad for part in found.values() for param in part.parameters()):
        return not_applicable(STOP, f"see {FROZEN}")
    if any(features.requires_grad for features in seen.teacher):
        return fault(
            STOP,
            "the teacher's features carry gradient into the student: teacher() must use the teacher's modules only, "
            "and the keys be detached",
        )
    leaks = leaking_modules(method, seen, patient.info)
    return judge(
        STOP,
        [f"{name} learns through the teacher's features too: they pass it with gradient" for name in leaks],
        "no gradient passes through the teacher's features",
    )


def leaking_modules(method: Method, seen: Observation, info: BatchInfo) -> list[str]:
    """Trained children that the loss's gradient reaches from the teacher's features."""
    passed: list[tuple[str, Tensor]] = []

    def watch(name: str, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if any(isinstance(each, Tensor) and each.requires_grad for each in inputs) and output.requires_grad:
            passed.append((name, output))

    trained = {
        name: child
        for name, child in method.named_children()
        if child not in teachers(method).values() and any(param.requires_grad for param in child.parameters())
    }
    hooks = [
        child.register_forward_hook(lambda _module, inputs, output, name=name: watch(name, inputs, output))
        for name, child in trained.items()
    ]
    student = [features.detach() for features in seen.student]
    teacher = [features.detach().clone().requires_grad_() for features in seen.teacher]
    try:
        with only_inputs_learn(method):
            loss = method.objective(student, teacher, info, START).loss
    finally:
        for hook in hooks:
            hook.remove()
    if not loss.requires_grad or not passed:
        return []
    grads = torch.autograd.grad(loss, [output for _, output in passed], allow_unused=True)
    leaks = [name for (name, _), grad in zip(passed, grads, strict=True) if grad is not None and grad.any()]
    return list(dict.fromkeys(leaks))


@contextmanager
def only_inputs_learn(method: Method) -> Iterator[None]:
    """Take the gradient off every parameter for a while."""
    trained = [param for param in method.parameters() if param.requires_grad]
    for param in trained:
        param.requires_grad_(False)
    try:
        yield
    finally:
        for param in trained:
            param.requires_grad_(True)
