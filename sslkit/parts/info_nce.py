"""InfoNCE against a large dictionary of keys: loss and gradient in one pass, without a (B, K) matrix of logits.

The gradient with respect to a query is the mean key under the softmax minus the positive key. The dictionary is read in
pieces, and the running maximum, sum and weighted mean of keys are corrected whenever larger logits appear (the online
softmax of Milakov and Gimelshein, arXiv:1805.02867). Only (B, C) values stay in memory.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Logits computed at a time: what fits a core's cache, and what keeps the matrix units of an accelerator busy.
CPU_LOGITS, ACCELERATOR_LOGITS = 2**19, 2**26


def info_nce_in_pieces(query: Tensor, key: Tensor, keys: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each query's own key among K other keys. Only the queries receive gradient.

    Args:
        query: (B, C), float32 or float64.
        key: (B, C), each query's positive.
        keys: (K, C), the negatives of all queries; read only.
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
    """Number of rows of the dictionary in a piece."""
    budget = CPU_LOGITS if query.device.type == "cpu" else ACCELERATOR_LOGITS
    return max(budget // len(query), 256)
