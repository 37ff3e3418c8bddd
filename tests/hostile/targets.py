"""The fuzzed functions. They take bytes, and may raise `UserError` and no other exception.

For some, the first byte selects the form of the rest.
"""

import gzip
import hashlib
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tomli_w
import torch
from checkpoints import instructed
from safetensors.torch import save
from tampering import resign
from torch import nn

from sslkit.data.sources.bundled import read_idx
from sslkit.engine.checkpoint.format import Checkpoint, newest_checkpoint, read_checkpoint, restore
from sslkit.engine.resilience.crash_dump import read_crash_dump
from sslkit.errors import UserError
from sslkit.hub.untrusted import tensor_shapes
from sslkit.publish.importing.checkpoint_formats import guess_backbone, match_tensors, vit_arguments
from sslkit.publish.importing.convert import read_tensors
from sslkit.recipe.resolve import build_recipe, load_recipe

SEEDS = Path(__file__).parent / "seeds"
WEIGHTS = save({"weight": torch.zeros(2, 3), "bias": torch.zeros(2)})
STATE = {"step": 1, "recipe": {}, "optimizer": {}, "scaler": {}, "course": {}}
MEMORY = "/dev/shm"  # opening files elsewhere takes most of the time
FOLDER = tempfile.TemporaryDirectory(prefix="sslkit-fuzz-", dir=MEMORY if Path(MEMORY).is_dir() else None)


def only_user_errors(read: Callable[[], Any]) -> Any:
    """What ``read`` returns, or None if it raises a UserError, whose message must be short."""
    try:
        return read()
    except UserError as error:
        sentence = str(error)
    assert 0 < len(sentence) < 20_000
    return None


def written(name: str, content: bytes) -> Path:
    file = Path(FOLDER.name) / name
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(content)
    return file


def checkpoint_of(**files: bytes) -> Path:
    """A checkpoint folder with matching checksums."""
    whole = {"model": WEIGHTS, "optimizer": save({}), "state": json.dumps(STATE).encode(), **files}
    for name, content in whole.items():
        file = written(f"step-00000001/{name}.{'json' if name == 'state' else 'safetensors'}", content)
    resign(file.parent)
    return file.parent


def recipe(content: bytes) -> None:
    """A recipe file; a valid one can be written and read again."""
    found = only_user_errors(lambda: load_recipe(written("recipe.toml", content)))
    if found is not None:
        tables = found.as_tables()
        tomli_w.dumps(tables)
        assert build_recipe(tables).as_tables() == tables


def state(content: bytes) -> None:
    """The manifest of a checkpoint, or (first byte odd) its state with a matching manifest."""
    if content[:1] and content[0] % 2:
        folder = checkpoint_of(state=content[1:])
    else:
        folder = checkpoint_of()
        (folder / "manifest.json").write_bytes(content[1:])
    only_user_errors(lambda: read_checkpoint(folder))
    only_user_errors(lambda: newest_checkpoint(folder.parent))


def weights(content: bytes) -> None:
    """A safetensors file: of an encoder, to import, and as weights and optimizer of a checkpoint."""
    file = written("x.safetensors", content)
    only_user_errors(lambda: tensor_shapes(file))
    only_user_errors(lambda: read_tensors(file))
    for name in ("model", "optimizer"):
        found: Checkpoint | None = only_user_errors(lambda name=name: read_checkpoint(checkpoint_of(**{name: content})))
        if found is not None:
            only_user_errors(lambda found=found: go_on(found))


def go_on(checkpoint: Checkpoint) -> None:
    """Train one step from a checkpoint that was accepted."""
    layer = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(layer.parameters())
    restore(checkpoint, layer, optimizer)
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()


def idx(content: bytes) -> None:
    """An IDX file, compressed here (first byte odd) or unchanged."""
    axes = 3 if content[:1] and content[0] & 2 else 1
    packed = gzip.compress(content[1:], 0) if content[:1] and content[0] % 2 else content[1:]
    found = only_user_errors(lambda: read_idx(written("x.gz", packed), axes))
    assert found is None or (found.ndim == axes and found.size)


def importer(content: bytes) -> None:
    """A PyTorch checkpoint, or (first byte odd) the pickle opcodes of one."""
    whole = instructed(content[1:]) if content[:1] and content[0] % 2 else content[1:]
    found = only_user_errors(lambda: read_tensors(written("x.pth", whole)))
    if found is not None:
        only_user_errors(lambda: recognised(found))


def recognised(tensors: dict[str, torch.Tensor]) -> None:
    layout, matches = match_tensors({name: tuple(tensor.shape) for name, tensor in tensors.items()})
    assert [match.name for match in matches] == list(tensors)
    kept = {match.kept_as: match.shape for match in matches if match.kept_as}
    only_user_errors(lambda: guess_backbone(kept))
    vit_arguments(layout, kept, 0)


def capsule(content: bytes) -> None:
    """The JSON file of a crash dump; a checksum of ``0`` is replaced by the right one."""
    weights = written("capsule/model.safetensors", WEIGHTS)
    right = content.replace(b'"sha256": 0', f'"sha256": "{hashlib.sha256(WEIGHTS).hexdigest()}"'.encode())
    written("capsule/capsule.json", right)
    only_user_errors(lambda: read_crash_dump(weights.parent))


TARGETS: dict[str, Callable[[bytes], None]] = {
    each.__name__: each for each in (recipe, state, weights, idx, importer, capsule)
}
