"""MeanFlow (Geng et al. 2505.13447): a flow map whose mean rate fulfils its differential equation along the path.

For every s, with the derivative d/dt taken along the path (dx/dt = v),

    u(x, t, s) = v - (t - s) du/dt

u is regressed on the right-hand side, which is computed from u itself without gradient. Align Your Flow (2506.14603) distils a
teacher with the same identity: its tangent g = u - v + r (t - s) du/dt is normalised, and r rises at the start of the run.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from distill.consistency import same_dropout
from distill.denoiser import DenoiserLike
from distill.jumps import FLOW, Jumps, SortedTimes, mean_rate, normalised, rate
from distill.rng import Rng
from distill.schedule import add_noise, expand
from distill.scm import tangent, unwrapped
from distill.target import Target


@dataclass(frozen=True)
class MeanFlow:
    """Return the loss |u - sg(u_target)|^2 / sg(|u - u_target|^2 per pixel + c)^power, [B].

    ``target``: the data sample or a teacher's x0, from which the rate v follows. ``jumps``: where t and s are drawn; wide enough to
    reach t = 1, where sampling starts. ``apart``: part of the samples with s < t. ``power``: 1 in the paper, for targets from data.
    On a teacher's targets use 0: samples with s = t have no error there and would get all of the weight. ``normalised``: the tangent
    u - u_target of each sample goes through `distill.jumps.normalised`; ``power`` then means nothing. ``warmup``: part of the run over
    which the weight r of du/dt rises from 0 to 1. ``jvp``, ``step``: as in `ContinuousConsistency`.
    """

    target: Target
    jumps: Jumps = field(default_factory=SortedTimes)
    apart: float = 0.75
    power: float = 1.0
    c: float = 1e-3
    normalised: bool = False
    warmup: float = 0.0
    jvp: str = "exact"
    step: float = 2e-4

    def __call__(self, student: DenoiserLike, x0: Tensor, *, rng: Rng, progress: float, **cond: Any) -> Tensor:
        t, s = self.jumps(rng)
        s = torch.where(rng.uniform() < self.apart, s, t)
        x = add_noise(FLOW, x0, rng.normal(x0), t)
        r = 1.0 if self.warmup == 0 else min(1.0, progress / self.warmup)
        with torch.no_grad():
            v = rate(x, self.target(FLOW, x, t, x0, **cond), t)
            with same_dropout(x0.device):
                u, du = tangent(mean_rate(unwrapped(student), s, cond), x, t, v, self.jvp, self.step, FLOW.t_max)
            u_target = v - r * expand(t - s, x) * du
            if self.normalised:
                u_target = u - normalised(u - u_target, t)
        error = (mean_rate(student, s, cond)(x, t) - u_target).square().flatten(1).mean(1)
        return error if self.normalised else error / (error.detach() + self.c) ** self.power
