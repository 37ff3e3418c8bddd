"""The files of docs/examples/launch: what they start is a command of ours, and what they say is what schemas allow."""

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
import yaml
from accelerate.commands.config.config_args import ClusterConfig
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from conftest import small_recipe
from safetensors.torch import load_file
from torch.distributed.run import get_args_parser

from sslkit.cli import app
from sslkit.recipe.resolve import load_recipe

FILES = Path(__file__).parents[2] / "docs/examples/launch"
ACCELERATE = ("cpu", "one-gpu", "eight-gpus", "nodes")
MANIFESTS = ("kubernetes-job", "kubeflow-pytorchjob")
PRETRAIN = typer.main.get_command(app).commands["pretrain"]  # type: ignore[attr-defined]


def assert_is_ours(words: list[str], run: str = "") -> None:
    """``words`` after ``-m``: our module, and options and a recipe that it takes."""
    assert words[0] == "sslkit.pretrain"
    given = PRETRAIN.make_context("pretrain", list(words[1:])).params
    recipe = load_recipe(given["recipe"], given["overrides"])
    assert recipe.train.batch_size % 64 == 0
    assert given["output"] == run or not run


@pytest.mark.parametrize("name", ACCELERATE)
def test_an_accelerate_file_is_one(name: str) -> None:
    file = FILES / f"{name}.yaml"
    config = ClusterConfig.from_yaml_file(str(file))  # refuses keys that it does not know
    assert config.num_processes == {"cpu": 2, "one-gpu": 1, "eight-gpus": 8, "nodes": 32}[name]
    comments = [line.lstrip("# ") for line in file.read_text().splitlines() if line.startswith("#")]
    words = shlex.split(next(line for line in comments if line.startswith("accelerate launch")))
    words = ["0" if word == "RANK" else word for word in words[2:]]
    given = launch_command_parser().parse_args(words)
    assert given.config_file == file.name
    assert_is_ours([given.training_script, *given.training_script_args])


def manifests(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FILES / f"{name}.yaml").read_text()))


def pod(manifest: dict[str, Any]) -> dict[str, Any]:
    spec = manifest["spec"]
    spec = spec["pytorchReplicaSpecs"]["Worker"] if manifest["kind"] == "PyTorchJob" else spec
    return spec["template"]["spec"]


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_starts_our_command_by_torchrun(name: str) -> None:
    manifest = manifests(name)[-1]
    container = pod(manifest)["containers"][0]
    assert container["command"][0] == "torchrun"
    given = get_args_parser().parse_args(container["command"][1:])
    assert given.module
    assert_is_ours([given.training_script, *given.training_script_args], "/data/runs/mocov3_vits")
    gpus = container["resources"]["limits"]["nvidia.com/gpu"]
    if name == "kubernetes-job":
        service, spec = manifests(name)[0], manifest["spec"]
        assert int(given.nnodes) == spec["completions"] == spec["parallelism"]
        assert given.nproc_per_node == gpus
        assert service["spec"]["selector"] == spec["template"]["metadata"]["labels"]
        host = f"{manifest['metadata']['name']}-0.{service['metadata']['name']}"
        assert given.rdzv_endpoint == f"{host}:{service['spec']['ports'][0]['port']}"
        assert spec["template"]["spec"]["subdomain"] == service["metadata"]["name"]
    else:
        assert manifest["spec"]["nprocPerNode"] == gpus
    mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts == {"/data", "/dev/shm"}
    assert {mount["name"] for mount in container["volumeMounts"]} == {v["name"] for v in pod(manifest)["volumes"]}


def strangers(value: Any, kind: str, models: Any, where: str = "") -> list[str]:
    """Keys that the API's model of ``kind`` does not have."""
    if kind.startswith("list["):
        return [odd for each in value for odd in strangers(each, kind[5:-1], models, where)]
    if kind.startswith("dict("):
        inner = kind[5:-1].partition(",")[2].strip()
        return [odd for key in value for odd in strangers(value[key], inner, models, f"{where}.{key}")]
    model = getattr(models, kind, None)
    if model is None:
        return [] if not isinstance(value, dict) else [f"{where}: {kind}"]
    names = {key: field for field, key in model.attribute_map.items()}
    odd = [f"{where}.{key}" for key in value if key not in names]
    for key in value.keys() & names.keys():
        odd += strangers(value[key], model.openapi_types[names[key]], models, f"{where}.{key}")
    return odd


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_has_the_keys_of_the_api(name: str) -> None:
    """Where the Python clients are installed: pip install kubernetes kubeflow-training."""
    models = pytest.importorskip("kubernetes.client")
    kinds = {"Service": "V1Service", "Job": "V1Job", "PyTorchJob": "KubeflowOrgV1PyTorchJob"}
    for manifest in manifests(name):
        module = models
        if manifest["kind"] == "PyTorchJob":
            module = pytest.importorskip("kubeflow.training.models")
            for other in dir(models):
                if other.startswith("V1"):
                    setattr(module, other, getattr(models, other))
        assert strangers(manifest, kinds[manifest["kind"]], module) == []
        assert strangers(manifest | {"sepc": {}}, kinds[manifest["kind"]], module) == [".sepc"]


def test_the_elastic_line_is_torchruns(tmp_path: Path) -> None:
    """Run with a torchrun that prints what it was given."""
    (tmp_path / "torchrun").write_text('#!/bin/sh\nfor word in "$@"; do echo "$word"; done\n')
    (tmp_path / "torchrun").chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "HEAD": "node-0", "NODES": "4", "GPUS": "8"}
    said = subprocess.run(["sh", str(FILES / "elastic.sh")], capture_output=True, text=True, env=env, check=True)
    given = get_args_parser().parse_args(said.stdout.splitlines())
    assert (given.nnodes, given.nproc_per_node, given.rdzv_endpoint) == ("4", "8", "node-0:29500")
    assert_is_ours([given.training_script, *given.training_script_args], "/shared/run")


@pytest.mark.slow
def test_accelerate_trains_by_the_file_for_cpus(tmp_path: Path) -> None:
    """Two processes, whose weights are those of torchrun's two."""
    (tmp_path / "recipe.toml").write_text(small_recipe(train={"max_steps": 3, "batch_size": 16}).to_toml())
    env = {key: value for key, value in os.environ.items() if key != "WORLD_SIZE"}
    launchers = {
        "accelerate": ["accelerate.commands.launch", "--config_file", str(FILES / "cpu.yaml")],
        "torchrun": ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
    }
    for name, launcher in launchers.items():
        words = ["-m", "sslkit.pretrain", str(tmp_path / "recipe.toml"), "--output", str(tmp_path / name)]
        command = [sys.executable, "-m", *launcher, *words]
        done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=240, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        assert "2 processes, cpu" in done.stdout
    one, other = (load_file(tmp_path / name / "checkpoints/step-00000003/model.safetensors") for name in launchers)
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_the_page_starts_as_many_machines_as_it_speaks_of() -> None:
    page = (FILES.parents[1] / "clusters.md").read_text(encoding="utf-8").replace("\\\n", " ")
    line = next(line for line in page.splitlines() if line.startswith("accelerate launch --config_file nodes.yaml"))
    words = line.replace("nodes.yaml", str(FILES / "nodes.yaml")).split()[2:]
    given, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    assert (given.num_machines, given.num_processes, given.multi_gpu) == (2, 16, True)
