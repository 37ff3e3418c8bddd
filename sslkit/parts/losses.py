"""Contrastive losses as pure functions of tensors. Similarities and log-sum-exp are never below float32.

Shapes: B local batch, N global batch, C embedding width, K queue size.
"""

import torch
from torch import Tensor
from torch.nn import functional


def info_nce_with_queue(query: Tensor, key: Tensor, queue: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """InfoNCE of each query against its own key and K queued keys (MoCo, arXiv:1911.05722, eq. 1).

    Args:
        query: (B, C), L2-normalised, carries gradient.
        key: (B, C), L2-normalised positives.
        queue: (K, C), L2-normalised negatives.
        temperature: Divides the similarities (0.07 in v1, 0.2 in v2).

    Returns:
        The mean loss in nats, and the share of queries whose own key is the most similar of the K + 1.
    """
    with _full_precision(query):
        query, key, queue = _at_least_float32(query, key, queue)
        positive = (query * key.detach()).sum(dim=1) / temperature
        negatives = query @ queue.detach().T / temperature
        loss = torch.logaddexp(positive, negatives.logsumexp(dim=1)) - positive
        accuracy = (positive >= negatives.amax(dim=1)).float().mean()
        return loss.mean(), accuracy


def info_nce_in_batch(query: Tensor, keys: Tensor, temperature: float, first_label: int) -> tuple[Tensor, Tensor]:
    """InfoNCE of each query against every key of the global batch, times 2 tau (MoCo v3, arXiv:2104.02057, sec. 3).

    Args:
        query: (B, C), any norm; normalised here. Carries gradient.
        keys: (N, C), any norm; normalised here. The keys of all processes in rank order, without gradient.
        temperature: Divides the similarities (0.2 for ViT, 1.0 for ResNet).
        first_label: Row of ``keys`` that is the positive of ``query[0]``: B times the rank.

    Returns:
        The mean loss times 2 tau (as the official code scales it), and the share of queries ranked right.
    """
    with _full_precision(query):
        query, keys = unit_rows(query), unit_rows(keys.detach())
        logits = query @ keys.T / temperature
        labels = first_label + torch.arange(len(query), device=query.device)
        loss = functional.cross_entropy(logits, labels) * (2 * temperature)
        accuracy = (logits.argmax(dim=1) == labels).float().mean()
        return loss, accuracy


def unit_rows(embeddings: Tensor) -> Tensor:
    """L2-normalise each row of (B, C), in float32 or better."""
    with _full_precision(embeddings):
        (embeddings,) = _at_least_float32(embeddings)
        return functional.normalize(embeddings, dim=1)


def _at_least_float32(*tensors: Tensor) -> list[Tensor]:
    return [tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in tensors]


def _full_precision(like: Tensor) -> torch.autocast:
    return torch.autocast(device_type=like.device.type, enabled=False)
