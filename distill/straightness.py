"""How straight the paths of a probability flow are: a straight flow needs one step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from distill.denoiser import DenoiserLike, on_schedule
from distill.grid import uniform
from distill.samplers import ddim, path
from distill.schedule import Flow


@torch.no_grad()
def straightness(denoiser: DenoiserLike, noise: Tensor, *, steps: int = 64, **cond: Any) -> Tensor:
    """Return S = int_0^1 |v(Z_t, t) - (Z_1 - Z_0)|^2 dt per value, [B]: 0 where a path is straight (Liu et al. 2209.03003, Sec. 2.2).

    Z is the path of the probability flow on the schedule `Flow`, from Z_1 = ``noise`` [B, ...], standard normal, to the data Z_0, and v
    its velocity. Denoisers of every schedule have one there. Euler's path in ``steps`` equal steps takes the place of Z: its velocity
    is constant on each step, so that the sum over the steps is its S exactly. The error is of order 1 / steps.
    """
    schedule = Flow()
    states = path(ddim, on_schedule(denoiser, schedule), noise, uniform(schedule, steps), **cond)
    velocity = steps * (states[:-1] - states[1:])
    return (velocity - (states[0] - states[-1])).square().mean(0).flatten(1).mean(1)
