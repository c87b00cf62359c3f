"""Progressive distillation (Salimans & Ho 2202.00512, Alg. 2): one student step learns to do two teacher steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distill.denoiser import DenoiserLike
from distill.distance import Distance, Weight, l2, truncated_snr
from distill.rng import Rng
from distill.schedule import add_noise, expand, explain, move


@dataclass(frozen=True)
class Progressive:
    """Return the loss of one stage, w(t) d(student(x_t, t), x0 of two teacher steps), [B].

    ``times``: the teacher's grid, float64 [2N + 1] from noise to data. The student's grid is every other entry. ``weight`` and
    ``distance``: w and d, in x0.

    In the last student step s is the data. `move` and `explain` then return the teacher's own x0 at mid, so training and sampling
    agree there without a special case.
    """

    teacher: DenoiserLike
    times: Tensor
    weight: Weight = truncated_snr
    distance: Distance = l2

    def __call__(self, student: DenoiserLike, x0: Tensor, *, rng: Rng, progress: float, **cond: Any) -> Tensor:
        schedule = self.teacher.schedule
        i = 2 * rng.integers((len(self.times) - 1) // 2)
        times = self.times.to(i.device)
        t, mid, s = times[i], times[i + 1], times[i + 2]
        x_t = add_noise(schedule, x0, rng.normal(x0), t)
        with torch.no_grad():
            target = two_steps_in_one(self.teacher, x_t, t, mid, s, **cond)
        distance = self.distance(student(x_t, t, **cond), target)
        return expand(self.weight(schedule, t), distance) * distance


def two_steps_in_one(teacher: DenoiserLike, x_t: Tensor, t: Tensor, mid: Tensor, s: Tensor, **cond: Any) -> Tensor:
    """Return the x0 [B, ...] whose single `move` from t to s ends where the teacher's two moves over mid end."""
    schedule = teacher.schedule
    x_mid = move(schedule, x_t, teacher(x_t, t, **cond), t, mid)
    x_s = move(schedule, x_mid, teacher(x_mid, mid, **cond), mid, s)
    return explain(schedule, x_t, x_s, t, s)
