"""Malicious files: no code runs, nothing is written elsewhere, and one sentence gives the reason."""

import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import cli_error, small_recipe
from safetensors.torch import load_file, save_file
from tampering import resign, rewrite

import sslkit
from sslkit.cli import main
from sslkit.engine.checkpoint.format import newest_checkpoint, read_checkpoint
from sslkit.engine.logging.logger import append_result
from sslkit.engine.resilience.crash_dump import read_crash_dump
from sslkit.errors import UserError
from sslkit.evaluate import load_encoder
from sslkit.files.jsonl_reader import number
from sslkit.publish import import_checkpoint

VIT = {"img_size": 32, "args": {"num_heads": 2}}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a checkpoint and an encoder."""
    folder = tmp_path_factory.mktemp("good") / "run"
    recipe = small_recipe("moco_v3", "test_vit", train={"max_steps": 2}, backbone={"name": "test_vit", **VIT})
    sslkit.train(recipe, folder)
    return folder


@pytest.fixture
def run(good: Path, tmp_path: Path) -> Path:
    shutil.copytree(good, tmp_path / "run")
    return tmp_path / "run"


def lying(header: dict[str, Any] | bytes, length: int | None = None, body: bytes = b"") -> bytes:
    """A safetensors file with this header; the header length may be wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


LIES = {
    "empty": b"",
    "header of 2**63 bytes": lying(b"{}", 2**63),
    "header of 90 MB, absent": lying(b"{}", 90_000_000),
    "offsets beyond the end": lying({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}, body=b"\0" * 4),
    "offsets that overlap": lying(
        {name: {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]} for name in "ab"}, body=b"\0" * 4
    ),
    "shape larger than its bytes": lying(
        {"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 4]}}, body=b"\0" * 4
    ),
    "shape that overflows": lying(
        {"a": {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 4]}}, body=b"\0" * 4
    ),
    "deep JSON": lying(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
}


@pytest.mark.parametrize("lie", LIES)
def test_safetensors_that_lie(run: Path, lie: str, tmp_path: Path) -> None:
    """As an encoder, in a checkpoint with a matching manifest, in a crash dump, and as input of import."""
    checkpoint = run / "checkpoints" / "step-00000002"
    for file in (run / "encoder" / "model.safetensors", checkpoint / "model.safetensors", tmp_path / "x.safetensors"):
        file.write_bytes(LIES[lie])
    resign(checkpoint)
    with pytest.raises(UserError, match="safetensors"):
        load_encoder(str(run))
    with pytest.raises(UserError, match="not a valid checkpoint file"):
        read_checkpoint(checkpoint)
    with pytest.raises(UserError, match="not a complete safetensors file"):
        import_checkpoint(tmp_path / "x.safetensors", tmp_path / "out")
    assert not (tmp_path / "out").exists()


DEEP = "[" * 200_000
CONFIGS: dict[str, Any] = {
    "a path": {"architecture": "../../etc/passwd"},
    "another folder": {"architecture": "local-dir:/tmp"},
    "somebody's repository": {"architecture": "hf_hub:evil/model"},
    "a word that is none": {"architecture": 7},
    "pretrained": {"model_args": {"pretrained": True}},
    "a checkpoint elsewhere": {"model_args": {"checkpoint_path": "/etc/passwd"}},
    "an address": {"model_args": {"pretrained_cfg_overlay": {"url": "http://127.0.0.1:9/x.pth"}}},
    "a cache": {"model_args": {"cache_dir": "/root"}},
    "a billion blocks": {"model_args": {"depth": 10**9}},
    "too many blocks": {"model_args": {"depth": 90_000}},
    "too wide": {"model_args": {"embed_dim": 64_000}},
    "too large a picture": {"model_args": {"img_size": 99_968}},
    "not a number": {"model_args": {"drop_rate": float("nan")}},
    "half a block": {"model_args": {"depth": 1.5}},
    "no heads": {"model_args": {"num_heads": 0}},
    "a long word": {"model_args": {"norm_layer": "x" * 10_000}},
    "arguments that are none": {"model_args": [1, 2]},
    "an unknown argument": {"model_args": {"__class__": "os.system"}},
    "deep arguments": {"model_args": {"img_size": [[[[[[32]]]]]]}},
    "no preprocessing": {"pretrained_cfg": None},
    "an input of a million pixels": {"pretrained_cfg": {"input_size": [3, 10**6, 10**6]}},
    "an input of words": {"pretrained_cfg": {"input_size": "large"}},
    "a deviation of nought": {"pretrained_cfg": {"std": [0, 0, 0]}},
    "a mean of words": {"pretrained_cfg": {"mean": ["a", "b", "c"]}},
    "a tiny crop": {"pretrained_cfg": {"crop_pct": 1e-9}},
    "an unknown interpolation": {"pretrained_cfg": {"interpolation": "__import__('os')"}},
}


@pytest.mark.full
@pytest.mark.parametrize("case", CONFIGS)
def test_encoder_folders_that_ask_for_too_much(run: Path, case: str) -> None:
    rewrite(run / "encoder" / "config.json", lambda config: config | CONFIGS[case])
    started = time.monotonic()
    error = cli_error(["eval", "knn", str(run / "encoder"), "--data", "builtin:fashion_mnist"])
    assert str(run) in error
    assert len(error) < 1000
    if "pretrained_cfg" not in CONFIGS[case]:  # the same folder to be continued from
        recipe = ["pretrain", "--method", "simclr", "--backbone", "test_vit", "--data", "builtin:fashion_mnist"]
        given = [f'backbone.pretrained="local-dir:{run / "encoder"}"', "views.size=32", "data.workers=0"]
        output = run.parent / "new"
        cli_error([*recipe, "--output", str(output), *(word for each in given for word in ("--set", each))])
        assert not output.exists()
    assert time.monotonic() - started < 60  # no number of its own: an attack would take hours


@pytest.mark.parametrize(
    "text", [DEEP, "{}", "[]", "null", "\x00\xff", '{"architecture": ' + "9" * 5000 + "}", "{" * 9]
)
def test_a_config_that_is_none(run: Path, text: str) -> None:
    (run / "encoder" / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=r"config\.json"):
        load_encoder(str(run))


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.canary}",)


@pytest.mark.parametrize("old_format", [False, True])
def test_code_in_a_checkpoint_never_runs(tmp_path: Path, old_format: bool, run: Path) -> None:
    canary, file = tmp_path / "canary", tmp_path / "evil.pth"
    content = {"state_dict": {"backbone.conv1.weight": torch.rand(2)}, "args": Evil(canary)}
    torch.save(content, file, _use_new_zipfile_serialization=not old_format)
    error = cli_error(["import", str(file), str(tmp_path / "out")])
    assert "posix.system" in error
    assert "was not loaded" in error
    # The same bytes under the name of something that cannot hold code.
    shutil.copy(file, run / "encoder" / "model.safetensors")
    shutil.copy(file, tmp_path / "evil.safetensors")
    with pytest.raises(UserError, match="safetensors"):
        load_encoder(str(run))
    with pytest.raises(UserError, match="not a complete safetensors file"):
        import_checkpoint(tmp_path / "evil.safetensors", tmp_path / "out")
    assert not canary.exists()
    assert not (tmp_path / "out").exists()
    torch.load(file, weights_only=False)  # the attack works where it is not refused
    assert canary.exists()


def test_checkpoints_that_unfold_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    torch.save({"state_dict": {"backbone.x": torch.zeros(1000)}}, tmp_path / "plain.pth")
    packed = tmp_path / "packed.pth"
    with zipfile.ZipFile(tmp_path / "plain.pth") as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as sink:
        for entry in source.infolist():
            sink.writestr(entry.filename, source.read(entry))
    with pytest.raises(UserError, match="compressed or larger"):
        import_checkpoint(packed, out)
    # One number that claims to be a terabyte.
    state = {"pos_embed": torch.zeros(1).expand(1, 1 + 100_000 * 100_000, 64)}
    state |= {"patch_embed.proj.weight": torch.zeros(64, 3, 16, 16)}
    torch.save({f"backbone.{name}": tensor for name, tensor in state.items()}, tmp_path / "wide.pth")
    with pytest.raises(UserError, match="larger than the file"):
        import_checkpoint(tmp_path / "wide.pth", out, backbone="test_vit")
    (tmp_path / "torn.pth").write_bytes((tmp_path / "plain.pth").read_bytes()[:-40])
    (tmp_path / "text.pth").write_text("<html>404</html>")
    for name in ("torn.pth", "text.pth"):
        with pytest.raises(UserError, match="incomplete"):
            import_checkpoint(tmp_path / name, out)
    assert not out.exists()


@pytest.mark.parametrize(
    "name", ["../../secret", "/etc/passwd", "..", "", "a/b", "a\\b", "model.safetensors/../../x", "x\0y"]
)
def test_manifests_name_no_file_elsewhere(run: Path, name: str) -> None:
    checkpoint = run / "checkpoints" / "step-00000002"
    entry = {"bytes": 3, "sha256": hashlib.sha256(b"abc").hexdigest()}
    (run / "secret").write_bytes(b"abc")
    rewrite(checkpoint / "manifest.json", lambda said: {**said, "files": said["files"] | {name: entry}})
    with pytest.raises(UserError, match="not a file of this folder"):
        read_checkpoint(checkpoint)


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("kind", ["link to a copy", "link to zeros without end", "pipe", "folder", "absent"])
def test_only_plain_files_are_of_a_checkpoint(run: Path, file: str, kind: str) -> None:
    path = run / "checkpoints" / "step-00000002" / file
    copy = run / "copy"
    path.rename(copy)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind != "absent":
        path.symlink_to(copy if kind == "link to a copy" else "/dev/zero")
    with pytest.raises(UserError, match="damaged or changed since it was saved"):
        read_checkpoint(path.parent)


STATES = {
    "deep": DEEP,
    "none": "null",
    "no step": "{}",
    "a step before the first": '{"step": -1, "recipe": {}, "optimizer": {}}',
    "a step beyond counting": '{"step": ' + "9" * 400 + ', "recipe": {}, "optimizer": {}}',
    "digits without end": '{"step": ' + "9" * 5000 + "}",
    "an optimizer that is none": '{"step": 2, "recipe": {}, "optimizer": {"a": 3}}',
    "latin": "\xff",
}


@pytest.mark.parametrize("case", STATES)
def test_states_that_are_none(run: Path, case: str) -> None:
    checkpoint = run / "checkpoints" / "step-00000002"
    (checkpoint / "state.json").write_text(STATES[case], encoding="latin-1")
    resign(checkpoint)
    with pytest.raises(UserError, match=r"not a valid checkpoint file|has no step"):
        read_checkpoint(checkpoint)
    with pytest.raises(UserError, match="no intact checkpoint left"):
        newest_checkpoint(run / "checkpoints")


@pytest.mark.full
@pytest.mark.parametrize("text", [DEEP, "null", "{}", '{"files": []}', '{"files": {}}', '{"files": {"state.json": 1}}'])
def test_manifests_that_are_none(run: Path, text: str) -> None:
    (run / "checkpoints" / "step-00000002" / "manifest.json").write_text(text)
    with pytest.raises(UserError, match="step-00000002"):
        newest_checkpoint(run / "checkpoints")


def test_an_optimizer_of_other_shapes_is_refused_before_a_step(run: Path) -> None:
    checkpoint = run / "checkpoints" / "step-00000002"
    tensors = load_file(checkpoint / "optimizer.safetensors")
    name = next(key for key, value in tensors.items() if value.ndim == 2)
    tensors[name] = torch.zeros(7)
    save_file(tensors, checkpoint / "optimizer.safetensors")
    resign(checkpoint)
    error = cli_error(["pretrain", str(run / "recipe.toml"), "--output", str(run), "--set", "train.max_steps=3"])
    assert "has another shape" in error


@pytest.mark.parametrize(
    "name",
    [
        *("metrics.jsonl", "results.jsonl", "diagnostics.jsonl", "bad_samples.jsonl", "report.html", "encoder"),
        *("checkpoints", "capsules", ".recipe.tmp", ".data.tmp", "recipe.toml", "PREEMPTED"),
    ],
)
@pytest.mark.parametrize("dangling", [False, True])
def test_a_runs_folder_of_links_is_not_written_through(run: Path, tmp_path: Path, name: str, dangling: bool) -> None:
    """An untrusted run that is continued, reported or evaluated: the targets of its links stay unchanged."""
    victim = tmp_path / "victim"
    victim.mkdir()
    if (run / name).is_dir():
        shutil.rmtree(run / name)
    recipe = str(shutil.copy(run / "recipe.toml", tmp_path / "recipe.toml"))
    (run / name).unlink(missing_ok=True)
    if not dangling:
        shutil.copy(recipe, victim / "target")
    (run / name).symlink_to(victim / "target")
    before = {file.name: file.read_bytes() for file in victim.iterdir()}
    refused = "is a link"
    assert refused in cli_error(["pretrain", recipe, "--output", str(run), "--set", "train.max_steps=3"])
    if not (name == "recipe.toml" and dangling):
        assert refused in cli_error(["report", str(run), "--no-gallery"])
    with pytest.raises(UserError, match=refused):
        append_result(run, {"step": 2})
    assert {file.name: file.read_bytes() for file in victim.iterdir()} == before


def test_pictures_are_not_drawn_through_links(run: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    (run / "pictures").mkdir(exist_ok=True)
    (run / "pictures/curves.png").unlink(missing_ok=True)
    (run / "pictures/curves.png").symlink_to(tmp_path / "mine")
    assert "is a link" in cli_error(["report", str(run), "--no-gallery"])
    assert (tmp_path / "mine").read_text() == "precious"


def test_a_whole_number_beyond_all_floats_is_not_finite() -> None:
    assert number(10**400) is None
    assert number(-(10**400)) is None
    assert number(10**299) == 1e299


@pytest.mark.full
@pytest.mark.parametrize(
    "name",
    [
        *("recipe.toml", "metrics.jsonl", "diagnostics.jsonl", "data.json", ".lock", "PREEMPTED", ".recipe.tmp"),
        *("checkpoints/latest", "checkpoints/.probe.tmp", "checkpoints/.step-00000003.tmp", "encoder/config.json"),
    ],
)
def test_a_pipe_in_a_runs_folder_is_not_waited_for(run: Path, tmp_path: Path, name: str) -> None:
    """In a separate process, which could wait forever."""
    recipe = str(shutil.copy(run / "recipe.toml", tmp_path / "recipe.toml"))
    (run / name).unlink(missing_ok=True)
    os.mkfifo(run / name)
    for words in (["pretrain", recipe, "--output", str(run)], ["report", str(run), "--no-gallery"]):
        done = subprocess.run([sys.executable, "-m", "sslkit", *words], capture_output=True, text=True, timeout=60)
        assert done.returncode == 2, done.stderr
        assert done.stderr.count("\n") == 1


def test_links_in_the_checkpoints_folder_are_replaced_and_not_followed(run: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "keep").write_text("mine")
    latest = run / "checkpoints" / "latest"
    latest.unlink()
    latest.symlink_to(victim / "keep")
    for name in (".latest.tmp", ".step-00000003.tmp", "step-00000003", ".probe.tmp"):
        (run / "checkpoints" / name).symlink_to(victim / "keep" if name == ".probe.tmp" else victim)
    with pytest.raises(SystemExit) as ended:
        main(["pretrain", str(run / "recipe.toml"), "--output", str(run), "--set", "train.max_steps=3"])
    assert ended.value.code == 0
    assert [file.name for file in victim.iterdir()] == ["keep"]
    assert (victim / "keep").read_text() == "mine"


@pytest.mark.parametrize(
    "change",
    [
        {"format": 99},
        {"step": -1},
        {"step": 10**30},
        {"images": "many"},
        {"recipe": []},
        {"recipe": {"method": {"name": "os"}, "backbone": {"name": "test_vit"}, "data": {"path": "x"}}},
        {"loss": "rm -rf"},
        {"processes": None},
        {"device": 3},
        {"sha256": None},
    ],
    ids=str,
)
def test_capsules_that_are_none(good: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    capsule = tmp_path / "capsule"
    capsule.mkdir()
    shutil.copy(good / "checkpoints" / "step-00000002" / "model.safetensors", capsule / "model.safetensors")
    digest = hashlib.sha256((capsule / "model.safetensors").read_bytes()).hexdigest()
    state = json.loads((good / "checkpoints" / "step-00000002" / "state.json").read_text())
    facts = {"format": 1, "step": 1, "complaint": "", "loss": "1.0", "grad_norm": "1.0", "detour": 0, "processes": 1}
    facts |= {"device": "cpu", "torch": "2", "sample_ids": [], "images": 2000, "recipe": state["recipe"]}
    facts["sha256"] = digest
    (capsule / "capsule.json").write_text(json.dumps(facts))
    read_crash_dump(capsule)
    (capsule / "capsule.json").write_text(json.dumps(facts | change))
    cli_error(["replay", str(capsule)])
    (capsule / "capsule.json").unlink()
    os.mkfifo(capsule / "capsule.json")
    assert "not a regular file" in cli_error(["replay", str(capsule)])
