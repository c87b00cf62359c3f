"""Training through the sampler: a student of K steps learns end to end where its own DDIM path from noise ends.

    x(0) = noise          x(i+1) = move(x(i), D(x(i), t(i)), t(i), t(i+1)), i < K
    loss = d(x(K), the end of the teacher's path from the same noise)

The gradient goes back through all K steps, as in a recurrent network with weights shared over time. With K = 1 this is regression on
the teacher's end points (Luhman & Luhman 2101.02388).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from distill.denoiser import DenoiserLike, on_schedule
from distill.distance import Distance, l2
from distill.grid import GRIDS, uniform
from distill.rng import Rng
from distill.samplers import ddim
from distill.schedule import move, prior_std
from distill.self_conditioning import carrying


@dataclass(frozen=True)
class Unrolled:
    """Return d(end of the student's K steps, end of the teacher's N steps), [B]. From the data only shape and conditions are taken.

    ``teacher``: whose ends are learned. ``steps``: K, on the uniform grid. ``teacher_steps``: N. ``sampler``, ``grid``: the teacher's,
    deterministic. ``distance``: d. ``checkpointed``: keep only the states between steps, and compute each step once more in the
    backward pass: the memory of one step for any K, and K more calls of the student.
    """

    teacher: DenoiserLike
    steps: int = 1
    teacher_steps: int = 16
    sampler: Callable[..., Tensor] = ddim
    grid: str = "uniform"
    distance: Distance = l2
    checkpointed: bool = True

    def __call__(self, student: DenoiserLike, x0: Tensor, *, rng: Rng, progress: float, **cond: Any) -> Tensor:
        schedule = student.schedule
        times = uniform(schedule, self.steps)
        x = prior_std(schedule, times[0]) * rng.normal(x0)
        with torch.no_grad():
            teacher = carrying(on_schedule(self.teacher, schedule))
            end = self.sampler(teacher, x, GRIDS[self.grid](schedule, self.teacher_steps), **cond)
        return self.distance(unrolled(student, x, times, self.checkpointed and self.steps > 1, **cond), end)


def unrolled(student: DenoiserLike, x: Tensor, times: Tensor, checkpointed: bool = False, **cond: Any) -> Tensor:
    """Return the end of `ddim` along ``times``, with gradient through all steps and through a self-conditioned student's state."""
    previous: Tensor | None = None
    for t, s in pairwise(times):

        def step(x: Tensor, previous: Tensor | None, t: Tensor = t, s: Tensor = s) -> tuple[Tensor, Tensor]:
            x0 = carrying(student, previous)(x, t, **cond)
            return move(student.schedule, x, x0, t, s), x0

        x, previous = checkpoint(step, x, previous, use_reentrant=False) if checkpointed else step(x, previous)
    return x
