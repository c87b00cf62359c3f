"""Draws of training are the same for every number of processes, and a process draws no more than its own blocks."""

from itertools import pairwise

import pytest
import torch

from distill.rng import BLOCK, Rng

SHAPE = (3, 2)


def draws(total, rows=None, seed=5):
    """All kinds of draws, twice, in the order of a training step."""
    rng = Rng.seeded(seed, torch.device("cpu"), total, rows)
    like = torch.zeros((rows.stop - rows.start) if rows else total, *SHAPE)
    return [draw for _ in range(2) for draw in (rng.uniform(), rng.normal(like), rng.integers(1000), rng.normal())]


@pytest.mark.parametrize("total, parts", [(256, 2), (700, 7), (1024, 2), (1024, 8), (1536, 16)])
def test_parts_of_a_batch_together_are_the_draws_of_the_whole_batch(total, parts):
    cuts = [total * i // parts for i in range(parts + 1)]
    own = [draws(total, slice(a, b)) for a, b in pairwise(cuts)]
    for whole, *some in zip(draws(total), *own, strict=True):
        assert torch.equal(whole, torch.cat(some))


def test_a_batch_of_one_block_is_drawn_from_the_seed_itself():
    generator = torch.Generator().manual_seed(5)
    t, noise = torch.rand(BLOCK, generator=generator), torch.randn(BLOCK, *SHAPE, generator=generator)
    assert torch.equal(t, draws(BLOCK)[0]) and torch.equal(noise, draws(BLOCK)[1])
    assert torch.equal(t, draws(3 * BLOCK)[0][:BLOCK])  # and so is the first block of a larger one


def test_samples_of_all_blocks_are_different_and_standard_normal():
    noise = Rng.seeded(0, torch.device("cpu"), 16 * BLOCK).normal(torch.zeros(16 * BLOCK, 8))
    assert len(noise.unique(dim=0)) == len(noise)
    assert abs(noise.mean()) < 0.02 and abs(noise.var() - 1) < 0.03  # almost four standard errors
    blocks = noise.reshape(16, -1)
    correlation = torch.corrcoef(blocks) - torch.eye(16)
    assert correlation.abs().max() < 0.12


def test_a_process_draws_only_the_blocks_of_its_rows(monkeypatch):
    drawn, randn = [], torch.randn
    monkeypatch.setattr(torch, "randn", lambda shape, **kwargs: drawn.append(shape[0]) or randn(shape, **kwargs))
    rows = slice(1000, 1100)
    Rng.seeded(0, torch.device("cpu"), 2048, rows).normal(torch.zeros(100, 2))
    assert drawn == [BLOCK, BLOCK]  # 768 to 1279
