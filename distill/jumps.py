"""What the flow-map methods share. A flow map jumps along the probability-flow path from t to any s in one call.

On the straight path x_t = (1 - t) x0 + t eps, with rate v = eps - x0, a student gives the mean rate u of a jump:

    x_s = x_t - (t - s) u(x_t, t, s)          u(x_t, t, t) = v = eps - E[x0 | x_t]

It is called as ``student(x, t, to=s)`` and returns the x0 whose `move` makes that jump. With s = t it is an ordinary denoiser, with
s = 0 a consistency function. Students on any other schedule are evaluated through `on_schedule`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from distill.denoiser import DenoiserLike, on_schedule, to_output
from distill.rng import Rng
from distill.schedule import Flow, add_noise, expand

FLOW = Flow()


class Jumps(Protocol):
    """Draw the two times of a jump on `FLOW`, (t, s), both [B], s <= t."""

    def __call__(self, rng: Rng) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class SortedTimes:
    """Draw two times whose logits are N(mean, deviation^2), and sort them (MeanFlow 2505.13447)."""

    mean: float = 0.0
    deviation: float = 1.5

    def __call__(self, rng: Rng) -> tuple[Tensor, Tensor]:
        first, second = (torch.sigmoid(self.mean + self.deviation * rng.normal()) for _ in range(2))
        return torch.maximum(first, second), torch.minimum(first, second)


@dataclass(frozen=True)
class GapFirst:
    """Draw the length d of the jump, sigmoid(N(mean, deviation^2)), then s uniformly in [0, 1 - d], and t = s + d (AYF 2506.14603).

    ``from_noise``: part of the jumps that begin at t = 1 instead, where sampling begins, with s = 1 - d. ``to_data``: part that end at
    s = 0, where sampling ends, with t = d.
    """

    mean: float = -0.8
    deviation: float = 1.0
    from_noise: float = 0.0
    to_data: float = 0.0

    def __post_init__(self):
        if not (self.deviation > 0 and min(self.from_noise, self.to_data) >= 0 and self.from_noise + self.to_data <= 1):
            raise ValueError(
                f"a deviation of {self.deviation:g} and parts of {self.from_noise:g} and {self.to_data:g}: accepted are a deviation "
                "above 0, and parts of at least 0 that sum to at most 1"
            )

    def __call__(self, rng: Rng) -> tuple[Tensor, Tensor]:
        gap = torch.sigmoid(self.mean + self.deviation * rng.normal())
        which, between = rng.uniform(), rng.uniform()
        s = (1 - gap) * torch.where(which < self.from_noise, 1.0, torch.where(which >= 1 - self.to_data, 0.0, between))
        return s + gap, s


def rate(x: Tensor, x0: Tensor, t: Tensor) -> Tensor:
    """Return dx/dt = eps - x0 of the straight path through x that ends at x0. It is the output of a flow network."""
    return to_output("flow", FLOW, x, x0, t)


def mean_rate(student: DenoiserLike, s: Tensor, cond: dict[str, Any]) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the function (x, t) -> u(x, t, s)."""
    inner = on_schedule(student, FLOW)
    return lambda x, t: rate(x, inner(x, t, to=s, **cond), t)


def normalised(g: Tensor, t: Tensor) -> Tensor:
    """Return c g [B, ...] with each sample divided by its root mean square + 0.1 (AYF 2506.14603); c = alpha / |(alpha, sigma)| at t.

    c is the cosine of sCM's time, which weighs its tangent too (2410.11081). It is 0 at pure noise, where nothing damps errors.
    """
    alpha, sigma = FLOW.at(t)
    g = expand(alpha / torch.hypot(alpha, sigma), g) * g
    return g / expand(g.flatten(1).square().mean(1).sqrt() + 0.1, g)


def jump_to(x: Tensor, u: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """Return x_s = x - (t - s) u."""
    return x - expand(t - s, x) * u


def beginning(student: DenoiserLike, x0: Tensor, t: Tensor, rng: Rng, data_free: bool, cond: dict[str, Any]) -> Tensor:
    """Return x_t, where a jump of a training step begins: the data sample with noise, or where the student's jump from noise ends.

    The second, with ``data_free``, takes only the shape from x0 [B, ...] and costs one network call without gradient.
    """
    noise = rng.normal(x0)
    if not data_free:
        return add_noise(FLOW, x0, noise, t)
    start = torch.ones_like(t)
    with torch.no_grad():
        return jump_to(noise, mean_rate(student, t, cond)(noise, start), start, t)
