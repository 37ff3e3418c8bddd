"""A method's heavy parts, which are compiled or sharded as wholes."""

from sslkit.methods import Method


def compile_backbones(method: Method) -> None:
    """Let ``torch.compile`` have the heavy parts, in place: modules, names and tensors stay what they are."""
    for encoder in method.backbones():
        encoder.compile()
