"""What a training step costs, counted on fake tensors: nothing is computed, and no memory is taken."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from sslkit.data.augment.cpu import normalise
from sslkit.engine.setup import build_method
from sslkit.methods import BatchInfo, Progress
from sslkit.recipe.resolve import Recipe

LONG_RUN = Progress(0, 100_000)


@dataclass(frozen=True)
class StepCost:
    """The cost of one step on this process."""

    flops: int  # of matrix products, convolutions and attention, forward and backward, student and teacher
    activation_bytes: int  # kept for the backward pass, without the parameters


def count_step(recipe: Recipe, images: int, *, low_precision: bool) -> StepCost:
    """Count a forward and backward pass of a recipe's method with this many images on this process.

    Recomputation, in slices or of activations, does not count: the FLOPs are those that the model needs, as MFU wants
    them. A multiplication and an addition are two. ``low_precision`` says that activations are in 16 bits.
    """
    plain: dict[str, Any] = {"micro_batch": 0, "activation_checkpointing": False}
    backbone = recipe.backbone.model_copy(update={"pretrained": False})
    recipe = replace(recipe, train=recipe.train.model_copy(update=plain), backbone=backbone)
    flops = FlopCounterMode(display=False)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        method = build_method(recipe, images)
    _move_to_fake_cpu(method, mode)
    with torch.random.fork_rng(devices=[]), mode, _Answering():  # type: ignore[no-untyped-call]
        method.bn_groups = 1  # groups change no product, and would take as many times the operators
        method.train()
        views = [
            torch.empty(images, policy.size, policy.size, recipe.views.channels, dtype=torch.uint8)
            for policy in recipe.views.view_policies()
        ]
        order = np.arange(images) if method.shuffle_keys else None
        prepare = partial(normalise, mean=recipe.views.mean, std=recipe.views.std)
        info = BatchInfo(torch.arange(images))
        with flops, saved_bytes(method) as saved:
            with torch.autocast("cpu", torch.bfloat16, enabled=low_precision):
                loss = method(views, info, LONG_RUN, order, prepare).loss
            loss.backward()
    return StepCost(flops.get_total_flops(), sum(saved.values()))


@contextmanager
def saved_bytes(module: nn.Module) -> Iterator[dict[int, int]]:
    """Count what autograd saves for the backward pass: bytes by storage, without the module's parameters."""
    parameters = {param.untyped_storage()._cdata for param in module.parameters()}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            saved[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved


def _move_to_fake_cpu(module: nn.Module, mode: FakeTensorMode) -> None:
    """Replace parameters and buffers by fake ones: of the meta device only, PyTorch takes other kernels."""
    with mode:
        for child in module.modules():
            for name, param in child._parameters.items():
                if param is not None:
                    child._parameters[name] = nn.Parameter(_fake(param), param.requires_grad)
            for name, buffer in child._buffers.items():
                if buffer is not None:
                    child._buffers[name] = _fake(buffer)


def _fake(tensor: Tensor) -> Tensor:
    channels_last = torch.channels_last if tensor.ndim == 4 else torch.contiguous_format
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", memory_format=channels_last)


class _Answering(TorchDispatchMode):
    """Answers operators that read a value with a plausible one."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            dtype = args[0].dtype
            return False if dtype == torch.bool else 1.0 if dtype.is_floating_point else 1
        return func(*args, **(kwargs or {}))
