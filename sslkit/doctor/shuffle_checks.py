"""Can batch statistics give the answer away? Shuffled keys must come back in order, and meet other companions.

An image's companions are those whose features change when it does: its BN group, found by trying.
"""

import torch
from torch import Tensor

from sslkit.doctor.diagnosed_setup import Patient, key_queue
from sslkit.doctor.findings import Finding, fault, not_applicable, ok
from sslkit.engine.rng import shuffle_order
from sslkit.methods.base import Features, Permutation, Views
from sslkit.parts.batch_slices import local_bn_groups
from sslkit.parts.batchnorm import has_batch_norm

ORDER, COMPANIONS = "key order", "batch norm leak"


def check_order(patient: Patient) -> Finding:
    """In eval mode no image depends on another, so a shuffled pass must equal a plain one, row by row."""
    method, recipe = patient.method, patient.recipe
    if not method.shuffle_keys:
        return not_applicable(ORDER, "this method does not shuffle keys")
    orders = [shuffle_order(recipe, step).tolist() for step in (0, 1)]
    plain = list(range(recipe.train.batch_size))
    if recipe.train.batch_size > 8 and (plain in orders or orders[0] == orders[1]):
        return fault(ORDER, "the shuffle is the same at every step, or none at all")
    method.eval()
    try:
        shuffled, straight = (keys(patient, patient.views, order) for order in (patient.permutation, None))
    finally:
        method.train()
    if any(far_rows(a, b).any() for a, b in zip(shuffled, straight, strict=True)):
        return fault(ORDER, "shuffled keys do not come back in their order: a query is paired with another image's key")
    return ok(ORDER, "shuffled keys come back in their order")


def check_companions(patient: Patient, order: Finding) -> Finding:
    """An image's key must be computed among other companions than its query."""
    method = patient.method
    queue = key_queue(method)
    if not has_batch_norm(method.backbone) or not (method.shuffle_keys or queue is not None):
        reason = "no shuffled keys and no queue" if has_batch_norm(method.backbone) else "the backbone has no BatchNorm"
        return not_applicable(COMPANIONS, reason)
    if order.verdict == "fault":
        return not_applicable(COMPANIONS, f"see {ORDER}")
    if queue is None and method.bn_groups == 1:
        return ok(COMPANIONS, "one BN group: positive and negatives share its statistics")
    changed = [view.clone() for view in patient.views]
    for view in changed:
        view[0] = 255 - view[0]
    before, after = (queries(patient, views) for views in (patient.views, changed))
    query_side = far_rows(before[0], after[0])
    before, after = (keys(patient, views, patient.permutation) for views in (patient.views, changed))
    key_side = far_rows(before[0], after[0])
    query_side[0] = key_side[0] = False
    fewest = min(int(query_side.sum()), int(key_side.sum()))
    shared = int((query_side & key_side).sum())
    groups = f"{method.bn_groups} BN group" + ("s" if method.bn_groups > 1 else "")
    if fewest and shared == fewest:
        cure = "keys must be shuffled across groups" if method.bn_groups > 1 else "[method] bn_groups must be 2 or more"
        return fault(
            COMPANIONS,
            f"an image's key is computed among the same {shared} images as its query ({groups}): their batch "
            f"statistics tell the positive from the queue's keys without looking at the image; {cure}",
        )
    if not fewest:
        return ok(COMPANIONS, f"{groups}; queries or keys do not depend on their batch at all")
    return ok(COMPANIONS, f"{groups}; a key shares {shared} of its query's {fewest} companions")


@torch.no_grad()
def queries(patient: Patient, views: Views) -> Features:
    """The student's features, as `Method.forward` computes them."""
    method = patient.method
    torch.manual_seed(patient.recipe.train.seed)
    return method.student_in_slices(views, local_bn_groups(method.bn_groups), patient.permutation, patient.prepare)


@torch.no_grad()
def keys(patient: Patient, views: Views, order: Permutation | None) -> Features:
    """The features that are keys: the teacher's, or the student's own where it makes them."""
    method = patient.method
    groups = local_bn_groups(method.bn_groups)
    torch.manual_seed(patient.recipe.train.seed)
    if method.teacher_views:
        return method.teacher_in_slices(views, groups, order, patient.prepare)
    features = method.student_in_slices(views, groups, order, patient.prepare)
    return [features[index] for index in method.student_key_views] or features


def far_rows(one: Tensor, other: Tensor) -> Tensor:
    """(B,) bool: the rows that differ by more than rounding."""
    return (one - other).abs().amax(dim=1) > 1e-4 * one.abs().max().clamp_min(1e-12)
