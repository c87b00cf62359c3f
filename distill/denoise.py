"""Regression on E[x0 | x_t]: from data this is diffusion training, from a teacher it is denoiser distillation.

Both have the same minimiser; the teacher's target lacks the variance of x0 given x_t. The student may be of any architecture,
schedule and prediction, which makes this the warm start for every other method.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distill.denoiser import DenoiserLike
from distill.distance import DISTANCES, WEIGHTS
from distill.rng import Rng
from distill.schedule import add_noise


@dataclass(frozen=True)
class Denoise:
    """w(t) d(student(x_t, t), target), t uniform in [t_min, t_max]; the target is the datum, or teacher(x_t, t)."""

    teacher: DenoiserLike | None = None
    weight: str = "snr_plus_one"
    distance: str = "l2"

    def __call__(self, student: DenoiserLike, x0: Tensor, *, rng: Rng, progress: float, **cond: Any) -> Tensor:
        schedule = student.schedule
        t = schedule.t_min + (schedule.t_max - schedule.t_min) * rng.uniform()
        x_t = add_noise(schedule, x0, rng.normal(x0), t)
        target = x0
        if self.teacher is not None:
            with torch.no_grad():
                target = self.teacher(x_t, t, **cond)
        return WEIGHTS[self.weight](schedule, t) * DISTANCES[self.distance](student(x_t, t, **cond), target)
