"""Regression on E[x0 | x_t]. On data this is diffusion training; on a teacher's output it is denoiser distillation.

Both have the same minimiser. The teacher's target lacks the variance of x0 given x_t. The student may have any architecture,
schedule and prediction type, so this is the warm start for every other method.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from distill.denoiser import DenoiserLike
from distill.distance import Distance, Weight, l2, snr_plus_one
from distill.noise_paths import PathSteps, steps_from_noise
from distill.rng import Rng
from distill.schedule import Schedule, add_noise, expand, move
from distill.self_conditioning import carrying, carrying_target, first_estimate
from distill.target import DataSample, Target

Draw = Callable[[Schedule, Rng], Tensor]  # where training draws its times: t [B]


def uniform(schedule: Schedule, rng: Rng) -> Tensor:
    """Draw t [B] uniformly in [t_min, t_max]."""
    return schedule.t_min + (schedule.t_max - schedule.t_min) * rng.uniform()


def lognormal(schedule: Schedule, rng: Rng) -> Tensor:
    """Draw t [B] with ln(sigma / alpha) ~ N(-1.2, 1.2^2) (Karras et al. 2206.00364, Table 1), clamped to [t_min, t_max]."""
    log_level = -1.2 + 1.2 * rng.normal()
    return schedule.time(-2 * log_level).clamp(schedule.t_min, schedule.t_max)


DRAWS: dict[str, Draw] = {"uniform": uniform, "lognormal": lognormal}


@dataclass(frozen=True)
class Regression:
    """Return w(t) d(student(x_t, t), x0_hat), [B].

    ``target``: x0_hat, the data sample, a teacher's E[x0 | x_t], or a mix. ``draw``: where t is drawn. ``weight`` and ``distance``:
    w and d, in x0. ``times``: instead, x_t is at these times, float64 [N + 1], on the target's own path from pure noise, and only the
    shape is taken from the data.

    A condition ``noise`` [B, ...] takes the place of new noise: pairs of noise and samples are a coupling, and the regression on them is
    reflow (Liu et al. 2209.03003).
    """

    target: Target = field(default_factory=DataSample)
    weight: Weight = snr_plus_one
    distance: Distance = l2
    draw: Draw = uniform
    times: Tensor | None = None

    def __call__(
        self, student: DenoiserLike, x0: Tensor, *, rng: Rng, progress: float, noise: Tensor | None = None, **cond: Any
    ) -> Tensor:
        schedule = student.schedule
        if self.times is None:
            t = self.draw(schedule, rng)
            x_t = add_noise(schedule, x0, rng.normal(x0) if noise is None else noise, t)
        else:
            at = self._from_noise(schedule, x0, rng, cond, noise)
            x_t, t, cond = at.x_t, at.t, at.cond
        previous = first_estimate(student, x_t, t, rng, **cond)
        x0_hat = carrying_target(self.target, previous)(schedule, x_t, t, x0, **cond)
        distance = self.distance(carrying(student, previous)(x_t, t, **cond), x0_hat)
        return expand(self.weight(schedule, t), distance) * distance

    def _from_noise(self, schedule: Schedule, x0: Tensor, rng: Rng, cond: dict[str, Any], noise: Tensor | None) -> PathSteps:
        """Return DDIM steps of the target's paths from noise."""
        assert self.times is not None
        times, target = self.times.float(), carrying_target(self.target)

        def step(x: Tensor, i: int, **cond: Any) -> Tensor:
            t, s = (time.expand(len(x)) for time in times[i : i + 2])
            return move(schedule, x, target(schedule, x, t, x, **cond), t, s)

        return steps_from_noise(step, schedule, times, x0, rng, cond, noise)
