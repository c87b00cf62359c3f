"""Progressive distillation (Salimans & Ho 2202.00512, Alg. 2): one student step learns to do two teacher steps, or more."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from distill.denoiser import DenoiserLike
from distill.distance import Distance, Weight, l2, truncated_snr
from distill.noise_paths import steps_from_noise
from distill.rng import Rng
from distill.schedule import add_noise, expand, explain, move
from distill.self_conditioning import carrying, first_estimate


@dataclass(frozen=True)
class Progressive:
    """Return the loss of one stage, w(t) d(student(x_t, t), x0 of k teacher steps), [B].

    ``times``: the teacher's grid, float64 [k N + 1] from noise to data. The student's grid is every k-th entry. ``weight`` and
    ``distance``: w and d, in x0. ``substeps``: k, 2 in the paper; more skip stages. ``data_free``: x_t is on the teacher's own path from
    pure noise, which also gives the target, and only the shape is taken from the data.
    A condition ``noise`` [B, ...] takes the place of new noise, see `distill.source`.

    In the last student step s is the data. `move` and `explain` then return the teacher's own x0 at the time before, so training and
    sampling agree there without a special case.
    """

    teacher: DenoiserLike
    times: Tensor
    weight: Weight = truncated_snr
    distance: Distance = l2
    substeps: int = 2
    data_free: bool = False

    def __call__(
        self, student: DenoiserLike, x0: Tensor, *, rng: Rng, progress: float, noise: Tensor | None = None, **cond: Any
    ) -> Tensor:
        schedule = self.teacher.schedule
        if self.data_free:
            at = steps_from_noise(
                partial(self._steps, carrying(self.teacher)), schedule, self.times[:: self.substeps], x0, rng, cond, noise
            )
            x_t, t, cond = at.x_t, at.t, at.cond
            target = explain(schedule, x_t, at.x_s, t, at.s)
            previous = first_estimate(student, x_t, t, rng, **cond)
        else:
            i = self.substeps * rng.integers((len(self.times) - 1) // self.substeps)
            times = self.times.to(i.device)
            path = [times[i + k] for k in range(self.substeps + 1)]
            t = path[0]
            x_t = add_noise(schedule, x0, rng.normal(x0) if noise is None else noise, t)
            previous = first_estimate(student, x_t, t, rng, **cond)
            with torch.no_grad():
                target = steps_in_one(carrying(self.teacher, previous), x_t, path, **cond)
        distance = self.distance(carrying(student, previous)(x_t, t, **cond), target)
        return expand(self.weight(schedule, t), distance) * distance

    def _steps(self, teacher: DenoiserLike, x: Tensor, i: int, **cond: Any) -> Tensor:
        """Return where the teacher's moves of the i-th student step from x end."""
        for t, s in pairwise(self.times[i * self.substeps : (i + 1) * self.substeps + 1]):
            x = move(teacher.schedule, x, teacher(x, t, **cond), t, s)
        return x


def steps_in_one(teacher: DenoiserLike, x_t: Tensor, path: list[Tensor], **cond: Any) -> Tensor:
    """Return the x0 [B, ...] whose single `move` over the whole ``path`` of times ends where the teacher's moves along it end."""
    schedule, x = teacher.schedule, x_t
    for t, s in pairwise(path):
        x = move(schedule, x, teacher(x, t, **cond), t, s)
    return explain(schedule, x_t, x, path[0], path[-1])
