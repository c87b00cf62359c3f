"""MeanFlow (Geng et al. 2505.13447): a two-time student whose output is right for the whole jump from t to s, not at t alone.

On the straight path x = (1 - t) x0 + t eps with rate v = eps - x0, the mean rate u between s and t satisfies, for every s,

    u(x, t, s) = v - (t - s) du/dt along the path          x_s = x - (t - s) u(x, t, s)

u is regressed on the right-hand side, which is computed from u itself without gradient. The student is called as
``student(x, t, to=s)`` and returns the x0 whose `move` makes that jump. With s = t it is an ordinary denoiser, with s = 0 a
consistency function.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distill.consistency import same_dropout
from distill.denoiser import DenoiserLike, on_schedule, to_output
from distill.rng import Rng
from distill.schedule import Flow, add_noise, expand
from distill.scm import tangent, unwrapped
from distill.target import Target

FLOW = Flow()


@dataclass(frozen=True)
class MeanFlow:
    """Return the loss |u - sg(u_target)|^2 / sg(|u - u_target|^2 per pixel + c)^power, [B].

    ``target``: the data sample or a teacher's x0, from which the rate v follows. ``mean``, ``deviation``: of the logits of the two
    times, which are then sorted; wide enough to reach t = 1, where sampling starts. ``apart``: part of the samples with s < t.
    ``power``: 1 in the paper, for targets from data. On a teacher's targets use 0: samples with s = t have no error there and would
    get all of the weight. ``jvp``, ``step``: as in `ContinuousConsistency`.
    """

    target: Target
    mean: float = 0.0
    deviation: float = 1.5
    apart: float = 0.75
    power: float = 1.0
    c: float = 1e-3
    jvp: str = "exact"
    step: float = 2e-4

    def __call__(self, student: DenoiserLike, x0: Tensor, *, rng: Rng, progress: float, **cond: Any) -> Tensor:
        first, second = (torch.sigmoid(self.mean + self.deviation * rng.normal()) for _ in range(2))
        t = torch.maximum(first, second)
        s = torch.where(rng.uniform() < self.apart, torch.minimum(first, second), t)
        x = add_noise(FLOW, x0, rng.normal(x0), t)
        with torch.no_grad():
            v = rate(x, self.target(FLOW, x, t, x0, **cond), t)
            with same_dropout(x0.device):
                _, du = tangent(mean_rate(unwrapped(student), s, cond), x, t, v, self.jvp, self.step, FLOW.t_max)
            u_target = v - expand(t - s, x) * du
        error = (mean_rate(student, s, cond)(x, t) - u_target).square().flatten(1).mean(1)
        return error / (error.detach() + self.c) ** self.power


def rate(x: Tensor, x0: Tensor, t: Tensor) -> Tensor:
    """Return dx/dt = eps - x0 of the straight path through x that ends at x0. It is the output of a flow network."""
    return to_output("flow", FLOW, x, x0, t)


def mean_rate(student: DenoiserLike, s: Tensor, cond: dict) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the function (x, t) -> u(x, t, s)."""
    inner = on_schedule(student, FLOW)
    return lambda x, t: rate(x, inner(x, t, to=s, **cond), t)
