"""What a plan needs to know of the backbone's layers, without its weights."""

import json
from functools import lru_cache
from typing import NamedTuple

from sslkit.hub.meta_build import UNBOUNDED, build_on_meta
from sslkit.parts.backbone import patch_size
from sslkit.parts.batchnorm import has_batch_norm
from sslkit.plan.draft import Draft


class BackboneFacts(NamedTuple):
    """Properties of a backbone's layers."""

    patch: int = 1  # side of the patches of a ViT, in pixels; 1: the model takes any size
    batch_norm: bool = True  # it has BatchNorm layers


def look_at_backbone(draft: Draft) -> BackboneFacts:
    """Build the backbone of a draft on the meta device; of one that timm cannot build, training says more."""
    return _look_at(draft.get("backbone.name"), json.dumps(draft.get("backbone.args", {}), default=str))


@lru_cache(maxsize=8)
def _look_at(name: str, args: str) -> BackboneFacts:
    try:
        model = build_on_meta(name, {"num_classes": 0, **json.loads(args)}, UNBOUNDED)
    except Exception:  # models raise any exception on wrong arguments
        return BackboneFacts()
    return BackboneFacts(patch_size(model), has_batch_norm(model))
