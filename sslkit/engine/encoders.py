"""A method's heavy parts, which are compiled or sharded as wholes."""

from torch import nn

from sslkit.methods import Method
from sslkit.parts.momentum_teacher import Teacher

BACKBONES = ("backbone", "teacher_backbone")


def compile_backbones(method: Method) -> None:
    """Let ``torch.compile`` have the heavy parts, in place: modules, names and tensors stay what they are."""
    for encoder in encoders_of(method):
        encoder.compile()


def encoders_of(method: Method) -> list[nn.Module]:
    """Its large modules: the student's encoder and, if there is a teacher, the teacher's."""
    parts = [getattr(method, name) for name in BACKBONES if hasattr(method, name)]
    return [part.module if isinstance(part, Teacher) else part for part in parts]
