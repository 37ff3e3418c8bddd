"""The memory bank: how it starts, what an update touches, and that noise is uniform and repeatable."""

import math

import torch
from torch.nn.functional import normalize

from sslkit.parts.memory_bank import MemoryBank


def test_rows_start_with_about_unit_norm() -> None:
    torch.manual_seed(0)
    rows = MemoryBank(2000, 128).rows
    bound = 1 / math.sqrt(128 / 3)
    assert rows.abs().max() <= bound
    assert abs(rows.norm(dim=1).mean().item() - 1) < 0.01


def test_an_update_moves_its_rows_only() -> None:
    bank = MemoryBank(10, 4)
    before = bank.rows.clone()
    ids, new = torch.tensor([7, 2]), normalize(torch.randn(2, 4), dim=1)
    bank.update(ids, new, 0.5)
    torch.testing.assert_close(bank.rows[ids], normalize(0.5 * before[ids] + 0.5 * new, dim=1))
    untouched = [row for row in range(10) if row not in (2, 7)]
    assert torch.equal(bank.rows[untouched], before[untouched])


def test_noise_is_uniform_and_a_function_of_the_draws_made() -> None:
    bank = MemoryBank(20, 4)
    drawn = bank.draw_noise(500, 40)
    assert torch.equal(bank.draw_noise(500, 40), drawn)
    counts = torch.bincount(drawn.flatten(), minlength=20).double()
    expected = 500 * 40 / 20
    assert ((counts - expected) ** 2 / expected).sum() < 43.8  # chi-squared, 19 degrees of freedom, p = 0.001
    bank.update(torch.tensor([0]), torch.ones(1, 4), 0.5)
    assert not torch.equal(bank.draw_noise(500, 40), drawn)
    again = MemoryBank(20, 4)
    again.load_state_dict(bank.state_dict())
    assert torch.equal(again.draw_noise(500, 40), bank.draw_noise(500, 40))
