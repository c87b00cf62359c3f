"""Consistency mid-training, CMT (Hu et al. 2509.24526): regression on whole solver paths of the teacher.

    x_N, ..., x_0 = a path of the teacher's solver, from a noisy data sample or from pure noise
    loss = d(student(x_i, t_i), x_0)          for every point of the path

Nothing in the target depends on the student, so that it cannot diverge. It is a start for the methods whose target does. N points share
a path: a batch of B samples costs B teacher calls.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distill.denoiser import DenoiserLike, on_schedule
from distill.device import send
from distill.distance import Distance, l2
from distill.grid import GRIDS
from distill.rng import Rng
from distill.samplers import dpm_solver_pp_2m, path
from distill.schedule import add_noise, explain, prior_std


@dataclass(frozen=True)
class MidTraining:
    """Return the loss d(student(x_i, t_i), x_0) of every point of a path, [B] (rounded up to whole paths).

    ``teacher``: whose paths are learned. ``steps``: N. ``sampler``, ``grid``: of the path; the sampler makes one call per step.
    ``distance``: d. ``jumps``: teach a flow map the jump from each point to a later one, drawn uniformly, instead of to the end.
    ``data_free``: paths begin at pure noise, and only the shape is taken from the data.
    """

    teacher: DenoiserLike
    steps: int = 16
    sampler: Callable[..., Tensor] = dpm_solver_pp_2m
    grid: str = "logsnr"
    distance: Distance = l2
    jumps: bool = False
    data_free: bool = False

    def __call__(self, student: DenoiserLike, x0: Tensor, *, rng: Rng, progress: float, **cond: Any) -> Tensor:
        schedule, n = student.schedule, self.steps
        times = GRIDS[self.grid](schedule, n)
        noise, part = rng.normal(x0)[::n], {key: rows[::n] for key, rows in cond.items()}
        x = noise * prior_std(schedule, times[0]) if self.data_free else add_noise(schedule, x0[::n], noise, times[0])
        with torch.no_grad():
            states = path(self.sampler, on_schedule(self.teacher, schedule), x, times, **part)
        paths, every = (
            len(x),
            {key: rows.repeat_interleave(n, 0) for key, rows in part.items()},
        )  # N points of each path in turn
        x_i, t = states[:-1].transpose(0, 1).flatten(0, 1), times[:-1].float().repeat(paths)
        if not self.jumps:
            return self.distance(student(x_i, t, **every), states[-1].repeat_interleave(n, 0))
        i = torch.arange(n).repeat(paths)
        j = i + 1 + (rng.uniform().repeat(n)[: len(i)] * (n - i)).long()
        x_j = states[send(j, x0.device), send(torch.arange(paths).repeat_interleave(n), x0.device)]
        s = times[j].float()
        return self.distance(student(x_i, t, to=s, **every), explain(schedule, x_i, x_j, t, s))
