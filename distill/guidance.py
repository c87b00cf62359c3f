"""Guided distillation (Meng et al. 2210.03142): a student takes the guidance scale w as a condition, ``guidance`` [B].

    w ~ U[low, high], one per sample          x0_hat = D(x, null) + w (D(x, c) - D(x, null))          student(x_t, t, c, w)

The target is `distill.denoiser.Guided` with the scale of each sample. The student then needs one call where the guided teacher needs two.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from distill.denoiser import DenoiserLike
from distill.device import send
from distill.rng import Rng
from distill.schedule import Schedule

if TYPE_CHECKING:
    from distill.train import Method


@dataclass(frozen=True)
class GuidanceRange:
    """Hold the guidance scales that a network is trained for, low to high.

    ``chosen``: the scale of a call that names none; None for the one nearest to 1, no guidance.

    Raises ValueError for a range that is empty, reversed or not finite, and for a chosen scale that is not finite.
    """

    low: float
    high: float
    chosen: float | None = None

    def __post_init__(self):
        if not (0 <= self.low < self.high < math.inf):
            raise ValueError(
                f"guidance range {self.low:g} to {self.high:g}: accepted are two numbers, 0 or more, the second above the first"
            )
        if self.chosen is not None and not 0 <= self.chosen < math.inf:
            raise ValueError(f"guidance scale {self.chosen:g}: accepted are finite numbers, 0 or more")

    @classmethod
    def of(cls, numbers: Sequence[float]) -> GuidanceRange:
        """Read (low, high) or (low, high, chosen), as `describe` gives them. Raises ValueError for another count."""
        if not 2 <= len(numbers) <= 3:
            raise ValueError(f"guidance range of {len(numbers)} numbers: accepted are two, the lowest and the highest scale")
        return cls(*map(float, numbers))

    def describe(self) -> list[float]:
        """Return the range as JSON data."""
        return [float(number) for number in (self.low, self.high, self.chosen) if number is not None]

    @property
    def scale(self) -> float:
        """The scale of a call that names none."""
        return min(max(1.0, self.low), self.high) if self.chosen is None else self.chosen

    def __contains__(self, scale: float) -> bool:
        return self.low <= scale <= self.high

    def __str__(self) -> str:
        return f"{self.low:g} to {self.high:g}"

    def draw(self, rng: Rng) -> Tensor:
        """Draw w [B] uniformly."""
        return self.low + (self.high - self.low) * rng.uniform()


@dataclass(frozen=True)
class OverRange:
    """Train a method over a range of scales: w ~ U[low, high] for each sample, in the conditions of the student and of its target.

    w is drawn first, from the random numbers of the step, so that it does not depend on the number of processes.
    """

    method: Method
    over: GuidanceRange

    @property
    def averaged(self) -> bool:
        return getattr(self.method, "averaged", False)

    def __call__(self, student: Any, x0: Tensor, *, rng: Rng, progress: float, **cond: Any) -> Tensor:
        scales = {"guidance": send(self.over.draw(rng), x0.device)}
        return self.method(student, x0, rng=rng, progress=progress, **cond | scales)


@dataclass(frozen=True)
class AtScale:
    """Call a denoiser that takes the guidance scale with one scale for all samples."""

    denoiser: DenoiserLike
    scale: float

    @property
    def schedule(self) -> Schedule:
        return self.denoiser.schedule

    def __call__(self, x_t: Tensor, t: Tensor, to: Tensor | None = None, **cond: Any) -> Tensor:
        return self.denoiser(x_t, t, to=to, **cond | {"guidance": x_t.new_full(x_t.shape[:1], self.scale)})
