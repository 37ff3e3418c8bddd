"""The dictionary read in pieces against the whole matrix of logits: same loss, same gradient, none of the memory."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from sslkit.parts import info_nce as contrast
from sslkit.parts.info_nce import info_nce_in_pieces


def rows(count: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return normalize(torch.randn(count, 16, dtype=dtype, generator=torch.Generator().manual_seed(seed)), dim=1)


def whole_matrix(query: Tensor, key: Tensor, keys: Tensor, temperature: float) -> Tensor:
    logits = torch.cat([(query * key).sum(dim=1, keepdim=True), query @ keys.T], dim=1)
    return cross_entropy(logits / temperature, torch.zeros(len(query), dtype=torch.long), reduction="none")


@pytest.mark.parametrize("piece", [256, 300, 1000, 10_000])
@pytest.mark.parametrize("temperature", [0.01, 0.07, 1.0])
def test_pieces_equal_the_whole(piece: int, temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contrast, "CPU_LOGITS", piece * 24)
    query, key, keys = rows(24, 0).requires_grad_(), rows(24, 1), rows(1000, 2)
    loss, accuracy = info_nce_in_pieces(query, key, keys, temperature)
    loss.backward()
    twin = query.detach().clone().requires_grad_()
    expected = whole_matrix(twin, key, keys, temperature).mean()
    expected.backward()
    assert query.grad is not None
    assert twin.grad is not None
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(query.grad, twin.grad, rtol=1e-10, atol=1e-14)
    first = (twin * key).sum(dim=1) >= (twin @ keys.T).amax(dim=1)
    assert accuracy.item() == first.double().mean().item()


def test_the_gradient_is_the_losss_own() -> None:
    query, key, keys = rows(5, 3).requires_grad_(), rows(5, 4), rows(700, 5)
    assert torch.autograd.gradcheck(lambda each: info_nce_in_pieces(each, key, keys, 0.2)[0], query)


def test_logits_far_apart_neither_overflow_nor_vanish() -> None:
    query = torch.eye(3, 16, dtype=torch.float32).requires_grad_()
    keys = torch.cat([-torch.eye(3, 16).repeat(200, 1), torch.eye(3, 16)])
    loss, _ = info_nce_in_pieces(query, torch.eye(3, 16), keys, 0.001)
    loss.backward()
    assert loss.item() == pytest.approx(torch.tensor(2.0).log().item(), rel=1e-6)  # its own key, and its equal
    assert query.grad is not None
    assert bool(query.grad.isfinite().all())


def test_no_tensor_of_all_logits_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contrast, "CPU_LOGITS", 8 * 512)
    query, key, keys = rows(8, 6).requires_grad_(), rows(8, 7), rows(16_384, 8)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        info_nce_in_pieces(query, key, keys, 0.07)[0].backward()
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert 0 < largest < 8 * 16_384 * 8 / 8  # an eighth of (B, K) float64


def test_without_gradient_the_loss_is_the_same() -> None:
    query, key, keys = rows(8, 6), rows(8, 7), rows(900, 8)
    with torch.no_grad():
        loss = info_nce_in_pieces(query, key, keys, 0.07)[0]
    torch.testing.assert_close(loss, whole_matrix(query, key, keys, 0.07).mean(), rtol=1e-12, atol=0)
