"""Copies of batches to a GPU, beside its work."""

import torch

from sslkit.data.batch import Batch


class Uploader:
    """Copies batches to a GPU on a stream of its own.

    A copy begins at the call, while kernels of earlier steps still run; kernels that are launched later wait for it on
    the device. The host waits for nothing if the batch is in pinned memory.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)

    def __call__(self, batch: Batch) -> Batch:
        """The batch on the device: views, sample ids and the plan of device views."""
        with torch.cuda.stream(self.stream):
            uploaded = batch.to(self.device)
        computing = torch.cuda.current_stream(self.device)
        computing.wait_stream(self.stream)
        for tensor in uploaded.tensors():
            tensor.record_stream(computing)  # or its memory could be given to a later batch while kernels still read it
        return uploaded
