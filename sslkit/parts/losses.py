"""Losses as pure functions of tensors. Similarities and log-sum-exp are computed in float32 or better.

Shapes: B local batch, N global batch, C embedding width, K negatives, P prototypes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from sslkit.distributed.collectives import max_over_processes, sum_over_processes, world_size
from sslkit.parts.info_nce import info_nce_in_pieces


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
        return info_nce_in_pieces(query, key, queue, temperature)


def info_nce_of_similarities(positive: Tensor, negatives: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """InfoNCE from similarities already computed.

    Args:
        positive: (B,) similarities of the queries with their positives.
        negatives: (B, K) similarities with their negatives.
        temperature: Divides both.

    Returns:
        The mean loss in nats, and the share of queries whose positive is the most similar of the K + 1.
    """
    positive, negatives = positive / temperature, negatives / temperature
    loss = torch.logaddexp(positive, negatives.logsumexp(dim=1)) - positive
    accuracy = (positive >= negatives.amax(dim=1)).float().mean()
    return loss.mean(), accuracy


def info_nce_in_batch(query: Tensor, keys: Tensor, temperature: float, first_label: int) -> tuple[Tensor, Tensor]:
    """InfoNCE of each query against every key of the global batch.

    ``keys`` receive gradient too if they require it (the end-to-end mechanism of arXiv:1911.05722, section 4.1).

    Args:
        query: (B, C), any norm; normalised here. Carries gradient.
        keys: (N, C), any norm; normalised here. The keys of all processes in rank order.
        temperature: Divides the similarities.
        first_label: Row of ``keys`` that is the positive of ``query[0]``: B times the rank.

    Returns:
        The mean loss in nats, and the share of queries whose own key is the most similar.
    """
    with _full_precision(query):
        query, keys = unit_rows(query), unit_rows(keys)
        logits = query @ keys.T / temperature
        labels = first_label + torch.arange(len(query), device=query.device)
        accuracy = (logits.argmax(dim=1) == labels).float().mean()
        return functional.cross_entropy(logits, labels), accuracy


def nt_xent(
    first: Tensor, second: Tensor, all_first: Tensor, all_second: Tensor, temperature: float, first_label: int
) -> tuple[Tensor, Tensor]:
    """SimCLR's loss (arXiv:2002.05709, algorithm 1): each of 2N embeddings finds its twin among the 2N - 1 others.

    Args:
        first: (B, C) embeddings of the first view, any norm; normalised here.
        second: (B, C) of the second view.
        all_first: (N, C) of all processes in rank order, with gradient.
        all_second: (N, C) likewise.
        temperature: Divides the similarities (0.1 on ImageNet, 0.5 on CIFAR-10).
        first_label: Row of ``all_first`` that is ``first[0]``: B times the rank.

    Returns:
        The mean over the first views plus the mean over the second (as the official code adds them, twice the
        paper's mean over 2N), and the share of embeddings whose twin is the most similar.
    """
    with _full_precision(first):
        first, second, all_first, all_second = (unit_rows(z) for z in (first, second, all_first, all_second))
        labels = first_label + torch.arange(len(first), device=first.device)
        loss_1, right_1 = _find_twin(first, all_second, all_first, temperature, labels)
        loss_2, right_2 = _find_twin(second, all_first, all_second, temperature, labels)
        return loss_1 + loss_2, (right_1 + right_2) / 2


def _find_twin(rows: Tensor, twins: Tensor, own: Tensor, temperature: float, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of ``rows`` against ``twins`` and the other rows of their own view."""
    others = (rows @ own.T / temperature).scatter(1, labels[:, None], float("-inf"))
    logits = torch.cat([rows @ twins.T / temperature, others], dim=1)
    accuracy = (logits.argmax(dim=1) == labels).float().mean()
    return functional.cross_entropy(logits, labels), accuracy


def regression_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """BYOL's loss of one direction (arXiv:2006.07733, eq. 2): the batch mean of ``2 - 2 cos``, in [0, 4].

    Args:
        prediction: (B, C), any norm, carries gradient.
        target: (B, C), any norm; its gradient is stopped.
    """
    with _full_precision(prediction):
        prediction, target = unit_rows(prediction), unit_rows(target.detach())
        return (prediction - target).square().sum(dim=1).mean()


def nce_against_noise(positive: Tensor, negatives: Tensor, noise_probability: float, eps: float = 1e-7) -> Tensor:
    """Noise-contrastive estimation over a memory bank (Wu et al., arXiv:1805.01978, eq. 7 and 8).

    Args:
        positive: (B,) model probabilities of each sample being itself.
        negatives: (B, K) model probabilities of K noise samples.
        noise_probability: Of each sample under the uniform noise, 1 / n.
        eps: Keeps the logarithms finite.

    Returns:
        The mean over the batch of the sum over positive and K negatives, in nats.
    """
    noise = negatives.shape[1] * noise_probability
    data = (positive / (positive + noise + eps)).log()
    drawn = (noise / (negatives + noise + eps)).log().sum(dim=1)
    return -(data + drawn).mean()


@torch.no_grad()
def sinkhorn_codes(scores: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Codes that spread the global batch evenly over the prototypes (SwAV, arXiv:2006.09882, section 3.1).

    Every iteration normalises prototypes over all processes' rows, then each row, so that a row sums to 1 exactly
    and a prototype's mass is about N / P.

    Args:
        scores: (B, P) similarities of this process's embeddings with the prototypes.
        epsilon: Temperature of the codes (0.05).
        iterations: 3 in the paper.

    Returns:
        (B, P), without gradient.
    """
    with _full_precision(scores):
        (scores,) = _at_least_float32(scores.detach())
        # A constant cancels out; subtracting the largest score keeps the exponential finite.
        codes = ((scores - max_over_processes(scores.max())) / epsilon).exp()
        codes /= sum_over_processes(codes.sum())
        num_prototypes, num_rows = codes.shape[1], float(len(codes) * world_size())
        for _ in range(iterations):
            codes /= sum_over_processes(codes.sum(dim=0)) * num_prototypes
            codes /= codes.sum(dim=1, keepdim=True) * num_rows
        return codes * num_rows


def swapped_prediction(codes: Sequence[Tensor], scores: Sequence[Tensor], temperature: float) -> Tensor:
    """SwAV's loss: the code of each assignment crop is predicted from every other crop (arXiv:2006.09882, eq. 1).

    Args:
        codes: (B, P) for each of the first crops, in their order.
        scores: (B, P) for every crop, carry gradient.
        temperature: Divides the scores (0.1).

    Returns:
        Cross-entropy in nats: mean over the batch, over the other crops, then over the assignment crops.
    """
    with _full_precision(scores[0]):
        log_probs = [functional.log_softmax(each / temperature, dim=1) for each in _at_least_float32(*scores)]
        total = log_probs[0].new_zeros(())
        for index, code in enumerate(codes):
            others = [log_prob for crop, log_prob in enumerate(log_probs) if crop != index]
            total = total - sum((code * log_prob).sum(dim=1).mean() for log_prob in others) / len(others)
        return total / len(codes)


def inner_products(rows: Tensor, others: Tensor) -> Tensor:
    """Pairwise inner products (B, P) of (B, C) and (P, C), in float32 or better, without autocast."""
    with _full_precision(rows):
        rows, others = _at_least_float32(rows, others)
        return rows @ others.T


def unit_rows(embeddings: Tensor) -> Tensor:
    """L2-normalise each row of (B, C), in float32 or better."""
    with _full_precision(embeddings):
        (embeddings,) = _at_least_float32(embeddings)
        return functional.normalize(embeddings, dim=1)


def _at_least_float32(*tensors: Tensor) -> list[Tensor]:
    return [tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in tensors]


def _full_precision(like: Tensor) -> torch.autocast:
    return torch.autocast(device_type=like.device.type, enabled=False)
