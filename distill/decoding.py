"""Parallel decoding distillation, PDD (2607.26004): one network evaluation gives the rates of many later steps, one head for each.

The heads W_0, ..., W_{N-1} are copies of the network's last layer, one for each step of a grid t_0 > ... > t_N. From a state at t_n the
head i gives u_i, the rate of the path at the later time t_i. On the straight path, with D_i = t_i - t_{i+1},

    x_k = x_n - sum_{i=n}^{k-1} D_i sg u_i          where the student's own heads lead
    loss = |u_k - sg v_T(x_k, t_k)|^2               the teacher's rate there

A jump over many steps is the weighted mean of their rates, hence one linear layer, the mean of the heads. The number of steps is
chosen after training. There is no derivative, no second time input and no second network. Without data x_n is the student's own state.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distill.consistency import same_dropout
from distill.denoiser import DenoiserLike, on_schedule
from distill.grid import uniform
from distill.jumps import FLOW, jump_to, mean_rate, rate
from distill.rng import Rng
from distill.schedule import Schedule, add_noise, per_sample
from distill.scm import unwrapped
from distill.target import Target


def decoding_times(schedule: Schedule, heads: int) -> tuple[Tensor, Tensor]:
    """Return the grid of the heads, uniform in the time of ``schedule``, and the same times on `FLOW`: float64 [heads + 1] each."""
    times = uniform(schedule, heads)
    return times, FLOW.time(schedule.logsnr(times))


@dataclass(frozen=True)
class ParallelDecoding:
    """Return the loss |u_k - sg v_T(x_k, t_k)|^2 per pixel, [B].

    ``target``: the teacher's x0 (`Mix` with weight 1). ``heads``: N. ``starts``: how many equal parts of the grid a jump may begin at,
    a divisor of N; the student then takes any number of steps that divides it. ``order``: 2 takes the teacher's rate half a step
    later (midpoint rule), 1 at t_k. ``data_free``: x_n is where the student's own jump from noise ends.
    """

    target: Target
    heads: int = 16
    starts: int = 4
    order: int = 2
    data_free: bool = False

    def __call__(self, student: DenoiserLike, x0: Tensor, *, rng: Rng, progress: float, **cond: Any) -> Tensor:
        times = decoding_times(student.schedule, self.heads)[1].float()
        n = rng.integers(self.starts) * (self.heads // self.starts)
        k = n + (rng.uniform() * (self.heads - n)).long()
        t_n, t_k, after = times[n], times[k], times[k + 1]
        plain, noise = unwrapped(student), rng.normal(x0)
        with torch.no_grad():
            if self.data_free:
                first = torch.ones_like(t_n)
                ahead = jump_to(noise, mean_rate(plain, t_n.clamp(max=times[1]), cond)(noise, first), first, t_n)
                x = torch.where(per_sample(n > 0, noise), ahead, noise)
            else:
                x = add_noise(FLOW, x0, noise, t_n)
            with same_dropout(x0.device):
                led = jump_to(x, mean_rate(plain, torch.where(k > n, t_k, after), cond)(x, t_n), t_n, t_k)
            v = self._rate(led, t_k, x0, cond)
            if self.order == 2:
                half = (t_k + after) / 2
                v = self._rate(jump_to(led, v, t_k, half), half, x0, cond)
        u = rate(x, on_schedule(student, FLOW)(x, t_n, head=k, **cond), t_n)
        return (u - v).square().flatten(1).mean(1)

    def _rate(self, x: Tensor, t: Tensor, x0: Tensor, cond: dict[str, Any]) -> Tensor:
        return rate(x, self.target(FLOW, x, t, x0, **cond), t)
