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
    """Draw random numbers for ``rows`` (None: all) of a batch of ``total`` samples.

    ``generator``: of noise, on its device. ``scalars``: of numbers per sample, such as times; None: the same generator. `seeded` takes
    them from the CPU, because a schedule is evaluated there, see `distill.device`.

    Every draw is made for the whole batch and cut to the rows. One process with a batch of 2 B and two processes with B each
    therefore see the same numbers.
    """

    generator: torch.Generator
    total: int
    rows: slice | None = None
    scalars: torch.Generator | None = None

    @classmethod
    def seeded(cls, seed: int, device: torch.device, total: int, rows: slice | None = None) -> Rng:
        """Return the draws of a seed, with noise on ``device`` and numbers per sample on the CPU."""
        generator = torch.Generator(device).manual_seed(seed)
        return cls(generator, total, rows, generator if device.type == "cpu" else torch.Generator().manual_seed(seed))

    def _cut(self, draw: Callable[..., Tensor], *shape: int) -> Tensor:
        generator = self.generator if shape else self.scalars or self.generator
        draws = draw((self.total, *shape), generator=generator, device=generator.device)
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
