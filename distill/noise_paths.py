"""Points of a teacher's own paths from pure noise, for trainings without data.

    x_0 = noise, x_1, ..., x_N = a path of the teacher's solver on the times t_0 > ... > t_N
    a sample of the batch is one step of a path: (x_i, t_i) and (x_{i+1}, t_{i+1})

The N steps of a path are N samples: a batch of B samples costs B steps of the solver (2509.24526 shares paths in the same way). From the
batch only its shape, and the conditions of every N-th sample, are taken.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distill.device import send
from distill.rng import Rng
from distill.schedule import Schedule, prior_std

Step = Callable[..., Tensor]  # (x_i [P, ...], i, **cond) -> x_{i+1} [P, ...]


@dataclass(frozen=True)
class PathSteps:
    """Hold one step of a path for each sample: from x_t [B, ...] at t [B] to x_s at s, and the conditions of its path."""

    x_t: Tensor
    t: Tensor
    x_s: Tensor
    s: Tensor
    cond: dict[str, Tensor]


@torch.no_grad()
def steps_from_noise(
    step: Step, schedule: Schedule, times: Tensor, like: Tensor, rng: Rng, cond: dict[str, Any], noise: Tensor | None = None
) -> PathSteps:
    """Return B steps of paths from noise on ``times`` [N + 1], where B and the shape of a sample are those of ``like``.

    ``step``: a step of the solver. ``cond``: conditions {name: [B, ...]}. ``noise`` [B, ...] takes the place of new noise. If N does not
    divide B, the steps that are left out of the last path are drawn at random: each time is met equally often on average.
    """
    n, size = len(times) - 1, len(like)
    part = {name: rows[::n] for name, rows in cond.items()}
    states = [(rng.normal(like) if noise is None else noise)[::n] * prior_std(schedule, times[0])]
    first = rng.integers(n)[::n]
    for number in range(n):
        states.append(step(states[-1], number, **part))
    path = torch.arange(size) // n
    i = (torch.arange(size) + first.cpu()[path]) % n
    place, every, whole = send(i, like.device), send(path, like.device), torch.stack(states)
    repeated = {name: rows[send(path, rows.device)] for name, rows in part.items()}
    return PathSteps(whole[place, every], times[i], whole[place + 1, every], times[i + 1], repeated)
