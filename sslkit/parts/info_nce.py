"""InfoNCE against a dictionary so large that its logits are not worth keeping: loss and gradient in one pass.

The gradient of a softmax is known as soon as the softmax is: the mean key under it, less the positive key. So the
dictionary is read a piece at a time, the running maximum, sum and weighted mean of keys are corrected as larger
logits turn up (the online softmax of Milakov and Gimelshein, arXiv:1805.02867), and what stays in memory is (B, C),
not (B, K).
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Logits at a time: what a core's cache holds, and on an accelerator what keeps its matrix units busy.
CPU_LOGITS, ACCELERATOR_LOGITS = 2**19, 2**26


def contrast_with_dictionary(query: Tensor, key: Tensor, keys: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each query's own key among K others, with gradient for the queries alone.

    Args:
        query: (B, C), float32 or float64.
        key: (B, C), each query's positive.
        keys: (K, C), everybody's negatives; only read.
        temperature: Divides the inner products.

    Returns:
        The mean loss in nats, and the share of queries whose own key is the most similar of the K + 1.
    """
    result: tuple[Tensor, Tensor] = _Contrast.apply(query, key.detach(), keys.detach(), temperature)
    return result


class _Contrast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, keys: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        scaled = query / temperature
        own = (scaled * key).sum(dim=1)
        most, total, best = own, torch.ones_like(own), torch.full_like(own, -torch.inf)
        mean_key = key.clone() if ctx.needs_input_grad[0] else None
        for piece in keys.split(_piece(query)):
            logits = scaled @ piece.T
            best = torch.maximum(best, logits.amax(dim=1))
            largest = torch.maximum(most, best)
            fade = (most - largest).exp_()
            weights = logits.sub_(largest[:, None]).exp_()
            total = (total * fade).add_(weights.sum(dim=1))
            if mean_key is not None:
                mean_key = mean_key.mul_(fade[:, None]).addmm_(weights, piece)
            most = largest
        if mean_key is not None:
            gradient = (mean_key / total[:, None] - key) / (temperature * len(query))
            ctx.save_for_backward(gradient)
        loss = (total.log() + (most - own)).mean()
        accuracy = (own >= best).to(loss.dtype).mean()
        ctx.mark_non_differentiable(accuracy)
        return loss, accuracy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _grad_accuracy: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_loss, None, None, None


def _piece(query: Tensor) -> int:
    """Rows of the dictionary at a time."""
    budget = CPU_LOGITS if query.device.type == "cpu" else ACCELERATOR_LOGITS
    return max(budget // len(query), 256)
