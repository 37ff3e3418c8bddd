"""Checks the training-loop oracles and the heads against the facts document's structure and invariants."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn

from . import heads
from .arithmetic import head_parameter_counts
from .formulas import ema_closed_form, l2_rows, lars_steps
from .moco_v1v2 import MocoRun, train_moco, train_moco_official_order
from .moco_v3 import MocoV3Run, NaiveLars, OptimizerFactory, train_moco_v3

STEPS, BATCH, IN, WIDTH, DIM, SLOTS = 5, 8, 6, 10, 4, 12


def seeded(seed: int) -> torch.Generator:
    """Returns a fresh generator."""
    return torch.Generator().manual_seed(seed)


def views(seed: int) -> list[tuple[Tensor, Tensor]]:
    """Two noisy float64 views of random vectors for every step."""
    gen = seeded(seed)
    result = []
    for _ in range(STEPS):
        x, *noise = (torch.randn(BATCH, IN, dtype=torch.float64, generator=gen) for _ in range(3))
        result.append((x + 0.1 * noise[0], x + 0.1 * noise[1]))
    return result


def trunk() -> nn.Sequential:
    """A seeded two-layer trunk with BN."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(IN, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH)).double()


@dataclass
class Toy:
    """Settings of a MoCo v1/v2 toy run, with a queue that the batch does not divide."""

    steps: int = STEPS
    groups: int = 2
    m: float = 0.9
    lr: float = 0.1
    seed: int = 1
    mlp: bool = True
    batches: list[tuple[Tensor, Tensor]] = field(default_factory=lambda: views(7))

    def run(self, official: bool = False) -> MocoRun:
        """Runs the toy in either order."""
        backbone = trunk()
        head = (heads.v2_head if self.mlp else heads.v1_head)(WIDTH, DIM).double()
        queue = l2_rows(torch.randn(SLOTS, DIM, generator=seeded(2))).T.contiguous()
        gen = seeded(self.seed)
        permutations = [torch.randperm(BATCH, generator=gen) for _ in range(self.steps)]
        train = train_moco_official_order if official else train_moco
        return train(
            backbone,
            head,
            queue,
            self.batches[: self.steps],
            permutations,
            self.groups,
            self.lr,
            1e-3,
            0.9,
            self.m,
            0.2,
        )


def params(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Drops the BN buffers from a state dict."""
    return {k: v for k, v in state.items() if "running_" not in k and "num_batches" not in k}


@pytest.mark.parametrize("mlp", [False, True])
def test_orders_agree_up_to_one_teacher_move(mlp: bool) -> None:
    """Same losses, student, queue, pointer and buffers; the official teacher lags by one move."""
    ours, official = Toy(mlp=mlp).run(), Toy(mlp=mlp).run(official=True)
    shorter = Toy(mlp=mlp, steps=STEPS - 1).run()
    assert official.losses == pytest.approx(ours.losses, rel=1e-12)
    assert official.pointer == ours.pointer == STEPS * BATCH % SLOTS
    torch.testing.assert_close(official.queue, ours.queue, rtol=0, atol=1e-12)
    torch.testing.assert_close(official.student, ours.student, rtol=0, atol=1e-12)
    torch.testing.assert_close(params(official.teacher), params(shorter.teacher), rtol=0, atol=1e-12)
    moved = {k: 0.9 * v + 0.1 * official.student[k] for k, v in params(official.teacher).items()}
    torch.testing.assert_close(moved, params(ours.teacher), rtol=0, atol=1e-12)
    for name in ours.teacher.keys() - params(ours.teacher).keys():
        torch.testing.assert_close(official.teacher[name], ours.teacher[name], rtol=0, atol=1e-12)


def test_matches_torch_building_blocks() -> None:
    """With one group the loop equals torch's own normalise, cross-entropy and SGD put together."""
    toy = Toy(groups=1, m=1.0)
    student = nn.Sequential(trunk(), heads.v2_head(WIDTH, DIM).double())
    teacher = copy.deepcopy(student)
    queue = l2_rows(torch.randn(SLOTS, DIM, generator=seeded(2))).T.contiguous()
    optimizer = torch.optim.SGD(student.parameters(), lr=toy.lr, momentum=0.9, weight_decay=1e-3)
    losses = []
    for step, (x_q, x_k) in enumerate(toy.batches):
        q = nn.functional.normalize(student(x_q))
        k = nn.functional.normalize(teacher(x_k)).detach()
        logits = torch.cat([torch.einsum("nd,nd->n", q, k)[:, None], q @ queue], dim=1) / 0.2
        loss = nn.functional.cross_entropy(logits, torch.zeros(BATCH, dtype=torch.long))
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        queue[:, (step * BATCH + torch.arange(BATCH)) % SLOTS] = k.T
        losses.append(loss.item())
    run = toy.run()
    assert run.losses == pytest.approx(losses, rel=1e-12)
    torch.testing.assert_close(run.queue, queue, rtol=0, atol=1e-12)
    torch.testing.assert_close(list(run.student.values()), list(student.state_dict().values()), rtol=0, atol=1e-12)


def test_official_move_at_step_zero_is_a_no_op() -> None:
    """After one official step the teacher still equals the initial student, up to rounding."""
    official = Toy(steps=1).run(official=True)
    initial = {"backbone." + k: v for k, v in trunk().state_dict().items()}
    for name, value in params(initial).items():
        torch.testing.assert_close(official.teacher[name], value, rtol=1e-15, atol=1e-16)


def test_teacher_closed_form() -> None:
    """Five moves equal the explicit weighted sum over the student trajectory."""
    name = "backbone.0.weight"
    trajectory = [Toy(steps=n).run().student[name] for n in range(1, STEPS + 1)]
    expected = ema_closed_form(trunk().state_dict()["0.weight"], trajectory, 0.9)
    torch.testing.assert_close(Toy().run().teacher[name], expected, rtol=0, atol=1e-14)


def test_teacher_extremes() -> None:
    """Momentum 1 keeps the initial teacher, 0 copies the student; BN buffers are never averaged."""
    kept, copied = Toy(m=1.0).run(), Toy(m=0.0).run()
    assert torch.equal(kept.teacher["backbone.0.weight"], trunk().state_dict()["0.weight"])
    for name, value in params(copied.student).items():
        assert torch.equal(copied.teacher[name], value)
    assert not torch.equal(copied.teacher["backbone.1.running_mean"], copied.student["backbone.1.running_mean"])


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_shuffle_needs_groups(groups: int) -> None:
    """Another permutation changes the first loss only when there are at least two groups."""
    a, b = (Toy(steps=1, groups=groups, seed=seed).run().losses[0] for seed in (1, 2))
    assert (abs(a - b) < 1e-12) == (groups == 1)


def test_queue_wraps() -> None:
    """Two pushes of 8 into 12 columns: all unit norm, and the second one overwrote columns 8-11 and 0-3."""
    once, twice = Toy(steps=1).run(), Toy(steps=2).run()
    torch.testing.assert_close(twice.queue.norm(dim=0), torch.ones(SLOTS, dtype=torch.float64))
    assert (once.pointer, twice.pointer) == (8, 4)
    changed = (once.queue != twice.queue).any(dim=0)
    assert changed.nonzero().flatten().tolist() == [0, 1, 2, 3, 8, 9, 10, 11]


def test_group_size_is_checked() -> None:
    """A batch that does not divide into the groups is refused."""
    with pytest.raises(ValueError, match="does not divide"):
        Toy(steps=1, groups=3).run()


def v3_modules() -> tuple[nn.Sequential, nn.Sequential, nn.Sequential]:
    """A toy backbone with a frozen first layer, a ViT-style projector and predictor."""
    backbone = trunk()
    backbone[0].requires_grad_(False)
    return (
        backbone,
        heads.v3_vit_projector(WIDTH, 12, DIM).double(),
        heads.v3_vit_predictor(DIM, 12, DIM).double(),
    )


def adamw(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW with the paper's decay."""
    return torch.optim.AdamW(parameters, weight_decay=0.1)


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Momentum SGD."""
    return torch.optim.SGD(parameters, lr=0.0, momentum=0.9)


def lars(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The oracle's LARS."""
    return NaiveLars(parameters, lr=0.0, wd=1e-2)


def run_v3(factory: OptimizerFactory, lr: float, world_size: int = 1, swap: bool = False) -> MocoV3Run:
    """Runs the MoCo v3 toy with a first learning rate of zero."""
    batches = [(b, a) if swap else (a, b) for a, b in views(7)]
    lrs = [lr * i for i in range(STEPS)]
    momenta = [0.99 + 0.002 * i for i in range(STEPS)]
    return train_moco_v3(*v3_modules(), batches, 0.2, factory, lrs, momenta, world_size)


@pytest.mark.parametrize(("factory", "lr"), [(adamw, 1e-2), (sgd, 1e-1), (lars, 1.0)])
def test_v3_ranks_and_frozen_layer(factory: OptimizerFactory, lr: float) -> None:
    """Two or four ranks equal one process; the frozen layer is bit-identical; the rest moved."""
    single = run_v3(factory, lr)
    start = v3_modules()[0].state_dict()
    assert torch.equal(single.student["backbone.0.weight"], start["0.weight"])
    torch.testing.assert_close(single.teacher["backbone.0.weight"], start["0.weight"], rtol=1e-14, atol=1e-16)
    assert not torch.equal(single.student["backbone.3.weight"], start["3.weight"])
    for world_size in (2, 4):
        several = run_v3(factory, lr, world_size)
        assert several.losses == pytest.approx(single.losses, rel=1e-9)
        torch.testing.assert_close(several.student, single.student, rtol=0, atol=1e-7)
        torch.testing.assert_close(several.teacher, single.teacher, rtol=0, atol=1e-7)


def test_v3_state_names_and_zero_rate() -> None:
    """The teacher has no predictor, and a zero learning rate leaves parameters (not BN buffers) alone."""
    run = run_v3(sgd, 0.0)
    assert {name.split(".")[0] for name in run.teacher} == {"backbone", "projector"}
    for module, prefix in zip(v3_modules(), ("backbone.", "projector.", "predictor."), strict=True):
        for name, value in module.named_parameters():
            assert torch.equal(run.student[prefix + name], value)


def test_v3_view_swap() -> None:
    """Swapping the views changes no loss, beyond the summation order."""
    assert run_v3(sgd, 0.1, swap=True).losses == pytest.approx(run_v3(sgd, 0.1).losses, rel=1e-9)


def test_lars_optimizer_matches_the_loop() -> None:
    """Both LARS transcriptions agree on a matrix, a zero matrix and a vector."""
    gen = seeded(5)
    start = [torch.randn(3, 4, generator=gen).double(), torch.zeros(2, 2).double(), torch.ones(4).double()]
    grads = [[torch.randn(p.shape, generator=gen).double() for p in start] for _ in range(3)]
    trained = [nn.Parameter(copy.deepcopy(p)) for p in start]
    optimizer = NaiveLars(trained, lr=0.6, wd=1e-2)
    for step in grads:
        for p, grad in zip(trained, step, strict=True):
            p.grad = grad.clone()
        optimizer.step()
    expected = lars_steps(start, grads, lr=0.6, wd=1e-2, momentum=0.9, eta=1e-3)
    torch.testing.assert_close([p.data for p in trained], expected, rtol=1e-12, atol=1e-12)


def test_head_counts_and_names() -> None:
    """Built heads have the counts of section 0 and the state-dict names of section 3."""
    built: dict[str, nn.Module] = {
        "v1": heads.v1_head(),
        "v2": heads.v2_head(),
        "v3_r50_projector": heads.v3_r50_projector(),
        "v3_vit_s_projector": heads.v3_vit_projector(384),
        "v3_vit_b_projector": heads.v3_vit_projector(768),
        "v3_r50_predictor": heads.v3_r50_predictor(),
        "v3_vit_predictor": heads.v3_vit_predictor(),
    }
    counts = head_parameter_counts()
    for name, module in built.items():
        assert sum(p.numel() for p in module.parameters()) == counts[name]
    stats = ["running_mean", "running_var", "num_batches_tracked"]
    bn1 = ["1.weight", "1.bias", *(f"1.{s}" for s in stats)]
    bn4 = ["4.weight", "4.bias", *(f"4.{s}" for s in stats)]
    assert list(built["v1"].state_dict()) == ["weight", "bias"]
    assert list(built["v2"].state_dict()) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    two = ["0.weight", *bn1, "3.weight"]
    assert list(built["v3_r50_predictor"].state_dict()) == two
    for name in ("v3_r50_projector", "v3_vit_predictor"):
        assert list(built[name].state_dict()) == two + [f"4.{s}" for s in stats]
    expected = [*two, *bn4, "6.weight", *(f"7.{s}" for s in stats)]
    assert list(built["v3_vit_s_projector"].state_dict()) == expected
