"""Weights in parts: every process keeps its rows of each tensor and borrows the others' while a module computes.

PyTorch's FSDP2, applied to student and teacher alike, so that the same rows of both lie on the same process and the
teacher follows without a word over the network. Of what the loop holds only parameters, their gradients and what the
optimizer remembers of them are in parts: `DTensor`. Buffers, such as a queue, are whole everywhere.
"""

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from sslkit.distributed.collectives import named, world_size


def shard(method: nn.Module, encoders: list[nn.Module], device: torch.device) -> None:
    """Leave on each process its part of every parameter, in place.

    What is whole at one time is one of an encoder's ``blocks``, or an encoder without such, and the heads.

    Args:
        method: Called as a whole in each step; equal on all processes.
        encoders: Those of its modules that are large: the student's and the teacher's.
        device: Where it lies.
    """
    if world_size() == 1:
        return
    mesh = init_device_mesh(device.type, (world_size(),))
    for encoder in encoders:
        blocks = getattr(encoder, "blocks", None)
        for module in [*(blocks if isinstance(blocks, nn.Sequential | nn.ModuleList) else []), encoder]:
            fully_shard(module, mesh=mesh, reshard_after_forward=True)
    whole_method = fully_shard(method, mesh=mesh, reshard_after_forward=True)
    # Else an encoder that is called before the method, for a kNN that is owed, takes itself for the outermost module.
    whole_method._get_fsdp_state()._lazy_init()


def held_here(module: nn.Module) -> tuple[int, int]:
    """How many numbers of a module's parameters lie on this process, and how many there are."""
    params = list(module.parameters())
    return sum(own_part(param).numel() for param in params), sum(param.numel() for param in params)


@named
def whole(tensor: Tensor) -> Tensor:
    """All of a tensor. If it is in parts, every process must ask for it, at the same time."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_part(tensor: Tensor) -> Tensor:
    """The part of a tensor that lies on this process, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def in_parts_like(held: Tensor, value: Tensor) -> Tensor:
    """A whole tensor, which every process has, in parts as ``held`` is; as it came where that is whole."""
    if not isinstance(held, DTensor):
        return value
    value = value.to(held.device)
    return distribute_tensor(value, held.device_mesh, held.placements, src_data_rank=None)
