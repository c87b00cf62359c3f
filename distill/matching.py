"""Distribution matching: the images of a few-step student G get the distribution of the teacher's, not its paths.

D_T is the teacher and D_F, the fake denoiser, is trained on the images of G (`distill.second`). At x_t = alpha x + sigma eps, x = G(z),

    DMD (Yin et al. 2311.18828, DMD2 2405.14867, without a discriminator)      dL/dx = w (D_F - D_T)
    SiD (Zhou et al. 2404.04057)      L = w (D_T - D_F) . ((D_T - x) - a (D_T - D_F)),      gradient also through x_t

with w = 1 / mean |x - D_T|. Where both distributions agree, D_F = D_T, and both losses are at rest. No data are used. This is a last
stage: begin with a student of any other method.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distill.denoiser import Denoiser, DenoiserLike, on_schedule
from distill.grid import uniform
from distill.regression import Regression
from distill.rng import Rng
from distill.schedule import add_noise, expand, per_sample, prior_std
from distill.scm import unwrapped
from distill.second import Second, without_gradient
from distill.target import DataSample


@dataclass(frozen=True)
class Matching:
    """Return the loss of distribution matching, [B].

    ``teacher``: D_T. ``second``: how D_F begins (the teacher's own network) and is trained. ``steps``: k of the student, on a uniform
    grid; between them noise is drawn anew. With k > 1 a sample takes a random number of steps, and the gradient passes through the last
    of them. ``sid``: a of SiD, 1 to 1.2 in the paper; None for DMD. ``low``, ``high``: range of t at which D_T and D_F
    are compared, as parts of the teacher's time axis.
    """

    teacher: DenoiserLike
    second: Second
    steps: int = 1
    sid: float | None = None
    low: float = 0.02
    high: float = 0.98

    def __call__(
        self,
        student: DenoiserLike,
        x0: Tensor,
        *,
        rng: Rng,
        progress: float,
        second: Denoiser | None = None,
        **cond: Any,
    ) -> Tensor:
        second = self.second.begin if second is None else second
        schedule = second.schedule
        x = self.images(student, x0, rng, cond)
        t = schedule.t_min + (schedule.t_max - schedule.t_min) * (self.low + (self.high - self.low) * rng.uniform())
        x_t = add_noise(schedule, x, rng.normal(x0), t)
        teacher = on_schedule(self.teacher, schedule)
        if self.sid is None:
            with torch.no_grad():
                true, fake = teacher(x_t, t, **cond), second(x_t, t, **cond)
                goal = x - expand(self._weight(x, true), x) * (fake - true)
            return (x - goal).square().flatten(1).mean(1) / 2
        with without_gradient(second.net):
            true, fake = teacher(x_t, t, **cond), second(x_t, t, **cond)
            loss = ((true - fake) * ((true - x) - self.sid * (true - fake))).flatten(1).mean(1)
        return self._weight(x, true) * loss

    def second_loss(
        self, second: DenoiserLike, student: DenoiserLike, x0: Tensor, *, rng: Rng, progress: float, **cond: Any
    ) -> Tensor:
        """Return the denoising loss of D_F on images of the student, [B]."""
        with torch.no_grad():
            x = self.images(student, x0, rng, cond)
        return Regression(DataSample())(second, x, rng=rng, progress=progress, **cond)  # type: ignore[arg-type]

    def images(self, student: DenoiserLike, like: Tensor, rng: Rng, cond: dict[str, Any]) -> Tensor:
        """Return x [B, ...], what the student makes of noise in 1 to k steps. Only the last step has a gradient."""
        schedule, plain = student.schedule, unwrapped(student)
        times = uniform(schedule, self.steps).float()
        last = rng.integers(self.steps)
        state = x = rng.normal(like) * prior_std(schedule, times[0])
        with torch.no_grad():
            for i in range(1, self.steps):
                x = add_noise(schedule, plain(x, times[i - 1], **cond), rng.normal(like), times[i])
                state = torch.where(per_sample(last >= i, x), x, state)
        return student(state, times[last], **cond)

    @staticmethod
    def _weight(x: Tensor, true: Tensor) -> Tensor:
        """Return 1 / mean |x - D_T| of each sample, without gradient."""
        return 1 / (x - true).detach().abs().flatten(1).mean(1).clamp(min=1e-4)
