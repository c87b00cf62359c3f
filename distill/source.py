"""Paths that start from images instead of noise: a coupling of two image distributions.

    x_t = (1 - t) x0 + t x1        x0 of the data, x1 of the source, on the schedule `Flow`
    x1 independent of x0                                 IADB (Heitz et al. 2305.03486)
    x1 = enlarge(box(x0)) + std eps, eps ~ N(0, I)       InDI (Delbracio & Milanfar 2303.11435), with the box filter as degradation

The contract stays E[x0 | x_t], and with it E[x1 | x_t] = (x_t - (1 - t) E[x0 | x_t]) / t. One DDIM step is then the step of both papers,
x_s = x_t + (t - s) (E[x0 | x_t] - E[x1 | x_t]), and every deterministic solver integrates the same ODE. What is Gaussian does not hold:
samplers that draw noise, the score, and bounds of the likelihood.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from distill.rng import Rng

if TYPE_CHECKING:
    from distill.train import Method


def low_resolution(x: Tensor, factor: int) -> Tensor:
    """Return images [B, C, H, W] as means of ``factor`` x ``factor`` boxes, of the same size: a projection.

    Raises ValueError where the factor does not divide height and width.
    """
    if x.shape[-2] % factor or x.shape[-1] % factor:
        raise ValueError(f"lowres={factor} of images {tuple(x.shape[1:])}: accepted are divisors of height and width")
    return avg_pool2d(x, factor).repeat_interleave(factor, -2).repeat_interleave(factor, -1)


@dataclass(frozen=True)
class Source:
    """Hold where paths start.

    ``take``: (rows [B] on the CPU, device) -> images in [-1, 1], float32 [B, ...], of ``count`` rows. ``facts``: what a model's file says
    of it, JSON data. ``lowres``: x1 is the image itself, at a resolution lower by this factor, plus noise of standard deviation ``std``;
    None for x1 that is an image of the source, independent of x0.
    """

    take: Callable[[Tensor, torch.device], Tensor]
    count: int
    facts: dict[str, Any]
    lowres: int | None = None
    std: float = 0.0

    def __str__(self) -> str:
        name = str(self.facts["data"])[:80]
        return name if self.lowres is None else f"{name} at 1/{self.lowres} of the resolution"

    def of(self, x0: Tensor, rng: Rng) -> Tensor:
        """Return the x1 of a training batch x0 [B, ...], a function of x0 and of the random numbers of the step."""
        if self.lowres is None:
            return self.take(rng.integers(self.count).cpu(), x0.device)
        return self._degraded(x0, rng.normal(x0))

    def start(self, rows: Tensor, noise: Tensor) -> Tensor:
        """Return the x1 [B, ...] that samples start from: of rows [B], with ``noise`` [B, ...] of unit variance."""
        x = self.take(rows, noise.device)
        return x if self.lowres is None else self._degraded(x, noise)

    def _degraded(self, x: Tensor, noise: Tensor) -> Tensor:
        return low_resolution(x, self.lowres or 1) + self.std * noise


@dataclass(frozen=True)
class Coupled:
    """Train a method on paths from a source: x1 takes the place of new noise, as the condition ``noise`` of the method.

    x1 is drawn first, from the random numbers of the step, so that it depends neither on the number of processes nor on a pause.
    """

    method: Method
    source: Source

    @property
    def averaged(self) -> bool:
        return getattr(self.method, "averaged", False)

    def __call__(self, student: Any, x0: Tensor, *, rng: Rng, progress: float, **cond: Any) -> Tensor:
        return self.method(student, x0, rng=rng, progress=progress, noise=self.source.of(x0, rng), **cond)
