"""What is fuzzed: functions of bytes, which may refuse them with a `UserError` and must let nothing else out.

Their first byte, where they say so, chooses between forms of the rest.
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
from strangers import resign
from torch import nn

from sslkit.data.formats.idx import read_idx
from sslkit.engine.checkpoint.format import Checkpoint, newest_checkpoint, read_checkpoint, restore
from sslkit.engine.resilience.crash_dump import read_capsule
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
    """What ``read`` returns; None where it refuses, in a sentence of bounded length."""
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
    """A folder whose sums agree."""
    whole = {"model": WEIGHTS, "optimizer": save({}), "state": json.dumps(STATE).encode(), **files}
    for name, content in whole.items():
        file = written(f"step-00000001/{name}.{'json' if name == 'state' else 'safetensors'}", content)
    resign(file.parent)
    return file.parent


def recipe(content: bytes) -> None:
    """A recipe's file: what passes can be written and read again."""
    found = only_user_errors(lambda: load_recipe(written("recipe.toml", content)))
    if found is not None:
        tables = found.as_tables()
        tomli_w.dumps(tables)
        assert build_recipe(tables).as_tables() == tables


def state(content: bytes) -> None:
    """A checkpoint's manifest, or (first byte odd) its state beside a manifest that agrees."""
    if content[:1] and content[0] % 2:
        folder = checkpoint_of(state=content[1:])
    else:
        folder = checkpoint_of()
        (folder / "manifest.json").write_bytes(content[1:])
    only_user_errors(lambda: read_checkpoint(folder))
    only_user_errors(lambda: newest_checkpoint(folder.parent))


def weights(content: bytes) -> None:
    """A safetensors file: an encoder's, one to import, a checkpoint's weights, and its optimizer, which is put in."""
    file = written("x.safetensors", content)
    only_user_errors(lambda: tensor_shapes(file))
    only_user_errors(lambda: read_tensors(file))
    for name in ("model", "optimizer"):
        found: Checkpoint | None = only_user_errors(lambda name=name: read_checkpoint(checkpoint_of(**{name: content})))
        if found is not None:
            only_user_errors(lambda found=found: go_on(found))


def go_on(checkpoint: Checkpoint) -> None:
    """Make a step from a checkpoint of one layer: what was let in must also work."""
    layer = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(layer.parameters())
    restore(checkpoint, layer, optimizer)
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()


def idx(content: bytes) -> None:
    """An IDX file, packed here (first byte odd) or as it is."""
    axes = 3 if content[:1] and content[0] & 2 else 1
    packed = gzip.compress(content[1:], 0) if content[:1] and content[0] % 2 else content[1:]
    found = only_user_errors(lambda: read_idx(written("x.gz", packed), axes))
    assert found is None or (found.ndim == axes and found.size)


def importer(content: bytes) -> None:
    """A checkpoint of PyTorch as it is, or (first byte odd) the instructions in one."""
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
    """What a capsule says beside its weights; a sum of ``0`` is put right."""
    weights = written("capsule/model.safetensors", WEIGHTS)
    right = content.replace(b'"sha256": 0', f'"sha256": "{hashlib.sha256(WEIGHTS).hexdigest()}"'.encode())
    written("capsule/capsule.json", right)
    only_user_errors(lambda: read_capsule(weights.parent))


TARGETS: dict[str, Callable[[bytes], None]] = {
    each.__name__: each for each in (recipe, state, weights, idx, importer, capsule)
}
