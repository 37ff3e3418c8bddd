"""Checks the SimCLR, BYOL, SwAV, memory-bank and in-batch formulas against section 10 and the invariants.

Golden losses are quoted with 16 digits and one code with 16, all held to 1e-12.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from . import byol, instdisc, mechanisms, simclr, swav
from .formulas import cosine_momentum, l2_rows, moco_logits_loss
from .moco_v3 import NaiveLars
from .test_formulas import K2, Q2, D, K, N, Q, wave

PROTOTYPES = l2_rows(wave(torch.cos, 10, D, 0.29, 0.7))
SCORES = [l2_rows(Q) @ PROTOTYPES.T, l2_rows(K) @ PROTOTYPES.T]


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Seeded float64 normal draws."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def leaves(*tensors: Tensor) -> list[Tensor]:
    """Copies that require a gradient."""
    return [t.clone().requires_grad_() for t in tensors]


@pytest.mark.parametrize(("t", "expected"), [(0.1, 11.32965201986293), (0.5, 5.0970153752390654)])
def test_simclr_golden(t: float, expected: float) -> None:
    """Summed form by both transcriptions, and twice the mean form."""
    assert simclr.nt_xent(Q, K, t).item() == pytest.approx(expected, abs=1e-12)
    assert simclr.nt_xent_naive(Q, K, t).item() == pytest.approx(expected, abs=1e-12)
    assert 2.0 * simclr.nt_xent_mean(Q, K, t).item() == pytest.approx(expected, abs=1e-12)


def test_simclr_double_loop_gradients() -> None:
    """The double loop and the matrix form have the same gradients, not zero in either view."""
    a, b = leaves(normal(5, 7), normal(5, 7, seed=1))
    naive = torch.autograd.grad(simclr.nt_xent_naive(a, b, 0.3), (a, b))
    fast = torch.autograd.grad(simclr.nt_xent(a, b, 0.3), (a, b))
    torch.testing.assert_close(naive, fast, rtol=1e-10, atol=1e-12)
    assert min(g.norm().item() for g in naive) > 1e-3


def test_simclr_invariances() -> None:
    """Collapse gives 2 ln(2N - 1); joint permutations and swapped views change nothing; misalignment does."""
    one = Q[:1].expand(N, D)
    assert simclr.nt_xent(one, one, 0.1).item() == pytest.approx(2 * math.log(2 * N - 1), abs=1e-12)
    base = simclr.nt_xent(Q, K, 0.1).item()
    order = torch.randperm(N, generator=torch.Generator().manual_seed(1))
    assert simclr.nt_xent(Q[order], K[order], 0.1).item() == pytest.approx(base, abs=1e-12)
    assert simclr.nt_xent(K, Q, 0.1).item() == pytest.approx(base, abs=1e-12)
    aligned = normal(N, D)
    assert simclr.nt_xent(aligned, aligned[order], 0.1) > simclr.nt_xent(aligned, aligned, 0.1)


@pytest.mark.parametrize("ranks", [2, 4])
def test_simclr_ranks(ranks: int) -> None:
    """Mean over ranks equals the whole batch, gradients too; without gradient to the gathered ones, it is half."""
    z1, z2 = leaves(Q, K)
    whole = simclr.nt_xent(z1, z2, 0.5)
    expected = torch.cat(torch.autograd.grad(whole, (z1, z2)))
    for gathered, right in (((z1, z2), True), ((z1.detach(), z2.detach()), False)):
        parts = list(zip(z1.chunk(ranks), z2.chunk(ranks), strict=True))
        local = [simclr.nt_xent_rank(a, b, *gathered, 0.5, rank) for rank, (a, b) in enumerate(parts)]
        mean = torch.stack(local).mean()
        assert mean.item() == pytest.approx(whole.item(), abs=1e-12)
        error = (torch.cat(torch.autograd.grad(mean, (z1, z2))) - expected).norm() / expected.norm()
        assert error < 1e-12 if right else 0.4 < error < 0.6


def test_byol_golden_and_gradients() -> None:
    """The quoted value; gradient to the predictions only."""
    p1, z2, p2, z1 = leaves(Q, K2, Q2, K)
    loss = byol.byol_loss(p1, z2, p2, z1)
    assert loss.item() == pytest.approx(3.6092829806746174, abs=1e-12)
    torch.autograd.backward(loss)
    assert p1.grad is not None
    assert p2.grad is not None
    assert z1.grad is None
    assert z2.grad is None


def test_byol_values() -> None:
    """2 - 2 cos per view: 0 when parallel, 4 when orthogonal, 8 when opposed; scales do not matter."""
    eye = torch.eye(4, dtype=torch.float64)
    cases = ((eye, 0.0), (eye.roll(1, dims=0), 4.0), (-eye, 8.0))
    for other, expected in cases:
        assert byol.byol_loss(eye, 3 * other, 0.2 * eye, other).item() == pytest.approx(expected, abs=1e-12)
    cosine = nn.functional.cosine_similarity(Q, K2)
    torch.testing.assert_close(byol.regression_loss(5 * Q, 0.1 * K2), 2 - 2 * cosine, rtol=0, atol=1e-12)


def test_byol_ranks() -> None:
    """The mean over two halves equals the whole."""
    halves = [byol.byol_loss(Q[h], K2[h], Q2[h], K[h]).item() for h in (slice(0, 4), slice(4, 8))]
    assert sum(halves) / 2 == pytest.approx(3.6092829806746174, abs=1e-12)


def test_byol_momentum() -> None:
    """The same curve as MoCo v3 over steps, from the initial value to one."""
    for step in range(0, 101, 25):
        assert byol.byol_momentum(step, 100, 0.99) == pytest.approx(cosine_momentum(step, 100, 0.99), abs=1e-15)
    assert byol.byol_momentum(100, 100, 0.99) == 1.0


def test_swav_golden() -> None:
    """The quoted loss and code, and the sums of the codes."""
    assert swav.swav_loss(SCORES, 0.1).item() == pytest.approx(4.445165042026105, abs=1e-12)
    code = swav.sinkhorn(SCORES[0])
    assert code[0, 2].item() == pytest.approx(0.4588927609604826, abs=1e-12)
    assert code.min().item() >= 0.0
    torch.testing.assert_close(code.sum(dim=1), torch.ones(N, dtype=torch.float64), rtol=0, atol=1e-12)


def test_sinkhorn_masses_and_shift() -> None:
    """Prototype masses approach B / P, samples sum to one, and a constant added to all scores is nothing."""
    scores = l2_rows(normal(512, 128)) @ l2_rows(normal(100, 128, seed=1)).T
    worst = []
    for iterations in (1, 3, 10):
        code = swav.sinkhorn(scores, iterations=iterations)
        torch.testing.assert_close(code.sum(dim=1), torch.ones(512, dtype=torch.float64), rtol=0, atol=1e-12)
        worst.append((code.sum(dim=0) / 5.12 - 1).abs().max().item())
    assert worst[0] > worst[1] > worst[2]
    assert worst[1] < 2e-2
    assert worst[2] < 1e-6
    shifted = swav.sinkhorn(scores + 1.7, iterations=10)
    torch.testing.assert_close(shifted, code, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("ranks", [2, 4])
def test_sinkhorn_ranks(ranks: int) -> None:
    """Slices of the batch that share only their total and row sums give the slices of the whole."""
    shards = [torch.exp(part / 0.05).T for part in SCORES[0].chunk(ranks)]
    total = torch.stack([shard.sum() for shard in shards]).sum()
    shards = [shard / total for shard in shards]
    for _ in range(3):
        row_sums = torch.stack([shard.sum(dim=1) for shard in shards]).sum(dim=0)
        shards = [shard / row_sums[:, None] / 10 for shard in shards]
        shards = [shard / shard.sum(dim=0) / N for shard in shards]
    joined = torch.cat([(shard * N).T for shard in shards])
    torch.testing.assert_close(joined, swav.sinkhorn(SCORES[0]), rtol=1e-10, atol=1e-14)


def test_swav_averages() -> None:
    """Uniform scores give ln P; more crops are averaged; every crop but the code's own is scored."""
    flat = [torch.zeros(4, 3000, dtype=torch.float64)] * 4
    codes = [torch.full((4, 3000), 1 / 3000, dtype=torch.float64)] * 2
    assert swav.swapped_prediction_loss(codes, flat, 0.1).item() == pytest.approx(8.006367567650246, abs=1e-12)
    scores = leaves(*SCORES, normal(N, 10), normal(N, 10, seed=1))
    codes = [swav.sinkhorn(score) for score in scores[:2]]
    pairs = {
        (i, v): nn.functional.cross_entropy(scores[v] / 0.1, codes[i]) for i in range(2) for v in range(4) if v != i
    }
    loss = swav.swav_loss(scores, 0.1)
    assert loss.item() == pytest.approx(sum(p.item() for p in pairs.values()) / 6, abs=1e-12)
    assert min(g.norm().item() for g in torch.autograd.grad(loss, scores)) > 1e-3


def updates(kind: str, lrs: list[float]) -> list[Tensor]:
    """Runs an optimizer on fixed gradients of a matrix and a vector."""
    values = [nn.Parameter(wave(torch.sin, 3, 4, 0.5, 0.2)), nn.Parameter(wave(torch.cos, 3, 4, 0.5, 0.2)[0])]
    optimizer = NaiveLars(values, 0.0, 1e-2) if kind == "after" else simclr.NaiveSimclrLars(values, 0.0, 1e-2)
    for t, lr in enumerate(lrs):
        optimizer.param_groups[0]["lr"] = lr
        for i, p in enumerate(values):
            p.grad = normal(*p.shape, seed=10 * t + i)
        optimizer.step()
    return [p.detach() for p in values]


def test_simclr_lars() -> None:
    """Equal to the other form while lr is constant, different afterwards; no decay or trust for a vector."""
    torch.testing.assert_close(updates("inside", [0.6] * 3), updates("after", [0.6] * 3), rtol=0, atol=1e-12)
    inside, after = updates("inside", [0.6, 0.3]), updates("after", [0.6, 0.3])
    start = wave(torch.cos, 3, 4, 0.5, 0.2)[0]
    first, second = (normal(4, seed=seed) for seed in (1, 11))
    torch.testing.assert_close(inside[1], start - 1.9 * 0.6 * first - 0.3 * second, rtol=0, atol=1e-12)
    torch.testing.assert_close(after[1], start - 0.6 * first - 0.3 * (0.9 * first + second), rtol=0, atol=1e-12)
    assert not torch.allclose(inside[0], after[0], rtol=0, atol=1e-9)
    matrix = wave(torch.sin, 3, 4, 0.5, 0.2)
    step = (updates("inside", [0.6])[0] - matrix).norm().item()
    assert step == pytest.approx(0.6e-3 * matrix.norm().item(), rel=1e-10)


def test_larc() -> None:
    """Scaled gradients fed to torch's SGD give the same; a zero tensor gets its bare gradient."""
    start = [normal(3, 4), torch.zeros(4, dtype=torch.float64), normal(4, seed=1)]
    ours, theirs = ([nn.Parameter(copy.deepcopy(p)) for p in start] for _ in range(2))
    larc, sgd = swav.NaiveLarc(ours, lr=0.5, wd=1e-2), torch.optim.SGD(theirs, lr=0.5, momentum=0.9)
    for t in range(3):
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            a.grad = normal(*a.shape, seed=10 * t + i)
            b.grad = a.grad.clone()
            if t or i != 1:
                scale = 1e-3 * b.data.norm() / (b.grad.norm() + 1e-2 * b.data.norm() + 1e-8)
                b.grad = (b.grad + 1e-2 * b.data) * scale
        larc.step()
        sgd.step()
        if t == 0:
            torch.testing.assert_close(ours[1].data, -0.5 * normal(4, seed=1), rtol=0, atol=1e-15)
    torch.testing.assert_close([p.data for p in ours], [p.data for p in theirs], rtol=0, atol=1e-12)


def test_heads() -> None:
    """Counts of section 0, names, biases, and SimCLR's last BN without offset."""

    def count(module: nn.Module) -> int:
        return sum(p.numel() for p in module.parameters() if p.requires_grad)

    assert (count(byol.byol_projector()), count(byol.byol_predictor())) == (9_449_472, 2_109_440)
    assert [n for n, _ in byol.byol_mlp(4, 6, 3).named_parameters()] == [
        "0.weight",
        "0.bias",
        "1.weight",
        "1.bias",
        "3.weight",
    ]
    assert count(swav.swav_projector()) + 3000 * 128 == 4_846_720
    for layers in (2, 3):
        head = simclr.simclr_projector(6, 3, layers)
        assert count(head) == (layers - 1) * (6 * 6 + 2 * 6) + 6 * 3 + 3
        linears = [m for m in head if isinstance(m, nn.Linear)]
        assert [(m.in_features, m.out_features) for m in linears] == [(6, 6)] * (layers - 1) + [(6, 3)]
        assert all(m.bias is None for m in linears)
        assert isinstance(head[-1], nn.BatchNorm1d)
        assert head[-1].weight.requires_grad
        assert not head[-1].bias.requires_grad
        assert not head[-1].bias.any()
    with pytest.raises(ValueError, match="2 or 3"):
        simclr.simclr_projector(6, 3, 4)


def test_bank_start() -> None:
    """Rows are bounded, not normalised, and of unit length on average."""
    bank = instdisc.initial_bank(4000, 12, torch.Generator().manual_seed(0))
    assert instdisc.bank_bound(128) == pytest.approx(math.sqrt(3 / 128), abs=1e-15)
    assert bank.abs().max().item() <= 0.5
    assert bank.square().sum(dim=1).mean().item() == pytest.approx(1.0, abs=0.03)
    assert bank.norm(dim=1).std().item() > 0.05


def test_nce() -> None:
    """The loops equal tensor expressions, Z has no gradient, and column 0 is the positive."""
    bank, (f,) = instdisc.initial_bank(20, D, torch.Generator().manual_seed(0)), leaves(Q)
    ids, negatives = torch.arange(N) + 3, torch.arange(N * 5).reshape(N, 5) % 20
    columns = instdisc.nce_columns(ids, negatives)
    assert torch.equal(columns[:, 0], ids)
    exps = instdisc.nce_exponentials(f, bank, columns, 0.3)
    torch.testing.assert_close(exps, torch.einsum("bkd,bd->bk", bank[columns], l2_rows(f)).div(0.3).exp())
    z = instdisc.first_batch_z(exps, 20)
    assert z == pytest.approx(20 * exps.mean().item(), abs=1e-12)
    p, noise = exps / z, 5 / 20
    positive = torch.log(p[:, 0] / (p[:, 0] + noise + 1e-7)).sum()
    others = torch.log(noise / (p[:, 1:] + noise + 1e-7)).sum()
    loss = instdisc.nce_loss(exps, z, 20)
    assert loss.item() == pytest.approx(-(positive + others).item() / N, abs=1e-12)
    ours = torch.autograd.grad(loss, f, retain_graph=True)
    torch.testing.assert_close(ours, torch.autograd.grad(-(positive + others) / N, f), rtol=1e-10, atol=1e-12)


def test_softmax_forms() -> None:
    """Full softmax, memory-bank and in-batch losses equal torch's cross-entropy; collapse gives logarithms."""
    bank, ids = instdisc.initial_bank(20, D, torch.Generator().manual_seed(0)), torch.arange(N) + 3
    full = instdisc.full_softmax_loss(Q, bank, ids, 0.1)
    assert full.item() == pytest.approx(nn.functional.cross_entropy(l2_rows(Q) @ bank.T / 0.1, ids).item(), abs=1e-12)
    unit, shared = l2_rows(bank), torch.tensor([0, 1, 2, 19, 4])
    with_bank = mechanisms.memory_bank_loss(Q, unit, ids, shared.expand(N, 5), 0.1)
    assert with_bank.item() == pytest.approx(moco_logits_loss(Q, unit[ids], unit[shared].T, 0.1)[0].item(), abs=1e-12)
    q, k = leaves(Q, K)
    in_batch = mechanisms.in_batch_loss(q, k, 0.1)
    reference = nn.functional.cross_entropy(l2_rows(Q) @ l2_rows(K).T / 0.1, torch.arange(N))
    assert in_batch.item() == pytest.approx(reference.item(), abs=1e-12)
    assert min(g.norm().item() for g in torch.autograd.grad(in_batch, (q, k))) > 1e-3
    one = Q[:1].expand(N, D)
    assert mechanisms.in_batch_loss(one, one, 0.1).item() == pytest.approx(math.log(N), abs=1e-12)


def test_bank_update() -> None:
    """Half old, half new, normalised; the last duplicate wins from the old row; other rows stay."""
    before = instdisc.initial_bank(6, D, torch.Generator().manual_seed(0))
    bank = before.clone()
    instdisc.move_bank(bank, torch.tensor([4, 1, 4]), 7.0 * Q[:3])
    new = l2_rows(Q[:3])
    expected = before.clone()
    expected[1] = nn.functional.normalize(0.5 * before[1] + 0.5 * new[1], dim=0)
    expected[4] = nn.functional.normalize(0.5 * before[4] + 0.5 * new[2], dim=0)
    torch.testing.assert_close(bank, expected, rtol=0, atol=1e-14)
