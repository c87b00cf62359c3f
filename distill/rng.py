"""Random numbers of training: functions of (seed, stage, step, sample), so that a run continues exactly and does not depend
on how many processes share a batch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor


def seed_of(*parts: int | str) -> int:
    """A 63-bit seed from any parts, the same on every machine."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


@dataclass(frozen=True)
class Rng:
    """Draws for ``rows`` (None: all) of a batch of ``total`` samples, on the device of the generator. Every draw is made for the
    whole batch and cut to the rows, so one process with a batch of 2 B and two with B each see the same numbers."""

    generator: torch.Generator
    total: int
    rows: slice | None = None

    def _cut(self, draw: Callable[..., Tensor], *shape: int) -> Tensor:
        draws = draw((self.total, *shape), generator=self.generator, device=self.generator.device)
        return draws if self.rows is None else draws[self.rows]

    def normal(self, x: Tensor) -> Tensor:
        """Standard normal numbers of the shape and type of x [B, ...]."""
        return self._cut(torch.randn, *x.shape[1:]).to(x)

    def uniform(self) -> Tensor:
        """Numbers in [0, 1), one a sample: float32 [B]."""
        return self._cut(torch.rand)

    def integers(self, high: int) -> Tensor:
        """Integers in 0..high-1, one a sample: int64 [B]."""
        return self._cut(partial(torch.randint, high))
