"""Random numbers of training, as functions of (seed, phase, step, sample).

A killed run therefore continues exactly, and the draws do not depend on how many processes share a batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor


def seed_of(*parts: int | str) -> int:
    """Return a 63-bit seed computed from ``parts``, the same on every machine."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


@dataclass(frozen=True)
class Rng:
    """Draw random numbers for ``rows`` (None: all) of a batch of ``total`` samples, on the device of the generator.

    Every draw is made for the whole batch and cut to the rows. One process with a batch of 2 B and two processes with B each
    therefore see the same numbers.
    """

    generator: torch.Generator
    total: int
    rows: slice | None = None

    def _cut(self, draw: Callable[..., Tensor], *shape: int) -> Tensor:
        draws = draw((self.total, *shape), generator=self.generator, device=self.generator.device)
        return draws if self.rows is None else draws[self.rows]

    def normal(self, like: Tensor | None = None) -> Tensor:
        """Return standard normal numbers: of the shape and dtype of ``like`` [B, ...], or one per sample, float32 [B]."""
        return self._cut(torch.randn) if like is None else self._cut(torch.randn, *like.shape[1:]).to(like)

    def uniform(self) -> Tensor:
        """Return numbers in [0, 1), one per sample: float32 [B]."""
        return self._cut(torch.rand)

    def integers(self, high: int) -> Tensor:
        """Return integers in 0..high-1, one per sample: int64 [B]."""
        return self._cut(partial(torch.randint, high))
