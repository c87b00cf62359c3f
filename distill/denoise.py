"""Regression on E[x0 | x_t]: from data this is diffusion training, from a teacher it is denoiser distillation.

Both have the same minimiser; the teacher's target lacks the variance of x0 given x_t. The student may be of any architecture,
schedule and prediction, which makes this the warm start for every other method.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from distill.denoiser import DenoiserLike
from distill.distance import DISTANCES, WEIGHTS
from distill.rng import Rng
from distill.schedule import Schedule, add_noise
from distill.target import Datum, Target


def uniform(schedule: Schedule, x0: Tensor, rng: Rng) -> Tensor:
    """t [B], uniform in [t_min, t_max]."""
    return schedule.t_min + (schedule.t_max - schedule.t_min) * rng.uniform()


def lognormal(schedule: Schedule, x0: Tensor, rng: Rng) -> Tensor:
    """t [B] at which ln(sigma / alpha) ~ N(-1.2, 1.2^2) (Karras et al. 2022, Table 1), as far as the schedule goes."""
    level = -1.2 + 1.2 * rng.normal(x0.flatten(1)[:, 0])
    return schedule.time(-2 * level).clamp(schedule.t_min, schedule.t_max)


# where training draws its times: name -> (schedule, x0, rng) -> t [B]
DRAWS: dict[str, Callable[[Schedule, Tensor, Rng], Tensor]] = {"uniform": uniform, "lognormal": lognormal}


@dataclass(frozen=True)
class Denoise:
    """w(t) d(student(x_t, t), x0_hat), t from ``times``, a row of `DRAWS`; x0_hat is the datum, a teacher's E[x0 | x_t] or between."""

    target: Target = field(default_factory=Datum)
    weight: str = "snr_plus_one"
    distance: str = "l2"
    times: str = "uniform"

    def __call__(self, student: DenoiserLike, x0: Tensor, *, rng: Rng, progress: float, **cond: Any) -> Tensor:
        schedule = student.schedule
        t = DRAWS[self.times](schedule, x0, rng)
        x_t = add_noise(schedule, x0, rng.normal(x0), t)
        x0_hat = self.target(schedule, x_t, t, x0, **cond)
        return WEIGHTS[self.weight](schedule, t) * DISTANCES[self.distance](student(x_t, t, **cond), x0_hat)
