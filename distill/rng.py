"""Random numbers of training, as functions of (seed, phase, step, sample).

A killed run therefore continues exactly, and the draws do not depend on how many processes share a batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor

BLOCK = 256  # samples of a batch that share a generator


def seed_of(*parts: int | str) -> int:
    """Return a 63-bit seed computed from ``parts``, the same on every machine."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


@dataclass(frozen=True)
class Rng:
    """Draw random numbers for ``rows`` (None: all) of a batch of ``total`` samples.

    ``generator``: of noise, on its device. ``scalars``: of numbers per sample, such as times; None: the same generator. `seeded` takes
    them from the CPU, because a schedule is evaluated there, see `distill.device`.

    The batch is cut into blocks of `BLOCK` samples. The first block is drawn from these generators, and each later one from generators
    of its own seed, which is a function of theirs and of its number. Only blocks that the rows touch are drawn. One process with a
    batch of 2 B and two processes with B each therefore see the same numbers, and no process draws a large batch for a few rows.
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

    @cached_property
    def _blocks(self) -> list[_Block]:
        """The blocks that the rows touch."""
        start, stop = (0, self.total) if self.rows is None else (self.rows.start, self.rows.stop)
        blocks = []
        for first in range(start - start % BLOCK, stop, BLOCK):
            noise = _of_block(self.generator, first // BLOCK)
            other = None if self.scalars is self.generator else self.scalars
            scalars = noise if other is None else _of_block(other, first // BLOCK)
            last = min(first + BLOCK, self.total)
            blocks.append(_Block(noise, scalars, last - first, slice(max(start, first) - first, min(stop, last) - first)))
        return blocks

    def _cut(self, draw: Callable[..., Tensor], *shape: int) -> Tensor:
        parts = []
        for block in self._blocks:
            generator = block.noise if shape else block.scalars
            parts.append(draw((block.size, *shape), generator=generator, device=generator.device)[block.rows])
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def normal(self, like: Tensor | None = None) -> Tensor:
        """Return standard normal numbers: of the shape and dtype of ``like`` [B, ...], or one per sample, float32 [B]."""
        return self._cut(torch.randn) if like is None else self._cut(torch.randn, *like.shape[1:]).to(like)

    def uniform(self, like: Tensor | None = None) -> Tensor:
        """Return numbers in [0, 1): of the shape and dtype of ``like`` [B, ...], or one per sample, float32 [B]."""
        return self._cut(torch.rand) if like is None else self._cut(torch.rand, *like.shape[1:]).to(like)

    def integers(self, high: int) -> Tensor:
        """Return integers in 0..high-1, one per sample: int64 [B]."""
        return self._cut(partial(torch.randint, high))


@dataclass(frozen=True)
class _Block:
    """Hold the generators of ``size`` samples of a batch, and those ``rows`` of them that are needed."""

    noise: torch.Generator
    scalars: torch.Generator
    size: int
    rows: slice


def _of_block(first: torch.Generator, number: int) -> torch.Generator:
    """Return the generator of a block: that of the first block, or one of its own."""
    if number == 0:
        return first
    return torch.Generator(first.device).manual_seed(seed_of(first.initial_seed(), "block", number))
