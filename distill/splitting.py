"""Flow maps from jumps that are split in two, without a derivative.

The jump from t to s is the jump from t to m, and from there to s:

    (t - s) u(x, t, s) = (t - m) u(x, t, m) + (m - s) u(x_m, m, s)          x_m = x - (t - m) u(x, t, m)

alpha-Flow (2510.20771) makes the first part with the target's rate v, m = alpha s + (1 - alpha) t. With alpha = 1 it is flow matching,
with 1/2 the shortcut model, and its limit for alpha -> 0 is MeanFlow. PSD (2505.18825) makes both parts with the student itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from distill.consistency import same_dropout
from distill.denoiser import DenoiserLike
from distill.jumps import FLOW, GapFirst, Jumps, beginning, jump_to, mean_rate, normalised, rate
from distill.rng import Rng
from distill.schedule import add_noise, expand, per_sample
from distill.scm import unwrapped
from distill.target import Target


def falling(first: float = 0.05, last: float = 0.7, lowest: float = 0.02) -> Callable[[float], float]:
    """Return alpha as a function of progress: it falls geometrically from 1 at ``first`` to ``lowest`` at ``last``, and stays there."""
    return lambda progress: lowest ** min(1.0, max(0.0, (progress - first) / (last - first)))


def fixed(alpha: float) -> Callable[[float], float]:
    """Return a constant alpha."""
    return lambda progress: alpha


@dataclass(frozen=True)
class AlphaFlow:
    """Return the loss |u(x, t, s) - sg(alpha v + (1 - alpha) u(x_m, m, s))|^2 / alpha per pixel, [B].

    ``target``: the data sample or a teacher's x0, from which v follows. ``alpha``: progress -> alpha in (0, 1]. ``jumps``: where t and s
    are drawn. ``apart``: part of the samples with s < t. ``normalised``: (u - target) / alpha of each sample, whose limit is the tangent
    of `MeanFlow`, goes through `distill.jumps.normalised` before it is squared. Small values of alpha are unstable without it, and the
    paper bounds the same term with its adaptive weight.
    """

    target: Target
    alpha: Callable[[float], float] = field(default_factory=falling)
    jumps: Jumps = field(default_factory=GapFirst)
    apart: float = 0.75
    normalised: bool = False

    def __call__(self, student: DenoiserLike, x0: Tensor, *, rng: Rng, progress: float, **cond: Any) -> Tensor:
        alpha = self.alpha(progress)
        t, s = self.jumps(rng)
        s = torch.where(rng.uniform() < self.apart, s, t)
        x = add_noise(FLOW, x0, rng.normal(x0), t)
        with torch.no_grad():
            u_target = v = rate(x, self.target(FLOW, x, t, x0, **cond), t)
            if alpha < 1:
                m = t - alpha * (t - s)
                with same_dropout(x0.device):
                    rest = mean_rate(unwrapped(student), s, cond)(jump_to(x, v, t, m), m)
                u_target = alpha * v + (1 - alpha) * rest
        u = mean_rate(student, s, cond)(x, t)
        if self.normalised:
            u_target, alpha = u.detach() - normalised((u.detach() - u_target) / alpha, t), 1.0
        return (u - u_target).square().flatten(1).mean(1) / alpha


@dataclass(frozen=True)
class SelfSplitting:
    """Return the loss |u(x, t, s) - sg((1 - w) u(x, t, m) + w u(x_m, m, s))|^2 per pixel, [B], with m = s + w (t - s), w uniform.

    Samples with s = t, all but the part ``apart``, are regressed on the target's rate v instead. ``target``, ``jumps``: as in
    `AlphaFlow`. ``data_free``: as in `distill.landing.Landing`.
    """

    target: Target
    jumps: Jumps = field(default_factory=GapFirst)
    apart: float = 0.5
    data_free: bool = False

    def __call__(self, student: DenoiserLike, x0: Tensor, *, rng: Rng, progress: float, **cond: Any) -> Tensor:
        t, s = self.jumps(rng)
        split = rng.uniform() < self.apart
        s, w = torch.where(split, s, t), rng.uniform()
        m = s + w * (t - s)
        plain = unwrapped(student)
        x = beginning(plain, x0, t, rng, self.data_free, cond)
        with torch.no_grad():
            v = rate(x, self.target(FLOW, x, t, x0, **cond), t)
            with same_dropout(x0.device):
                first = mean_rate(plain, m, cond)(x, t)
            with same_dropout(x0.device):
                second = mean_rate(plain, s, cond)(jump_to(x, first, t, m), m)
            both = first + expand(w, x) * (second - first)
            u_target = torch.where(per_sample(split, x), both, v)
        return (mean_rate(student, s, cond)(x, t) - u_target).square().flatten(1).mean(1)
