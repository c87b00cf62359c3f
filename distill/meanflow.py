"""MeanFlow (Geng et al. 2025): a student of two times, whose answer is right for the whole jump from t to s, not at t alone.

On the straight path x = (1 - t) x0 + t eps with rate v = eps - x0 the mean rate u from s to t obeys, for every s,

    u(x, t, s) = v - (t - s) du/dt along the path          x_s = x - (t - s) u(x, t, s)

so u is regressed on the right-hand side, taken of itself without gradient. A student is asked as ``student(x, t, to=s)`` and
answers with the x0 for which `move` makes that jump; with s = t it is an ordinary denoiser, with s = 0 a consistency function.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distill.consistency import same_dropout
from distill.denoiser import DenoiserLike, ask_in, to_output
from distill.rng import Rng
from distill.schedule import Flow, add_noise, expand
from distill.scm import bare, tangent
from distill.target import Target

FLOW = Flow()


@dataclass(frozen=True)
class MeanFlow:
    """|u - sg(u_target)|^2 / sg(|u - u_target|^2 a pixel + c)^power, with the datum's rate or a teacher's in the target.

    ``mean``, ``deviation``: of the logit of both times (their order is put right), wide enough for t = 1, where sampling starts;
    ``apart``: part of the samples in which they differ. ``power``: 1 in the paper, for targets of data. On a teacher's, where s = t
    has no error at all, it would give all weight to those: 0. ``jvp``: "exact" (forward mode) or "finite", over ``step``.
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
        one, two = (torch.sigmoid(self.mean + self.deviation * rng.normal(x0.flatten(1)[:, 0].float())) for _ in range(2))
        t = torch.maximum(one, two)
        s = torch.where(rng.uniform() < self.apart, torch.minimum(one, two), t)
        x = add_noise(FLOW, x0, rng.normal(x0), t)
        with torch.no_grad():
            v = rate(x, self.target(FLOW, x, t, x0, **cond), t)
            with same_dropout(x0.device):
                _, du = tangent(mean_rate(bare(student), s, cond), x, t, v, self.jvp, self.step, FLOW.t_max)
            u_target = v - expand(t - s, x) * du
        error = (mean_rate(student, s, cond)(x, t) - u_target).square().flatten(1).mean(1)
        return error / (error.detach() + self.c) ** self.power


def rate(x: Tensor, x0: Tensor, t: Tensor) -> Tensor:
    """dx/dt = eps - x0 of the straight path through x that ends at x0: the output of a flow network."""
    return to_output("flow", FLOW, x, x0, t)


def mean_rate(student: DenoiserLike, s: Tensor, cond: dict) -> Callable[[Tensor, Tensor], Tensor]:
    """(x, t) -> u(x, t, s)."""
    inner = ask_in(student, FLOW)
    return lambda x, t: rate(x, inner(x, t, to=s, **cond), t)
