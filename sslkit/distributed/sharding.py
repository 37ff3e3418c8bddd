"""Sharded parameters (PyTorch's FSDP2): every process keeps a shard of each tensor and gathers it to compute.

Parameters, their gradients and the optimizer's state are sharded (`DTensor`); buffers, such as a queue, are replicated.
Student and teacher are sharded alike, so that the teacher is updated without communication.
"""

import warnings
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from sslkit.distributed.collectives import tracked, world_size


def shard(
    method: nn.Module,
    encoders: list[nn.Module],
    device: torch.device,
    *,
    compute_dtype: torch.dtype | None = None,
    full_precision: Iterable[nn.Module] = (),
) -> None:
    """Shard all parameters of a method over all processes with FSDP2, in place. They must be equal on all processes.

    Each element of an encoder's ``blocks``, the rest of each encoder, and the heads are gathered separately.

    Args:
        method: What is sharded.
        encoders: Its large modules.
        device: The device of this process.
        compute_dtype: Gather parameters and compute in this dtype, without autocast; shards, gradients and their
            reduction stay in float32. None: everything in the parameters' own.
        full_precision: Modules whose parameters stay in their own dtype all the same: BatchNorm, whose parameters must
            have the dtype of its running statistics. They are not inside of each other.
    """
    if world_size() == 1:
        return
    # An encoder's features are a view of its tokens; no method changes them in place.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
    mesh = init_device_mesh(device.type, (world_size(),))
    policy = MixedPrecisionPolicy()
    if compute_dtype is not None:
        policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
        unchanged = MixedPrecisionPolicy(cast_forward_inputs=False)
        for module in full_precision:
            if next(module.parameters(), None) is not None:
                fully_shard(module, mesh=mesh, mp_policy=unchanged)
    for encoder in encoders:
        blocks = getattr(encoder, "blocks", None)
        for module in [*(blocks if isinstance(blocks, nn.Sequential | nn.ModuleList) else []), encoder]:
            fully_shard(module, mesh=mesh, reshard_after_forward=True, mp_policy=policy)
    # The encoders cast their own inputs; others, such as what was drawn for each sample, stay as they are.
    of_heads = replace(policy, cast_forward_inputs=False)
    root = fully_shard(method, mesh=mesh, reshard_after_forward=True, mp_policy=of_heads)
    # Otherwise an encoder that is called before the method, for an evaluation, would become FSDP's root module.
    root._get_fsdp_state()._lazy_init()


@tracked
def full_tensor(tensor: Tensor) -> Tensor:
    """The full tensor. If it is sharded, all processes must call this at the same time."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_shard(tensor: Tensor) -> Tensor:
    """The shard of a tensor on this process, sharing its memory; the tensor itself if it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard_like(held: Tensor, value: Tensor) -> Tensor:
    """Shard a full tensor, which every process has, as ``held`` is sharded; unchanged if ``held`` is not."""
    if not isinstance(held, DTensor):
        return value
    value = value.to(held.device)
    return distribute_tensor(value, held.device_mesh, held.placements, src_data_rank=None)
