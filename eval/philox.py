"""Random numbers without state: functions of (key, index, draw, position), computed where they are used, in integers alone.

They are Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11), a bijection of 128-bit counters per 64-bit
key. Here position, draw and index are the counter. No number depends on the others of its batch, so every cut of a batch gives the same.
The words have the same bits on every device. Normal numbers take the device's own log, sin and cos in float64. Libraries differ in the
last of its 53 bits, so that about one float32 in 10^8 may differ between devices, by one unit in its last place.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

ROUNDS = 10
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
WEYL = 0x9E3779B9, 0xBB67AE85  # what each round adds to the halves of the key
MASK = 2**32 - 1
BLOCK = {
    "cpu": 2**14,
    "cuda": 2**22,
}  # counters that pass the rounds together: they stay in a CPU's cache, and below 1 GB on a GPU


def words(c0: Tensor, c1: Any, c2: Tensor, c3: Any, key: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the four words of Philox4x32-10, each int64 in 0..2^32-1, of the shape that the words of the counter have together.

    ``c0`` ... ``c3``: the words of the counter, int64 in 0..2^32-1, of shapes that broadcast; c1 and c3 may be Python's. ``key``: in
    0..2^64-1. A product wraps in int64 but keeps its 64 bits. A word whose upper bits are not zero is only xored, and masked later.
    """
    k0, k1 = key & MASK, key >> 32
    for _ in range(ROUNDS):
        p0, p2 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = ((p2 >> 32) ^ c1 ^ k0) & MASK, p2, ((p0 >> 32) ^ c3 ^ k1) & MASK, p0
        k0, k1 = (k0 + WEYL[0]) & MASK, (k1 + WEYL[1]) & MASK
    return c0, c1 & MASK, c2, c3 & MASK


def normal(index: Tensor, size: int, draw: int, key: int) -> Tensor:
    """Return ``size`` standard normal numbers for each index, float32 [n, size], on the device of ``index``, int64 [n].

    Box-Muller: words (a, b) give sqrt(-2 log u) (cos v, sin v) with u = (a + 1/2) / 2^32 and v = 2 pi b / 2^32, so that no number exceeds
    6.8. ``draw``: in 0..2^32-1; another one gives independent numbers.
    """
    position = torch.arange(-(-size // 4), device=index.device)
    rows = max(1, BLOCK[index.device.type] // len(position))
    return torch.cat([_normal(part, position, draw, key)[:, :size] for part in index.split(rows)])


def _normal(index: Tensor, position: Tensor, draw: int, key: int) -> Tensor:
    a, b, c, d = words(position, draw, (index & MASK)[:, None], (index >> 32)[:, None], key)
    quarters = []
    for radius, angle in ((a, b), (c, d)):
        r = radius.double().add_(0.5).mul_(2.0**-32).log_().mul_(-2).sqrt_()
        v = angle.double().mul_(2 * math.pi * 2.0**-32)
        quarters += [(r * v.cos()).float(), (r * v.sin()).float()]
    return torch.stack(quarters, 1).flatten(1)


def integers(index: Tensor, high: int, draw: int, key: int) -> Tensor:
    """Return an integer in 0..high-1 for each index, int64 [n], on the device of ``index``. ``high``: at most 2^31.

    It is floor(high w / 2^64) for 64 random bits w. The probabilities differ from 1 / high by at most 2^-64 each.
    """
    upper, lower, _, _ = words(torch.zeros_like(index), draw, index & MASK, index >> 32, key)
    return (upper * high + (lower * high >> 32)) >> 32
