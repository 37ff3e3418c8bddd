"""The sweep's heads are what torch trains one at a time."""

import json
import math
from pathlib import Path

import pytest
import timm
import torch
from conftest import run
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sslkit.errors import UserError
from sslkit.evaluate.probes.sweep import SweepProtocol, sweep


def blobs(rows: int, seed: int, spread: float = 2.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(5, 12, generator=torch.Generator().manual_seed(99))
    labels = torch.arange(rows) % 5
    return centres[labels] + spread * torch.randn(rows, 12, generator=generator), labels


def one_head(
    features: Tensor, labels: Tensor, test: Tensor, lr: float, decay: float, norm: bool, protocol: SweepProtocol
) -> tuple[Tensor, Tensor]:
    """Logits of the held-out and of the test rows by nn.Linear, autograd and torch.optim.SGD."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(protocol.seed))
    held_out, fit = order[: round(len(labels) * 0.1)], order[round(len(labels) * 0.1) :]
    head = nn.Linear(features.shape[1], 5)
    start = torch.empty(features.shape[1], 5).normal_(0, 0.01, generator=torch.Generator().manual_seed(protocol.seed))
    with torch.no_grad():
        head.weight.copy_(start.T)
        head.bias.zero_()
    model = nn.Sequential(nn.BatchNorm1d(features.shape[1], affine=False) if norm else nn.Identity(), head)
    peak = lr * protocol.batch_size / 256
    optimizer = torch.optim.SGD(head.parameters(), lr=peak, momentum=0.9, weight_decay=decay)
    generator = torch.Generator().manual_seed(protocol.seed + 1)
    steps, step = protocol.epochs * math.ceil(len(fit) / protocol.batch_size), 0
    for _ in range(protocol.epochs):
        for rows in fit[torch.randperm(len(fit), generator=generator)].split(protocol.batch_size):
            optimizer.param_groups[0]["lr"] = peak * 0.5 * (1 + math.cos(math.pi * step / steps))
            optimizer.zero_grad()
            cross_entropy(model(features[rows]), labels[rows]).backward()
            optimizer.step()
            step += 1
    model.eval()
    with torch.no_grad():
        return model(features[held_out]), model(test)


def test_every_head_is_torchs_own() -> None:
    (train, labels), (test, truth) = blobs(300, 0), blobs(100, 1)
    protocol = SweepProtocol((0.03, 1.0), (0.0, 0.01), (False, True), epochs=3, batch_size=64)
    readings = {"out": train.double(), "half": train.double()[:, :6]}
    tests = {"out": test.double(), "half": test.double()[:, :6]}
    torch.set_default_dtype(torch.float64)
    try:
        result = sweep(readings, labels, tests, truth, protocol)
        held_out = torch.randperm(300, generator=torch.Generator().manual_seed(0))[:30]
        assert len(result.grid) == 16
        for head in result.grid:
            arguments = (readings[head.readout], labels, tests[head.readout], head.lr, head.weight_decay, head.norm)
            chosen_on, scored_on = one_head(*arguments, protocol)
            accuracy = (chosen_on.argmax(1) == labels[held_out]).double().mean()
            assert head.held_out == pytest.approx(float(accuracy), abs=1e-6), head
            if head == result.chosen:
                assert result.accuracy == pytest.approx(float((scored_on.argmax(1) == truth).double().mean()), abs=1e-6)
    finally:
        torch.set_default_dtype(torch.float32)
    assert result.chosen.held_out == max(head.held_out for head in result.grid)


def test_it_learns_whatever_the_scale_of_the_features() -> None:
    (train, labels), (test, truth) = blobs(600, 0, 0.8), blobs(200, 1, 0.8)
    for scale in (0.01, 1.0, 100.0):
        result = sweep({"out": scale * train}, labels, {"out": scale * test}, truth, SweepProtocol(epochs=10))
        assert result.accuracy > 0.9, scale


def test_sweep_on_the_command_line(capsys: pytest.CaptureFixture[str], class_folders: Path, tmp_path: Path) -> None:
    vit = timm.create_model("test_vit", num_classes=0, img_size=32)
    timm.models.save_for_hf(vit, str(tmp_path), safe_serialization=True, model_args={"img_size": 32})
    words = ["eval", "sweep", str(tmp_path), "--data", str(class_folders), "--epochs", "2", "--lr", "0.1,1"]
    code, out, _ = run(capsys, *words, "--layers", "out,-2,last4,dino_vit_b", "--json")
    assert code == 0
    result = json.loads(out)
    assert len(result["grid"]) == 2 * 2 * 2 * 4
    assert {head["reading"] for head in result["grid"]} == {
        *("output", "block -2", "last 4 blocks", "last 1 blocks and patch mean")
    }
    assert [score["encoder"] for score in result["scores"]] == [str(tmp_path), "random init", "raw pixels"]
    code, out, _ = run(capsys, *words)
    assert code == 0
    assert "all heads, the best" in out
    for wrong, sentence in (
        (["--layer", "first"], "unknown readout 'first'; must be out, dino_vit_s, dino_vit_b, the index of a block"),
        (["--norm", "maybe"], "--norm maybe: must be no, yes"),
        (["--lr", "high"], "--lr high: must be a number"),
    ):
        code, _, err = run(capsys, *words[:-2], *wrong)
        assert code == 2
        assert sentence in err


def test_a_rate_that_overflows_is_never_chosen() -> None:
    (train, labels), (test, truth) = blobs(300, 0, 0.5), blobs(100, 1, 0.5)
    protocol = SweepProtocol((1e30, 0.1), (0.0,), (False,), epochs=3)
    result = sweep({"out": 1e10 * train}, labels, {"out": 1e10 * test}, truth, protocol)
    assert math.isfinite(result.accuracy)
    with pytest.raises(UserError, match="the grid is empty"):
        sweep({"out": train}, labels, {"out": test}, truth, SweepProtocol(lrs=()))
