"""The way back from data to noise: the probability flow integrated upwards, and points between two latents.

The probability flow is one ODE in both directions. The latent of an image is the noise from which a deterministic sampler makes it.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from distill.denoiser import DenoiserLike
from distill.multistep import half_logsnr_step
from distill.schedule import add_noise, heun_x0, move, to_eps


def encode(denoiser: DenoiserLike, x0: Tensor, times: Tensor, *, order: int = 1, **cond: Any) -> Tensor:
    """Return the x_t [B, ...] at ``times[0]`` whose probability flow ends at x0 [B, ...].

    ``times``: the grid of a sampler, float64 [steps + 1], falling to t_clean; it is passed upwards. ``order``: 1 for DDIM inversion
    (Song et al. 2010.02502, Sec. 4.3), one evaluation per step, or 2 for Heun's method (2206.00364), 2 steps - 1 evaluations at most.

    No network is evaluated at t_clean. The first step begins at the lowest noise level t of the grid above it: the network is evaluated
    at alpha_t x0, and the noise that it finds there is the noise of x_t. For data with a density the error is of order sigma_t^2.

    Raises ValueError for another order, for a grid that does not fall or has no time above t_clean, and
    for one whose lowest noise level above it is pure noise.
    """
    if order not in (1, 2):
        raise ValueError(f"order {order} of an inversion: accepted are 1 (DDIM) and 2 (Heun)")
    if len(times) < 2 or not (times.diff() < 0).all():
        raise ValueError("the times of an inversion are those of a sampler: accepted are 2 or more that fall")
    schedule, (first, *rest) = denoiser.schedule, times.flip(0)[1:]
    if float(schedule.alpha(first)) < 1e-6:
        raise ValueError("the lowest noise level of this grid is pure noise: an inversion needs 2 steps or more")
    x = add_noise(schedule, x0, torch.zeros_like(x0), first)
    x = add_noise(schedule, x0, to_eps(schedule, x, denoiser(x, first, **cond), first), first)
    for t, s in pairwise([first, *rest]):
        target = denoiser(x, t, **cond)
        if order == 2 and math.isfinite(half_logsnr_step(schedule, t, s)):
            ahead = move(schedule, x, target, t, s)
            target = heun_x0(schedule, x, target, t, ahead, denoiser(ahead, s, **cond), s)
        x = move(schedule, x, target, t, s)
    return x


def slerp(a: Tensor, b: Tensor, share: float) -> Tensor:
    """Return the point at ``share`` of the arc from a to b, [B, ...]: (sin((1 - s) w) a + sin(s w) b) / sin w, w their angle.

    Points between two Gaussian latents keep the norm that the network expects; the straight line loses it. Parallel vectors take the
    straight line. Sample by sample.
    """
    flat_a, flat_b = a.flatten(1).double(), b.flatten(1).double()
    angle = torch.acos(torch.cosine_similarity(flat_a, flat_b, dim=1).clamp(-1, 1))[:, None]
    sine = angle.sin()
    on_a, on_b = torch.sin((1 - share) * angle) / sine, torch.sin(share * angle) / sine
    straight = sine < 1e-6
    on_a, on_b = torch.where(straight, 1 - share, on_a), torch.where(straight, share, on_b)
    return (on_a * flat_a + on_b * flat_b).reshape(a.shape).to(a)
