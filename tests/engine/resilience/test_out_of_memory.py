"""Memory that runs out ends a command in one sentence, with values that fit and that sslkit accepts."""

import dataclasses
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import small_recipe

from sslkit.cli import main
from sslkit.data.sources.image_source import open_source
from sslkit.engine import step as step_module
from sslkit.engine.accelerator import make_accelerator
from sslkit.engine.cost.step_cost import count_step
from sslkit.engine.monitor.knn_monitor import KnnMonitor
from sslkit.engine.resilience import out_of_memory
from sslkit.engine.resilience.out_of_memory import OutOfMemoryError, explain_step, fitting_images, held_bytes
from sslkit.engine.setup import build_method, check_batch_split, set_up_training
from sslkit.engine.state import TrainingState
from sslkit.errors import is_out_of_memory
from sslkit.profiling import profile
from sslkit.recipe.resolve import Recipe

ADAMW = {"name": "adamw", "lr": 1e-3, "weight_decay": 0.1}
CPU_ERROR = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "4294967296 bytes. Error code 12 (Cannot allocate memory)"
)
GPU_ERROR = torch.OutOfMemoryError(
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.25 GiB"
)


@pytest.mark.parametrize("error", [CPU_ERROR, GPU_ERROR, MemoryError("no memory")])
def test_it_is_recognised(error: Exception) -> None:
    assert is_out_of_memory(error)
    assert not is_out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))


def run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    with pytest.raises(SystemExit) as left:
        main(arguments)
    return int(left.value.code or 0), capsys.readouterr().err


def fail_at(step: int, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the forward pass of a step fail."""
    original = step_module.forward_and_backward

    def fails(state: TrainingState, *arguments: Any) -> Any:
        if state.step == step:
            raise error
        return original(state, *arguments)

    monkeypatch.setattr(step_module, "forward_and_backward", fails)


def test_the_advice_is_a_command_that_is_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(small_recipe("moco_v3", "test_vit", checkpoint={"every_steps": 1}).to_toml())
    fail_at(1, CPU_ERROR, monkeypatch)
    code, said = run(["pretrain", str(recipe), "--output", str(tmp_path / "run")], capsys)
    assert code == 2
    assert "Traceback" not in said
    [sentence] = [line for line in said.splitlines() if line.startswith("sslkit: ")]
    assert sentence.startswith("sslkit: out of memory at step 1, of this machine (")
    assert "set train.micro_batch=16 (the same loss, a third slower), train.batch_size=16 or " in sentence
    command = sentence.partition(", such as: ")[2].split()
    assert command[0] == "sslkit"
    monkeypatch.undo()
    code, said = run(command[1:], capsys)  # in a folder of its own, from the checkpoint of step 1
    assert code == 0, said
    assert (tmp_path / "run-2/checkpoints/step-00000006/manifest.json").is_file()


def test_an_evaluation_that_does_not_fit_names_its_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.toml"
    monitor = {"data": "builtin:fashion_mnist", "every_epochs": 1, "max_train": 200, "diagnose_every": 0}
    recipe.write_text(small_recipe(train={"max_steps": 1}, monitor=monitor).to_toml())

    def fails(*_args: Any, **_options: Any) -> float:
        raise GPU_ERROR

    monkeypatch.setattr(KnnMonitor, "__call__", fails)
    code, said = run(["pretrain", str(recipe), "--output", str(tmp_path / "run")], capsys)
    assert code == 2
    assert "out of memory in the evaluation at step 1" in said
    assert "set monitor.max_train=100 for a smaller bank" in said


def test_commands_without_advice_of_their_own_say_it_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_args: Any, **_options: Any) -> None:
        raise GPU_ERROR

    monkeypatch.setattr("sslkit.evaluate.evaluate_knn_grid", fails)
    code, said = run(["eval", "knn", "test_resnet", "--data", "builtin:fashion_mnist"], capsys)
    assert code == 2
    assert said.count("\n") == 1
    assert "sslkit: out of memory (CUDA out of memory. Tried to allocate 2.00 GiB." in said
    assert said.endswith("run on the CPU: CUDA_VISIBLE_DEVICES= sslkit eval knn ...\n")


def test_bench_says_it(monkeypatch: pytest.MonkeyPatch) -> None:
    fail_at(0, CPU_ERROR, monkeypatch)
    with pytest.raises(OutOfMemoryError, match=r"out of memory at step 0.* set train\.micro_batch=16 "):
        profile(small_recipe(), seconds=0.1)


def state_on_gpu(recipe: Recipe, available: int, monkeypatch: pytest.MonkeyPatch, processes: int = 1) -> TrainingState:
    """A state whose accelerator says that it is a GPU with 80 GiB, of which so many bytes are this process's."""
    state = set_up_training(recipe, open_source(recipe.data).without_labels(), make_accelerator(recipe))
    gpu = SimpleNamespace(device=torch.device("cuda", 0), num_processes=processes)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (1 << 30, 80 << 30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _device: available - (1 << 30))
    monkeypatch.setattr(out_of_memory, "gpu_has_bf16", lambda: True)
    return dataclasses.replace(state, accelerator=gpu)  # type: ignore[arg-type]


@pytest.mark.parametrize(("fits", "advised"), [(20, 16), (9, 8), (3, 2)])
def test_the_largest_slice_that_fits_is_advised(fits: int, advised: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory for weights, gradients, AdamW's two slots and the activations of a known number of images."""
    recipe = small_recipe("simclr", "test_vit", train={"batch_size": 64}, optim=ADAMW)
    method = build_method(recipe, 100)
    per_image = count_step(recipe, 64, low_precision=False).activation_bytes / 64
    held = sum(tensor.numel() * tensor.element_size() for tensor in [*method.parameters(), *method.buffers()])
    held += 3 * sum(4 * param.numel() for param in method.parameters() if param.requires_grad)
    available = int((held + (fits + 0.5) * per_image) / out_of_memory.USABLE)
    state = state_on_gpu(recipe, available, monkeypatch)
    assert held_bytes(state) == held
    assert fitting_images(state, available) == fits
    said = str(explain_step(state, GPU_ERROR))
    assert f"set train.micro_batch={advised} (the same loss, a third slower), train.batch_size={advised}, " in said
    assert "train.precision=bf16 or train.activation_checkpointing=true" in said
    assert said.startswith("out of GPU memory at step 0, where 79.0 of 80.0 GiB are used")


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_what_is_advised_splits_into_processes_and_groups(processes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    train = {"batch_size": 96, "processes": 0}
    recipe = small_recipe("moco_v2", "test_resnet", train=train, method={"bn_groups": 4})
    state = state_on_gpu(recipe, 70 << 30, monkeypatch, processes)
    said = str(explain_step(state, GPU_ERROR))
    micro, batch = (int(re.search(rf"train\.{key}=(\d+)", said)[1]) for key in ("micro_batch", "batch_size"))  # type: ignore[index]
    assert f"BatchNorm over {micro} images each" in said
    for keys in ({"micro_batch": micro}, {"batch_size": batch}):
        changed = dataclasses.replace(recipe, train=recipe.train.model_copy(update=keys))
        check_batch_split(changed, build_method(changed, 100), processes)
    assert (96 // processes) % micro == 0
    assert batch < 96


def test_memory_of_others_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    state = state_on_gpu(small_recipe("simclr", "test_vit"), 20 << 30, monkeypatch)
    assert "where 79.0 of 80.0 GiB are used (60.0 by other programs)" in str(explain_step(state, GPU_ERROR))
