"""Which cells generate the same images: many samplers coincide at few steps, such as DDIM and UniPC with two."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distill.schedule import Schedule, prior_std
from eval.cells import Cell


@dataclass(frozen=True)
class _StandIn:
    """Evaluate a cheap denoiser. ``seen`` hashes every call, so that equal hashes mean equal arithmetic of a sampler."""

    schedule: Schedule
    seen: Any  # of hashlib

    def __call__(self, x_t: Tensor, t: Tensor, to: Tensor | None = None, **cond: Any) -> Tensor:
        self.seen.update(repr((float(t), None if to is None else float(to))).encode() + x_t.numpy().tobytes())
        scale = 1 / (1 + float(self.schedule.sigma(t)))
        return torch.sin(3 * scale * x_t + scale)


def arithmetic(cell: Cell) -> str:
    """Return the sha256 of what a cell computes. Cells of equal hashes generate the same images, bit for bit.

    The hash covers the model, as the object that it is, and all that the sampler makes of a stand-in for its network: many samplers
    coincide at few steps.
    """
    seen = hashlib.sha256(repr((id(cell.model), cell.guidance)).encode())
    schedule, times, rng = cell.schedule, cell.times, torch.Generator().manual_seed(0)
    start = prior_std(schedule, times[0]) * torch.randn(1, 16, generator=rng)
    out = cell.sampling.run(_StandIn(schedule, seen), start, times, lambda x: torch.randn(x.shape, generator=rng))
    seen.update(out.numpy().tobytes())
    return seen.hexdigest()
