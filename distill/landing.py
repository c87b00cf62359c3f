"""Landing-point distillation of a flow map, LMD (the predictor of FreeFlow 2511.19428; the terminal velocity of TVM 2511.19797).

A jump from t to s lands at f = x - (t - s) u(x, t, s). The landing point moves along the teacher's path as s changes:

    df/ds = v_T(f, s)          so that          u(x, t, s) = v_T(f, s) + (t - s) du/ds

The teacher is evaluated where the student lands. du/ds is a difference of two plain network calls without gradient: there is no
forward-mode pass. With jumps that begin at pure noise no data is needed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from distill.consistency import same_dropout
from distill.denoiser import DenoiserLike
from distill.jumps import FLOW, GapFirst, Jumps, beginning, jump_to, mean_rate, rate
from distill.rng import Rng
from distill.schedule import expand
from distill.scm import unwrapped
from distill.target import Target


@dataclass(frozen=True)
class Landing:
    """Return the loss |u(x, t, s) - sg(v_T(f, s) + (t - s) du/ds)|^2 per pixel, [B].

    ``target``: the teacher's x0 (`Mix` with weight 1), evaluated at f. ``jumps``: where t and s are drawn. ``apart``: part of the
    samples with s < t; the others learn the rate itself. ``step``: h of the central difference in s, shorter where it would leave [0, t].
    ``data_free``: jumps begin where the student's own jump from noise ends, instead of at noisy data.
    """

    target: Target
    jumps: Jumps = field(default_factory=GapFirst)
    apart: float = 0.75
    step: float = 0.02
    data_free: bool = False

    def __call__(self, student: DenoiserLike, x0: Tensor, *, rng: Rng, progress: float, **cond: Any) -> Tensor:
        t, s = self.jumps(rng)
        s = torch.where(rng.uniform() < self.apart, s, t)
        plain = unwrapped(student)
        x = beginning(plain, x0, t, rng, self.data_free, cond)
        with torch.no_grad():
            high, low = torch.minimum(s + self.step, t), (s - self.step).clamp(min=0)
            later, earlier = (_before(plain, end, x, t, cond) for end in (high, low))
            du = (later - earlier) / expand((high - low).clamp(min=1e-6), x)
        u = mean_rate(student, s, cond)(x, t)
        with torch.no_grad():
            f = jump_to(x, u, t, s)
            v = rate(f, self.target(FLOW, f, s.clamp(min=FLOW.t_min), x0, **cond), s.clamp(min=FLOW.t_min))
            target = v + expand(t - s, x) * du
        return (u - target).square().flatten(1).mean(1)


def _before(student: DenoiserLike, s: Tensor, x: Tensor, t: Tensor, cond: dict[str, Any]) -> Tensor:
    """Return u(x, t, s) with the dropout of the call that follows."""
    with same_dropout(x.device):
        return mean_rate(student, s, cond)(x, t)
