"""Bytes and structures that nobody thought of: only `UserError` may come out of a reader. Every run draws the same."""

import gzip
import hashlib
import json
import math
import tempfile
import warnings
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from hypothesis import HealthCheck, find, given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from targets import SEEDS, STATE, TARGETS, capsule, checkpoint_of, only_user_errors, state, written
from torch import nn

from sslkit.data.order.epoch_order import epoch_order
from sslkit.data.sources.bundled import read_idx
from sslkit.engine.checkpoint.format import newest_checkpoint, read_checkpoint
from sslkit.engine.checkpoint.validation import SCALER
from sslkit.engine.resilience.guard import Guard
from sslkit.engine.state import RecoveryState
from sslkit.files.jsonl_reader import read_lines
from sslkit.hub.untrusted import check_model, read_encoder_config, tensor_shapes
from sslkit.publish.importing.checkpoint_formats import (
    CHECKPOINT_FORMATS,
    OUTSIDE,
    guess_backbone,
    match_tensors,
    vit_arguments,
)
from sslkit.publish.importing.convert import read_tensors
from sslkit.recipe.resolve import build_recipe, load_recipe
from sslkit.recipe.schema import TABLES, GuardConfig

fuzz = settings(
    derandomize=True, deadline=None, max_examples=150, database=None, suppress_health_check=list(HealthCheck)
)

leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.integers(10**17, 10**40)
trees = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)


def mutated(content: bytes) -> st.SearchStrategy[bytes]:
    """``content`` with bytes replaced, cut out or put in at a few places."""
    place = st.tuples(st.integers(0, len(content)), st.integers(0, 8), st.binary(max_size=8))

    def apply(places: list[tuple[int, int, bytes]]) -> bytes:
        changed = content
        for start, length, new in places:
            changed = changed[:start] + new + changed[start + length :]
        return changed

    return st.lists(place, min_size=1, max_size=4).map(apply)


TEXT = b"""[method]
name = "moco_v2"
queue_size = 4096
[backbone]
name = "test_vit"
args = {num_heads = 2}
[data]
path = "photos"
[views]
size = 32
mean = [0.5, 0.5, 0.5]
[train]
epochs = 3
batch_size = 64
[reference]
knn_by_epoch = {10 = 40.0}
"""


@fuzz
@given(mutated(TEXT) | st.binary(max_size=200))
def test_recipe_files(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "recipe.toml"
        file.write_bytes(content)
        only_user_errors(lambda: load_recipe(file))


keys = st.sampled_from([(table, key) for table, model in TABLES.items() for key in model.model_fields])


@fuzz
@given(st.dictionaries(keys, trees, max_size=5), st.dictionaries(st.text(max_size=8), trees, max_size=3))
def test_recipe_values(values: dict[tuple[str, str], Any], others: dict[str, Any]) -> None:
    """What passes can be written as TOML and loads back equal."""
    tables: dict[str, Any] = {"method": {"name": "simclr"}, "backbone": {"name": "test_vit"}, "data": {"path": "x"}}
    tables |= {"views": {"size": 32}, "reference": others}
    for (table, key), value in values.items():
        tables.setdefault(table, {})[key] = value

    def read() -> None:
        recipe = build_recipe(tables)
        tomli_w.dumps(recipe.as_tables())
        assert build_recipe(recipe.as_tables()).as_tables().keys() == recipe.as_tables().keys()

    only_user_errors(read)


@fuzz
@given(trees | st.fixed_dictionaries({"files": trees}), trees)
def test_manifests_and_states(manifest: Any, state: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "step-00000001"
        checkpoint.mkdir()
        (checkpoint / "manifest.json").write_text(json.dumps(manifest))
        only_user_errors(lambda: newest_checkpoint(Path(folder)))
        files = {name: save({"a": torch.ones(2)}) for name in ("model.safetensors", "optimizer.safetensors")}
        files["state.json"] = json.dumps(state).encode()
        signed(checkpoint, files)
        only_user_errors(lambda: read_checkpoint(checkpoint))


def signed(checkpoint: Path, files: dict[str, bytes]) -> None:
    entries = {}
    for name, content in files.items():
        (checkpoint / name).write_bytes(content)
        entries[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (checkpoint / "manifest.json").write_text(json.dumps({"format": 1, "files": entries}))


WEIGHTS = save({"a": torch.ones(2, 3), "b": torch.ones(4, dtype=torch.float16)}, {"format": "pt"})


@fuzz
@given(mutated(WEIGHTS) | st.binary(max_size=100))
def test_safetensors(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.safetensors"
        file.write_bytes(content)
        only_user_errors(lambda: tensor_shapes(file))
        only_user_errors(lambda: read_tensors(file))
        state = json.dumps({"step": 1, "recipe": {}, "optimizer": {}}).encode()
        signed(Path(folder), {"model.safetensors": content, "optimizer.safetensors": WEIGHTS, "state.json": state})
        only_user_errors(lambda: read_checkpoint(Path(folder)))


CONFIG = json.dumps(
    {
        "architecture": "test_vit",
        "model_args": {"img_size": 32, "num_heads": 2},
        "pretrained_cfg": {"input_size": [3, 32, 32], "mean": [0.5, 0.5, 0.5], "std": [1, 1, 1], "crop_pct": 1.0},
    }
).encode()
words = ["img_size", "patch_size", "depth", "embed_dim", "num_heads", "mlp_ratio", "drop_rate", "norm_layer"]
arguments = st.dictionaries(st.sampled_from(words), trees)


@pytest.mark.full
@fuzz
@given(mutated(CONFIG) | arguments.map(lambda args: json.dumps({**json.loads(CONFIG), "model_args": args}).encode()))
def test_encoder_configs(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_bytes(content)
        only_user_errors(lambda: check_model(read_encoder_config(Path(folder)), {"a": (10**5,)}, "here"))


tails = [
    "module.",
    "conv1.weight",
    "bn1.bias",
    "layer1.0.conv2.weight",
    "fc.weight",
    "head.weight",
    "0.weight",
    "7.1.x",
]
tails += ["patch_embed.proj.weight", "patch_embed.proj.0.weight", "pos_embed", "blocks.0.attn.qkv.weight"]
tails += [mark for layout in CHECKPOINT_FORMATS for mark in (*layout.marks, *layout.encoders)]
parts = st.sampled_from(tails + [beginning for beginnings in OUTSIDE for beginning in beginnings])
names = st.lists(parts | st.text(max_size=4), min_size=1, max_size=4).map("".join)
shapes = st.lists(st.integers(0, 2**40) | st.sampled_from([64, 384, 16, 7]), max_size=5).map(tuple)


@fuzz
@given(st.dictionaries(names, shapes, max_size=8), st.integers(0, 100))
def test_the_importers_recogniser(found: dict[str, tuple[int, ...]], num_heads: int) -> None:
    def read() -> None:
        layout, matches = match_tensors(found)
        assert [match.name for match in matches] == list(found)
        assert all(bool(match.kept_as) != bool(match.why) for match in matches)
        kept = {match.kept_as: match.shape for match in matches if match.kept_as}
        only_user_errors(lambda: guess_backbone(kept))
        vit_arguments(layout, kept, num_heads)

    only_user_errors(read)


@pytest.fixture(scope="module")
def checkpoint() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        content = {"state_dict": {"module.encoder_q.conv1.weight": torch.ones(2)}, "epoch": 3, "arch": "resnet50"}
        torch.save(content, Path(folder) / "x.pth", _use_new_zipfile_serialization=False)
        return (Path(folder) / "x.pth").read_bytes()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@fuzz
@given(data=st.data())
def test_checkpoints_of_pytorch(checkpoint: bytes, data: st.DataObject) -> None:
    content = data.draw(mutated(checkpoint))
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "x.pth").write_bytes(content)
        only_user_errors(lambda: read_tensors(Path(folder) / "x.pth"))


@fuzz
@given(st.lists(st.binary(max_size=30) | trees.map(lambda tree: json.dumps(tree).encode()), max_size=6))
def test_logs(lines: list[bytes]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "metrics.jsonl").write_bytes(b"\n".join(lines))
        only_user_errors(lambda: read_lines(Path(folder) / "metrics.jsonl"))


axes = st.integers(0, 2**32 - 1) | st.integers(0, 6)


@fuzz
@given(st.binary(min_size=4, max_size=4) | st.integers(0, 4).map(lambda count: bytes((0, 0, 8, count))),
       st.lists(axes, max_size=4), st.binary(max_size=300), st.integers(1, 4), st.integers(0, 3))  # fmt: skip
def test_idx_files(magic: bytes, shape: list[int], content: bytes, num_axes: int, cut: int) -> None:
    """What is read is what the header says, whole; everything else is refused."""
    raw = magic + b"".join(length.to_bytes(4, "big") for length in shape) + content
    packed = gzip.compress(raw, 1, mtime=0)
    found = only_user_errors(lambda: read_idx(written("x.gz", packed[: len(packed) - cut]), num_axes))
    is_one = magic == bytes((0, 0, 8, num_axes)) and len(shape) >= num_axes and not cut
    rest = raw[4 + 4 * num_axes :]
    if not is_one or math.prod(shape[:num_axes]) != len(rest) or not rest:
        assert found is None
    else:
        assert found.shape == tuple(shape[:num_axes])
        assert found.tobytes() == rest


@fuzz
@given(mutated(gzip.compress(bytes((0, 0, 8, 1, 0, 0, 0, 4)) + b"abcd", mtime=0)) | st.binary(max_size=60))
def test_idx_files_that_are_torn(content: bytes) -> None:
    found = only_user_errors(lambda: read_idx(written("x.gz", content), 1))
    assert found is None or found.size


numbers = st.integers(-3, 3) | st.floats() | st.integers(2**20, 2**70) | st.booleans()
course_keys = st.sampled_from(["skipped", "rewinds", "lr_factor", "losses", "evil"])
courses = st.dictionaries(course_keys, trees | numbers | st.lists(numbers, max_size=4), max_size=4)
scalers = st.fixed_dictionaries({}, optional=dict.fromkeys(SCALER, trees | numbers)) | st.fixed_dictionaries(
    dict.fromkeys(SCALER, numbers)
)


@fuzz
@given(trees | courses, trees | scalers, trees | st.dictionaries(st.text(max_size=5), trees, max_size=2))
def test_what_a_state_says_of_troubles_scale_and_optimizer(course: Any, scaler: Any, optimizer: Any) -> None:
    """What is let in can be gone on with."""
    for key, value in {"course": course, "scaler": scaler, "optimizer": optimizer}.items():
        said = json.dumps(STATE | {key: value}).encode()
        state(b"1" + said)
        checkpoint = only_user_errors(lambda said=said: read_checkpoint(checkpoint_of(state=said)))
        if checkpoint is not None and key == "course":
            guard = Guard(GuardConfig(policy="skip", loss_spike=2.0), RecoveryState(**course), nn.Module())
            guard.problem(1.0, 1.0)
            guard.accept(1.0)
            assert 0 < guard.recovery.lr_factor <= 1
            epoch_order(0, 2**32 - 1, 3, guard.recovery.rewinds)
        elif checkpoint is not None and key == "scaler" and scaler:
            torch.amp.GradScaler("cpu").load_state_dict(scaler)


def test_some_of_what_is_drawn_is_let_in() -> None:
    """Else the test above would show nothing."""
    for kind in (courses, scalers):
        key = "course" if kind is courses else "scaler"
        drawn = find(kind, lambda value, key=key: bool(value) and is_let_in(key, value), settings=fuzz)
        assert drawn


def is_let_in(key: str, value: Any) -> bool:
    said = json.dumps(STATE | {key: value}).encode()
    return only_user_errors(lambda: read_checkpoint(checkpoint_of(state=said))) is not None


FACTS = json.loads((SEEDS / "capsule" / "whole").read_bytes())


@fuzz
@given(st.dictionaries(st.sampled_from([*FACTS]), trees | numbers, max_size=3) | trees)
def test_capsules(change: Any) -> None:
    facts = FACTS | change if isinstance(change, dict) else change
    capsule(json.dumps(facts).encode())


@fuzz
@given(st.sampled_from([*TARGETS]), st.data())
def test_seeds_with_places_changed(name: str, data: st.DataObject) -> None:
    """As atheris does, where it is not installed."""
    seed = data.draw(st.sampled_from(sorted((SEEDS / name).iterdir())))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        TARGETS[name](data.draw(mutated(seed.read_bytes()[:2000])))
