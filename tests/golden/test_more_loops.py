"""Checks the SimCLR, BYOL, SwAV, memory-bank and in-batch training loops on toys in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence

import pytest
import torch
from torch import Tensor, nn

from . import byol, instdisc, mechanisms, simclr, swav
from .formulas import ema_closed_form, l2_rows
from .moco_v3 import NaiveLars
from .test_loops import BATCH, DIM, SLOTS, STEPS, WIDTH, params, seeded, sgd, trunk, views

LRS = [0.05 * (i + 1) for i in range(STEPS)]
MOMENTA = [0.9 + 0.01 * i for i in range(STEPS)]
SAMPLES = 20
VIEWS = views(7)
BANK = instdisc.initial_bank(SAMPLES, DIM, seeded(3))
IDS = [torch.randint(SAMPLES, (BATCH,), generator=seeded(i)) for i in range(STEPS)]
NEGATIVES = [torch.randint(SAMPLES, (BATCH, 5), generator=seeded(50 + i)) for i in range(STEPS)]
PERMUTATIONS = [torch.randperm(BATCH, generator=seeded(90 + i)) for i in range(STEPS)]
QUEUE = l2_rows(torch.randn(SLOTS, DIM, generator=seeded(2))).T.contiguous()


def linear() -> nn.Linear:
    """A seeded linear projector."""
    torch.manual_seed(1)
    return nn.Linear(WIDTH, DIM).double()


def byol_modules() -> tuple[nn.Sequential, nn.Sequential, nn.Sequential]:
    """A toy trunk, projector and predictor."""
    backbone = trunk()
    return backbone, byol.byol_projector(WIDTH, 12, DIM).double(), byol.byol_predictor(DIM, 12).double()


def conv_modules() -> tuple[nn.Sequential, nn.Sequential, nn.Linear]:
    """A toy trunk for images of any size, a SwAV head and seven prototypes."""
    torch.manual_seed(2)
    backbone = nn.Sequential(
        nn.Conv2d(2, WIDTH, 3, padding=1), nn.BatchNorm2d(WIDTH), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    return backbone.double(), swav.swav_projector(WIDTH, 9, DIM).double(), nn.Linear(DIM, 7, bias=False).double()


def crops(sizes: Sequence[int] = (6, 6, 4, 4, 4)) -> list[list[Tensor]]:
    """Crops of the given sizes for every step."""
    gen = seeded(11)
    return [[torch.randn(BATCH, 2, s, s, dtype=torch.float64, generator=gen) for s in sizes] for _ in range(STEPS)]


def run_swav(steps: int = STEPS, frozen: int = 0, length: int = 0, start: int = 0) -> swav.SwavRun:
    """Runs the SwAV toy."""
    batches, lrs = crops()[:steps], LRS[:steps]
    return swav.train_swav(*conv_modules(), batches, 0.1, 0.05, 3, sgd, lrs, frozen, length, start)


def close(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], prefix: str = "") -> None:
    """Asserts that two state dicts agree, the second one without the prefix."""
    named = {name: ours[prefix + name] for name in theirs}
    torch.testing.assert_close(named, dict(theirs), rtol=0, atol=1e-11)


def torch_loop(net: nn.Module, losses: Callable[[int], Tensor]) -> list[float]:
    """Trains with torch's SGD on a loss per step."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0, momentum=0.9)
    values = []
    for step, lr in enumerate(LRS):
        optimizer.param_groups[0]["lr"] = lr
        loss = losses(step)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        values.append(loss.item())
    return values


@pytest.mark.parametrize("layers", [2, 3])
def test_simclr_loop(layers: int) -> None:
    """Equals torch's pieces over one joint forward; the frozen offset stays zero."""
    backbone = trunk()
    head = simclr.simclr_projector(WIDTH, DIM, layers).double()
    run = simclr.train_simclr(backbone, head, VIEWS, 0.5, sgd, LRS)
    net = nn.Sequential(backbone, head)

    def loss(step: int) -> Tensor:
        z = nn.functional.normalize(net(torch.cat(VIEWS[step])))
        logits = (z @ z.T / 0.5).masked_fill(torch.eye(2 * BATCH, dtype=torch.bool), -1e9)
        return 2 * nn.functional.cross_entropy(logits, torch.arange(2 * BATCH).roll(BATCH))

    assert run.losses == pytest.approx(torch_loop(net, loss), rel=1e-10)
    close(run.student, net[0].state_dict(), "backbone.")
    close(run.student, net[1].state_dict(), "projector.")
    assert not run.student[f"projector.{3 * layers - 2}.bias"].any()
    assert run.student["backbone.1.num_batches_tracked"].item() == STEPS


def test_simclr_loop_lars() -> None:
    """The loop takes SimCLR's LARS; the first step of a matrix has length lr * eta * norm."""
    modules = trunk(), simclr.simclr_projector(WIDTH, DIM, 2).double()
    run = simclr.train_simclr(*modules, VIEWS[:1], 0.1, lambda p: simclr.NaiveSimclrLars(p, 0.0, 1e-4), [0.3])
    start = modules[0].state_dict()["0.weight"]
    moved = (run.student["backbone.0.weight"] - start).norm().item()
    assert moved == pytest.approx(0.3e-3 * start.norm().item(), rel=1e-10)


def test_byol_loop() -> None:
    """Equals torch's pieces: lerp of the parameters after the update, a teacher in train mode."""
    backbone, projector, predictor = byol_modules()
    run = byol.train_byol(backbone, projector, predictor, VIEWS, sgd, LRS, MOMENTA)
    base = nn.Sequential(backbone, projector)
    student, teacher = nn.Sequential(base, predictor), copy.deepcopy(base)

    def loss(step: int) -> Tensor:
        if step:
            with torch.no_grad():
                for old, new in zip(teacher.parameters(), base.parameters(), strict=True):
                    old.lerp_(new, 1 - MOMENTA[step - 1])
        p1, p2 = (student(x) for x in VIEWS[step])
        z1, z2 = (teacher(x).detach() for x in VIEWS[step])
        cosine = nn.functional.cosine_similarity
        return (4 - 2 * cosine(p1, z2) - 2 * cosine(p2, z1)).mean()

    assert run.losses == pytest.approx(torch_loop(student, loss), rel=1e-10)
    close(run.student, predictor.state_dict(), "predictor.")
    close(run.student, backbone.state_dict(), "backbone.")
    stats = {n: v for n, v in teacher[0].state_dict().items() if n not in params(teacher[0].state_dict())}
    close(run.teacher, stats, "backbone.")
    assert run.teacher["backbone.1.num_batches_tracked"].item() == 2 * STEPS
    assert not torch.allclose(run.teacher["backbone.1.running_mean"], run.student["backbone.1.running_mean"])


def test_byol_teacher() -> None:
    """Closed form at constant momentum, extremes, own start, no predictor; swapped views, same losses."""
    name = "backbone.0.weight"
    modules = byol_modules()
    runs = [byol.train_byol(*modules, VIEWS[:n], sgd, LRS[:n], [0.9] * n) for n in range(1, STEPS + 1)]
    expected = ema_closed_form(modules[0].state_dict()["0.weight"], [run.student[name] for run in runs], 0.9)
    torch.testing.assert_close(runs[-1].teacher[name], expected, rtol=0, atol=1e-14)
    assert not any(key.startswith("predictor.") for key in runs[-1].teacher)
    copied = byol.train_byol(*modules, VIEWS, sgd, LRS, [0.0] * STEPS)
    for key, value in params(copied.teacher).items():
        assert torch.equal(value, copied.student[key])
    other = nn.Sequential(*(copy.deepcopy(m) for m in modules[:2]))
    for p in other.parameters():
        p.data.mul_(0.5)
    own = byol.train_byol(*modules, VIEWS, sgd, LRS, [1.0] * STEPS, (other[0], other[1]))
    assert torch.equal(own.teacher[name], other[0].state_dict()["0.weight"])
    swapped = byol.train_byol(*modules, [(b, a) for a, b in VIEWS], sgd, LRS, [0.9] * STEPS)
    assert swapped.losses == pytest.approx(runs[-1].losses, rel=1e-10)


def test_byol_loop_lars() -> None:
    """The loop takes the LARS with lr after the momentum; a zero rate moves nothing but BN buffers."""
    modules = byol_modules()
    run = byol.train_byol(*modules, VIEWS, lambda p: NaiveLars(p, 0.0, 1e-6), [0.0] * STEPS, MOMENTA)
    for module, prefix in zip(modules, ("backbone.", "projector.", "predictor."), strict=True):
        for name, value in module.named_parameters():
            assert torch.equal(run.student[prefix + name], value)
    assert all(0 < loss < 8 for loss in run.losses)


def test_swav_loop() -> None:
    """Equals torch's pieces: two trunk passes, one head pass, prototypes normalised before each forward."""
    backbone, projector, prototypes = conv_modules()
    run = run_swav()
    net = nn.Sequential(backbone, projector, prototypes)

    def loss(step: int) -> Tensor:
        prototypes.weight.data = nn.functional.normalize(prototypes.weight.data)
        batch = crops()[step]
        features = torch.cat([backbone(torch.cat(batch[:2])), backbone(torch.cat(batch[2:]))])
        scores = prototypes(nn.functional.normalize(projector(features))).chunk(5)
        codes = [swav.sinkhorn(s) for s in scores[:2]]
        pairs = [(i, v) for i in range(2) for v in range(5) if v != i]
        return torch.stack([nn.functional.cross_entropy(scores[v] / 0.1, codes[i]) for i, v in pairs]).mean()

    assert run.losses == pytest.approx(torch_loop(net, loss), rel=1e-10)
    for module, prefix in zip(net, ("backbone.", "projector.", "prototypes."), strict=True):
        close(run.student, module.state_dict(), prefix)
    assert run.student["backbone.1.num_batches_tracked"].item() == 2 * STEPS
    assert run.student["projector.1.num_batches_tracked"].item() == STEPS
    assert run.queue is None
    assert [len(group) for group in swav.resolution_groups(crops((6, 6, 4, 6))[0])] == [2, 1, 1]


def test_swav_frozen_prototypes() -> None:
    """Frozen prototypes are only normalised; they move in the first step after; LARC runs too."""
    start = l2_rows(conv_modules()[2].weight.detach())
    held = run_swav(steps=3, frozen=3).student["prototypes.weight"]
    torch.testing.assert_close(held, start, rtol=0, atol=1e-14)
    assert (run_swav(steps=4, frozen=3).student["prototypes.weight"] - start).norm() > 1e-6
    run = swav.train_swav(*conv_modules(), crops(), 0.1, 0.05, 3, lambda p: swav.NaiveLarc(p, 0.0, 1e-6), LRS)
    assert all(torch.isfinite(torch.tensor(run.losses)))


def test_swav_queue() -> None:
    """Starts at its step, is used when full, is trimmed, and stores embeddings newest first."""
    run = run_swav(length=2 * BATCH + 3, start=1)
    assert run.queue_used == [False, False, False, True, True]
    assert run.queue is not None
    assert run.queue.shape == (2, 2 * BATCH, DIM)
    torch.testing.assert_close(run.queue.norm(dim=2), torch.ones(2, 2 * BATCH, dtype=torch.float64))
    earlier, plain = run_swav(steps=4, length=2 * BATCH, start=1), run_swav()
    assert earlier.queue is not None
    assert torch.equal(run.queue[:, BATCH:], earlier.queue[:, :BATCH])
    assert run.losses[:3] == plain.losses[:3]
    assert abs(run.losses[3] - plain.losses[3]) > 1e-6
    assert run_swav(length=BATCH - 1).queue is None


def test_swav_queue_codes() -> None:
    """The queue's scores join the Sinkhorn before the queue shifts, one queue per crop."""
    weight = l2_rows(torch.randn(7, DIM, generator=seeded(0)))
    queue = l2_rows(torch.randn(2 * 6, DIM, generator=seeded(1))).reshape(2, 6, DIM)
    before = queue.clone()
    embeddings = [l2_rows(torch.randn(3, DIM, generator=seeded(s))) for s in (2, 3)]
    codes, used = swav.assignment_codes(embeddings, [e @ weight.T for e in embeddings], weight, queue, 0.05, 3)
    assert used
    for i in range(2):
        everything = swav.sinkhorn(torch.cat([before[i], embeddings[i]]) @ weight.T)
        torch.testing.assert_close(codes[i], everything[6:], rtol=0, atol=1e-14)
        assert torch.equal(queue[i], torch.cat([embeddings[i], before[i, :3]]))


@pytest.mark.parametrize("mode", ["nce", "softmax", "mechanism"])
def test_bank_loops(mode: str) -> None:
    """Touched rows end with unit norm, others untouched; the student gets torch's gradient."""
    images = [a for a, _ in VIEWS]
    run: instdisc.InstDiscRun | mechanisms.MemoryBankRun
    if mode == "mechanism":
        run = mechanisms.train_memory_bank(trunk(), linear(), BANK, images, IDS, NEGATIVES, 0.2, sgd, LRS)
    else:
        drawn = NEGATIVES if mode == "nce" else None
        run = instdisc.train_instdisc(trunk(), linear(), BANK, images, IDS, drawn, 0.2, sgd, LRS)
        assert (run.z is None) == (mode == "softmax")
    assert any(len(set(ids.tolist())) < BATCH for ids in IDS)
    touched = torch.zeros(SAMPLES, dtype=torch.bool)
    touched[torch.cat(IDS)] = True
    assert torch.equal(run.bank[~touched], BANK[~touched])
    assert run.bank[touched].norm(dim=1).tolist() == pytest.approx([1.0] * int(touched.sum()), abs=1e-12)
    bank, net = BANK.clone(), nn.Sequential(trunk(), linear())
    z: list[float] = []

    def loss(step: int) -> Tensor:
        f, ids = nn.functional.normalize(net(images[step])), IDS[step]
        columns = torch.cat([ids[:, None], NEGATIVES[step]], dim=1)
        rows = bank.clone()
        logits = f @ rows.T / 0.2 if mode == "softmax" else torch.einsum("bd,bkd->bk", f, rows[columns]) / 0.2
        labels = ids if mode == "softmax" else torch.zeros_like(ids)
        for i in range(BATCH):
            bank[ids[i]] = nn.functional.normalize(rows[ids[i]] + f[i].detach(), dim=0)
        if mode != "nce":
            return nn.functional.cross_entropy(logits, labels)
        p = logits.exp()
        z.append(SAMPLES * p.mean().item())
        p, noise = p / z[0], 5 / SAMPLES
        ratio = torch.cat([p[:, :1], torch.full_like(p[:, 1:], noise)], dim=1) / (p + noise + 1e-7)
        return -ratio.log().sum() / BATCH

    assert run.losses == pytest.approx(torch_loop(net, loss), rel=1e-10)
    torch.testing.assert_close(run.bank, bank, rtol=0, atol=1e-12)
    close(run.student, net[0].state_dict(), "backbone.")
    if isinstance(run, instdisc.InstDiscRun) and run.z is not None:
        assert run.z == pytest.approx(z[0], rel=1e-12)
