"""Where evaluations compute: the device, its free memory, and the precision of features."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

RESERVE = 2  # a tensor is kept on a GPU if this many fit into its free memory


def evaluation_device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def free_bytes(device: torch.device) -> int:
    """Memory that PyTorch can still allocate on a GPU, in bytes; 2 ** 62 elsewhere, and before the GPU is in use."""
    if device.type != "cuda" or not torch.cuda.is_initialized():
        return 2**62
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + cached


def fits_on(device: torch.device, nbytes: int) -> bool:
    """Whether a tensor of this size may stay on the device, beside what else needs its memory."""
    return RESERVE * nbytes <= free_bytes(device)


def move_if_it_fits(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device, or, if that has too little memory, where it is."""
    return tensor.to(device) if fits_on(device, tensor.nbytes) else tensor


def feature_dtype(device: torch.device) -> torch.dtype:
    """The precision in which encoders compute features: bfloat16 on GPUs that have it, else float32."""
    has_it = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if has_it else torch.float32


def feature_precision(device: torch.device) -> AbstractContextManager[object]:
    """A context in which encoders compute in `feature_dtype`. Features are float32 all the same."""
    dtype = feature_dtype(device)
    return nullcontext() if dtype is torch.float32 else torch.autocast(device.type, dtype)


@contextmanager
def exact_products() -> Iterator[None]:
    """Matrix products of float32 are not rounded to TF32 in the block."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before


class Download:
    """A copy of a tensor to the host, which waits for it only when it is read."""

    def __init__(self, values: Tensor) -> None:
        self.values = values
        self.arrived: torch.cuda.Event | None = None
        if values.device.type == "cuda":
            pinned = torch.empty_like(values, device="cpu", pin_memory=True)
            self.values = pinned.copy_(values, non_blocking=True)
            self.arrived = torch.cuda.Event()
            self.arrived.record()

    def wait(self) -> Tensor:
        """The tensor on the CPU. May be called in another thread."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.values.cpu()
