"""Is the method wired as it must be? One step on the user's images, and the objective on embeddings of our choice."""

import math

from sslkit.data.sources.image_source import ImageSource
from sslkit.doctor.diagnosed_setup import Observation, Patient, admit
from sslkit.doctor.findings import Finding, Say, attempt, fault, first_line, not_applicable, ok, warning
from sslkit.doctor.gradient_checks import (
    FROZEN,
    GRADIENT,
    STOP,
    check_gradient,
    check_stop_gradient,
    check_teacher_frozen,
)
from sslkit.doctor.loss_levels import LEVEL, examine_objective
from sslkit.doctor.objective_probe import PAIRS
from sslkit.doctor.shuffle_checks import COMPANIONS, ORDER, check_companions, check_order
from sslkit.doctor.teacher_checks import ASKED, MOVES, START, check_asked, check_motion, check_start
from sslkit.errors import UserError
from sslkit.methods import Method
from sslkit.parts.chance_loss import ChanceLoss
from sslkit.recipe.resolve import Recipe

STEP, FIRST, SEEN = "step", "first loss", "views used"


def examine_wiring(
    recipe: Recipe, source: ImageSource, say: Say
) -> tuple[list[Finding], Patient | None, Observation | None]:
    """All checks of the method, and what they were made on."""
    patient: Patient | None = None
    try:
        patient = admit(recipe, source, say)
        seen = patient.observe(backward=True)
        loss = float(seen.loss.detach())
    except UserError:
        raise
    except Exception as error:
        what = "cannot be built" if patient is None else "stops in its first step"
        return [fault(STEP, f"the method {what}: {first_line(error)}")], None, None
    if not math.isfinite(loss):
        return [fault(STEP, f"the first loss is {loss} on the first images of the run")], None, None
    say("checking gradients, teacher, negatives and batch statistics")
    findings = [ok(STEP, f"runs on {patient.batch} of your images, loss {loss:.4g}")]
    findings += examine_passes(patient, seen)
    findings += examine_objective(patient, seen)
    return merge(findings, patient, loss), patient, seen


def examine_passes(patient: Patient, seen: Observation) -> list[Finding]:
    """The checks that look at whole passes. `check_motion` disturbs the student and so comes last."""
    start = attempt(START, lambda: check_start(patient))
    gradient = attempt(GRADIENT, lambda: check_gradient(patient, seen))
    frozen = attempt(FROZEN, lambda: check_teacher_frozen(patient))
    stop = attempt(STOP, lambda: check_stop_gradient(patient, seen))
    asked = attempt(ASKED, lambda: check_asked(patient, seen, stop))
    used = attempt(SEEN, lambda: check_views_used(patient, seen))
    order = not_applicable(ORDER, f"see {SEEN}")
    if used.verdict != "fault":
        order = attempt(ORDER, lambda: check_order(patient))
    companions = attempt(COMPANIONS, lambda: check_companions(patient, order))
    try:
        motion = check_motion(patient)
    except Exception as error:
        motion = [fault(MOVES, f"the method stops between two steps: {first_line(error)}")]
    return [gradient, stop, frozen, start, asked, *motion, used, order, companions]


def merge(findings: list[Finding], patient: Patient, loss: float) -> list[Finding]:
    """Put the first loss beside what is known of its level, and drop what was said twice."""
    pairs = next(finding for finding in findings if finding.check == PAIRS)
    level = next(finding for finding in findings if finding.check == LEVEL)
    used = next(finding for finding in findings if finding.check == SEEN)
    broken = "fault" in (pairs.verdict, level.verdict)
    if broken and used.verdict == "fault":
        findings = [finding for finding in findings if finding is not used]
    stops = [finding for finding in findings if finding.check == STOP]
    if len(stops) > 1:  # looked at from the teacher's side and from the loss's
        findings = [finding for finding in findings if finding is not stops[0]]
    first = not_applicable(FIRST, f"see {pairs.check} or {LEVEL}") if broken else check_first_loss(patient, loss)
    return [*findings, first]


def check_views_used(patient: Patient, seen: Observation) -> Finding:
    """The loss must change when the second views are exchanged between images."""
    if patient.method.negatives == "bank":
        return not_applicable(SEEN, "compared with memories, not with a second view")
    exchanged = [patient.views[0], *[view.roll(1, dims=0) for view in patient.views[1:]]]
    own, other = float(seen.loss.detach()), float(patient.observe(exchanged).loss)
    if abs(other - own) < 1e-4 * abs(own):
        own = float(patient.observe().loss)  # without a graph some kernels round otherwise
    if other != own:
        return ok(SEEN, "the loss depends on which second view belongs to which image")
    sentence = "the loss does not depend on the second view: the first is compared with itself, or with nothing"
    known = patient.method.negatives != "none" or bool(patient.method.teachers())
    return fault(SEEN, sentence) if known else warning(SEEN, sentence)


def check_first_loss(patient: Patient, loss: float) -> Finding:
    """A new encoder does not know less than nothing: its loss may not lie above chance.

    Judged where what a query is compared with is random at first. Where it is the batch itself, the embeddings of a
    new network span so few directions that chance lies anywhere above its formula.
    """
    known = patient.method.chance_loss(patient.batch)
    if known is None:
        return not_applicable(FIRST, f"{loss:.4g}; no formula for this method's chance level")
    chance, formula = known.value, known.formula
    slack = slack_of_first_loss(patient.method, known, patient.batch)
    if slack is not None and loss > chance + slack:
        return fault(
            FIRST,
            f"{loss:.4g}, above chance, {chance:.4g} = {formula}: the positives are less like their queries than "
            "random images are",
        )
    return ok(FIRST, f"{loss:.4g} on {patient.batch} images; random embeddings would have {chance:.4g} = {formula}")


def slack_of_first_loss(method: Method, chance: ChanceLoss, batch: int) -> float | None:
    """How far above chance a first loss may lie by accident; None where that is not known."""
    if method.negatives == "bank":
        return 5 * chance.standard_error(batch) + (chance.tolerance(1) if chance.is_info_nce else 0.5)
    if method.negatives == "queue":
        return chance.scale * 2 * chance.standard_error(1) + chance.tolerance(1)
    if chance.negatives is None:
        return 10 * chance.standard_error(1)  # a new network gives all images nearly one embedding
    return None
