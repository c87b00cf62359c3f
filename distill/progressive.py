"""Progressive distillation (Salimans & Ho 2022, Alg. 2): one student step learns to do two teacher steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distill.denoiser import DenoiserLike
from distill.distance import DISTANCES, WEIGHTS
from distill.rng import Rng
from distill.schedule import add_noise, explain, move


@dataclass(frozen=True)
class Progressive:
    """The loss of one stage. ``times`` is the teacher's grid, 2N + 1 times from noise to data; the student's is every other.

    At the last student step s is the data, where move and explain hand back the teacher's own x0 at mid, so training and
    sampling agree there without a special case.
    """

    teacher: DenoiserLike
    times: Tensor
    weight: str = "truncated_snr"
    distance: str = "l2"

    def __call__(self, student: DenoiserLike, x0: Tensor, *, rng: Rng, progress: float, **cond: Any) -> Tensor:
        schedule = self.teacher.schedule
        times = self.times.to(x0.device)
        i = 2 * rng.integers((len(times) - 1) // 2)
        t, mid, s = times[i], times[i + 1], times[i + 2]
        x_t = add_noise(schedule, x0, rng.normal(x0), t)
        with torch.no_grad():
            target = two_steps_in_one(self.teacher, x_t, t, mid, s, **cond)
        return WEIGHTS[self.weight](schedule, t).to(x0) * DISTANCES[self.distance](student(x_t, t, **cond), target)


def two_steps_in_one(teacher: DenoiserLike, x_t: Tensor, t: Tensor, mid: Tensor, s: Tensor, **cond: Any) -> Tensor:
    """The x0 whose single move from t to s lands where the teacher's two moves over mid do; [B, ...]."""
    schedule = teacher.schedule
    x_mid = move(schedule, x_t, teacher(x_t, t, **cond), t, mid)
    x_s = move(schedule, x_mid, teacher(x_mid, mid, **cond), mid, s)
    return explain(schedule, x_t, x_s, t, s)
