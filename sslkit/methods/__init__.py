"""The catalogue of methods, one file a paper. Read `base` first, which is what every method declares and computes."""

from importlib.metadata import entry_points

from sslkit.errors import UserError, near_miss
from sslkit.methods.base import BatchInfo, Features, Method, Multipliers, Step, Views
from sslkit.methods.byol import BYOL
from sslkit.methods.end_to_end import EndToEnd
from sslkit.methods.instdisc import InstDisc
from sslkit.methods.memory_bank_mechanism import MemoryBankMechanism
from sslkit.methods.method_options import MethodOptions, MomentumOptions
from sslkit.methods.moco_v1 import MoCoV1
from sslkit.methods.moco_v2 import MoCoV2
from sslkit.methods.moco_v3 import MoCoV3
from sslkit.methods.simclr import SimCLR
from sslkit.methods.swav import SwAV
from sslkit.parts.backbone import Family
from sslkit.parts.schedules import Progress

METHODS: dict[str, type[Method]] = {
    "moco_v1": MoCoV1,
    "moco_v2": MoCoV2,
    "moco_v3": MoCoV3,
    "simclr": SimCLR,
    "byol": BYOL,
    "swav": SwAV,
    "instdisc": InstDisc,
    "end_to_end": EndToEnd,
    "memory_bank": MemoryBankMechanism,
}

__all__ = [
    "METHODS",
    "BatchInfo",
    "Family",
    "Features",
    "Method",
    "MethodOptions",
    "MomentumOptions",
    "Multipliers",
    "Progress",
    "Step",
    "Views",
    "all_methods",
    "find_method",
]


def all_methods() -> dict[str, type[Method]]:
    """`METHODS`, and the methods of installed packages that have an entry point in the group ``sslkit.methods``.

    Raises:
        UserError: Two methods have the same name.
    """
    found = dict(METHODS)
    for entry in entry_points(group="sslkit.methods"):
        if entry.name in found:
            raise UserError(
                f"entry point sslkit.methods: {entry.value} has the name {entry.name!r}, which is taken; choose another"
            )
        found[entry.name] = entry.load()
    return found


def canonical_name(name: str) -> str:
    """A method's name as `all_methods` spells it: ``mocov3`` and ``MoCo-v3`` are ``moco_v3``.

    Raises:
        UserError: There is no such method.
    """
    known = all_methods()
    matches = [each for each in known if each.replace("_", "") == name.lower().replace("_", "").replace("-", "")]
    if not matches:
        hint = near_miss(name.lower().replace(" ", "_"), known)
        raise UserError(f"[method] name: unknown method {name!r}{hint}; there are {', '.join(sorted(known))}")
    return matches[0]


def find_method(name: str) -> type[Method]:
    """The class of a method by name, as `canonical_name` understands it."""
    return all_methods()[canonical_name(name)]
