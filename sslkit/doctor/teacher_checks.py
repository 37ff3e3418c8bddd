"""Does the teacher start as the student, is it asked, and does it move when and how it should?"""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sslkit.doctor.diagnosed_setup import (
    Observation,
    Patient,
    counterpart,
    dictionary_rows,
    is_the_student,
    key_queue,
    teachers,
)
from sslkit.doctor.findings import Finding, fault, judge, not_applicable, ok, warning
from sslkit.methods import Method, Progress
from sslkit.parts.memory_bank import MemoryBank

START, ASKED, STILL, MOVES, FED = "teacher start", "teacher asked", "teacher still", "teacher moves", "dictionary fed"

SAMPLE = 4096  # elements of a tensor that are compared; an average moves them all
TOTAL_UPDATES = 100_000  # of a long run, at whose start momentum is what the recipe says


def check_start(patient: Patient) -> Finding:
    """A teacher starts as a copy of its student."""
    found = {name: counterpart(patient.method, name) for name in teachers(patient.method)}
    pairs = {name: student for name, student in found.items() if student is not None}
    if not pairs:
        return not_applicable(START, "no teacher whose student is known by name")
    other = [
        name
        for name, student in pairs.items()
        if not _equal(_weights(teachers(patient.method)[name]), _weights(student))
    ]
    if other:
        return warning(
            START,
            f"{', '.join(other)} does not start as a copy of the student: for as long as momentum remembers, the "
            "student learns to agree with random weights",
        )
    return ok(START, "a copy of the student")


def check_asked(patient: Patient, seen: Observation, stop_gradient: Finding) -> Finding:
    """Every module of the teacher is used."""
    found = teachers(patient.method)
    if not found or stop_gradient.verdict == "fault":
        return not_applicable(ASKED, "no teacher" if not found else f"see {stop_gradient.check}")
    idle = [name for name, part in found.items() if name not in seen.asked and any(True for _ in part.parameters())]
    if idle:
        return fault(ASKED, "; ".join(f"{name} is never called: something else makes the keys" for name in idle))
    asleep = [name for name, part in found.items() if any(_uses_running_statistics(each) for each in part.modules())]
    if asleep:
        return warning(
            ASKED,
            f"{', '.join(asleep)} computes in eval mode, with running statistics that nothing updates; the papers' "
            "teachers stay in training mode and use the batch's",
        )
    return ok(ASKED, "each of its modules is called")


def _uses_running_statistics(layer: nn.Module) -> bool:
    return isinstance(layer, _BatchNorm) and not layer.training


def check_motion(patient: Patient) -> list[Finding]:
    """Move the student by hand, look, update, and look again.

    The order counts: an average of two equal networks moves nothing, so the student must differ first.
    """
    method, found = patient.method, teachers(patient.method)
    disturb_student(method)
    before = {name: _weights(part) for name, part in found.items()}
    seen = patient.observe()
    restless = [name for name, part in found.items() if not _equal(before[name], _weights(part))]
    before = {name: _weights(part) for name, part in found.items()}
    statistics = {name: _statistics(part) for name, part in found.items()}
    student = _student_weights(method)
    rows = {name: dictionary_rows(part, patient.sample_ids) for name, part in method.dictionaries().items()}
    queue = key_queue(method)
    pointer = int(queue.pointer) if queue is not None else 0
    logged = method.after_update(Progress(1, TOTAL_UPDATES))
    fed = check_fed(patient, seen, rows, pointer)
    findings = [
        judge(STILL, [f"{name} moves during a forward pass; only after_update may move it" for name in restless],
              "unmoved by forward and backward passes") if found else not_applicable(STILL, "no teacher"),
    ]  # fmt: skip
    if restless or not found:
        findings.append(not_applicable(MOVES, f"see {STILL}" if restless else "no teacher"))
    elif not _equal(student, _student_weights(method)):
        findings.append(fault(MOVES, "after_update moves the student; it is the teacher that follows"))
    else:
        moves = judge_movement(method, before, statistics, _asked_momentum(method, logged))
        last = method.after_update(Progress(TOTAL_UPDATES, TOTAL_UPDATES))
        if moves.verdict == "ok" and last.get("momentum", 1.0) < logged.get("momentum", 1.0):
            moves = fault(
                MOVES, f"momentum falls during training, to {last['momentum']:.4g}; it must stay or rise to 1"
            )
        findings.append(moves)
    return [*findings, fed]


def disturb_student(method: Method) -> None:
    """Change every trained weight by about half its size, so that teacher and student can be told apart."""
    generator = torch.Generator().manual_seed(0)
    own = {id(param) for part in teachers(method).values() for param in part.parameters()}
    with torch.no_grad():
        for param in method.parameters():
            if param.requires_grad and id(param) not in own:
                size = param.square().mean().sqrt().clamp_min(1e-2)
                param.add_(torch.randn(param.shape, generator=generator) * size, alpha=0.5)


def judge_movement(
    method: Method, before: dict[str, list[Tensor]], statistics: dict[str, list[Tensor]], momentum: float | None
) -> Finding:
    """Compare how far each teacher module went with how far its momentum would take it."""
    complaints, averaged, resting, measured = [], [], [], []
    for name, part in teachers(method).items():
        student = counterpart(method, name)
        if student is None or not before[name] or is_the_student(method, name):
            continue
        share, astray = _movement(before[name], _weights(part), _weights(student))
        complaint = _complain_of_movement(name, share, astray, momentum)
        measured.append(1.0 - share)
        complaints += [complaint] if complaint else []
        resting += [name] if share == 0.0 and momentum is None else []
        averaged += [] if _equal(statistics[name], _statistics(part)) else [name]
    if complaints:
        return fault(MOVES, "; ".join(complaints))
    if not measured:
        return not_applicable(MOVES, "no teacher whose student is known by name")
    if resting:
        return warning(MOVES, f"{', '.join(resting)} does not move after an update; right only if it is meant to stay")
    if averaged:
        return warning(
            MOVES,
            f"the running statistics of {', '.join(averaged)} are averaged too; the papers' teachers collect their own",
        )
    return ok(MOVES, f"after an update, towards the student, with momentum {measured[0]:.4g}")


def _complain_of_movement(name: str, share: float, astray: float, momentum: float | None) -> str | None:
    """What is wrong with a module that went this share of its way, and this far beside it."""
    if share == 0.0:
        return f"{name} does not move after an update" if momentum not in (None, 1.0) else None
    if astray > 0.1:
        return f"{name} moves, but not towards the student's {name.removeprefix('teacher_')}"
    if momentum is not None and abs(share - (1.0 - momentum)) > 0.1 * (1.0 - momentum) + 1e-6:
        return f"{name} moves with momentum {1.0 - share:.4g}; the recipe says {momentum:g}"
    return None


def check_fed(patient: Patient, seen: Observation, rows: dict[str, Tensor], pointer: int) -> Finding:
    """After an update the queue holds this step's keys, and the bank this batch's rows are new."""
    method = patient.method
    if seen.written:
        return not_applicable(FED, "see positive")
    queue = key_queue(method)
    if queue is not None:
        fresh = queue.keys[(queue.keys != rows["queue"]).any(dim=1)]
        if not len(fresh):
            return fault(FED, "no key enters the queue after an update: the negatives stay random for ever")
        if seen.embeddings:
            keys = nn.functional.normalize(torch.cat(seen.embeddings).float(), dim=1)
            if float((fresh @ keys.T).amax(dim=1).min()) < 0.999:
                return fault(FED, "what enters the queue is not what the teacher's head returned for this batch")
        if len(fresh) < len(queue.keys) and int(queue.pointer) != (pointer + len(fresh)) % len(queue.keys):
            return fault(FED, "the queue's pointer does not move by the keys pushed: they overwrite the same rows")
        return ok(FED, f"{len(fresh)} keys of this batch entered the queue after the update")
    banks = [name for name, part in method.dictionaries().items() if isinstance(part, MemoryBank)]
    for name in banks:
        moved = (dictionary_rows(method.dictionaries()[name], patient.sample_ids) != rows[name]).any(dim=1)
        if not moved.all():
            return fault(FED, f"the memories of {int((~moved).sum())} of the batch's images do not change in {name}")
    return ok(FED, "the batch's memories moved after the update") if banks else not_applicable(FED, "no dictionary")


def _movement(old: list[Tensor], new: list[Tensor], student: list[Tensor]) -> tuple[float, float]:
    """Share of the way to the student that was gone, and the size of what is beside that way."""
    step = torch.cat([b - a for a, b in zip(old, new, strict=True)]).double()
    way = torch.cat([s - a for a, s in zip(old, student, strict=True)]).double()
    share = float(step @ way / way.square().sum().clamp_min(1e-300))
    beside = float((step - share * way).norm() / step.norm().clamp_min(1e-300))
    return share, beside


def _asked_momentum(method: Method, logged: dict[str, float]) -> float | None:
    """The momentum that the options ask for at the start of training; else what after_update says it was."""
    momenta = [teacher.momentum_at(Progress(0, TOTAL_UPDATES)) for teacher in method.teachers().values()]
    return momenta[0] if momenta else logged.get("momentum")


def _weights(part: nn.Module) -> list[Tensor]:
    return [_sample(param) for param in part.parameters()]


def _student_weights(method: Method) -> list[Tensor]:
    own = {id(param) for part in teachers(method).values() for param in part.parameters()}
    return [_sample(param) for param in method.parameters() if id(param) not in own]


def _statistics(part: nn.Module) -> list[Tensor]:
    return [_sample(buffer) for buffer in part.buffers()]


def _sample(tensor: Tensor) -> Tensor:
    """Up to `SAMPLE` elements, evenly spaced, copied."""
    flat = tensor.detach().flatten()
    return flat[:: max(len(flat) // SAMPLE, 1)].clone()


def _equal(before: list[Tensor], after: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
