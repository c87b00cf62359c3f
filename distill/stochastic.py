"""Samplers that simulate stochastic processes: the reverse SDE, and Langevin dynamics at fixed noise levels.

The distribution of the noisy data is stationary under a Langevin step, to first order in its size e:

    x <- x + e score(x) + sqrt(2 e) z
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from distill.denoiser import DenoiserLike, score
from distill.multistep import combine, half_logsnr_step
from distill.schedule import Schedule, expand, move, move_weights, numbers, posterior, scaled

RATIO = 0.16  # signal-to-noise ratio of a Langevin step, for CIFAR-10 in 2011.13456
AT_LEVEL = 4  # Langevin steps of `annealed_langevin` at each noise level


def sde(
    denoiser: DenoiserLike,
    x: Tensor,
    times: Tensor,
    *,
    eta: float = 1.0,
    noise: Callable[[Tensor], Tensor] = torch.randn_like,
    **cond: Any,
) -> Tensor:
    """Sample from the reverse SDE with noise of any strength, x0 fixed in each step. One NFE per step.

        dx = (f x - (1 + eta^2) / 2 g^2 score) dt + eta g dw        (2011.13456, eq. 6 at eta = 1 and its eq. 13 at 0)

    The exact solution with x0 fixed is Euler-Maruyama in sigma / alpha to first order, and stable at any step. ``eta`` 0 is `ddim` and
    1 is `ancestral`. ``noise``: x -> standard normal noise of the shape of x.
    """
    schedule = denoiser.schedule
    for t, s in pairwise(times):
        x = noisy_move(numbers(_posterior_sample, schedule, t, s, eta), x, denoiser(x, t, **cond), noise)
    return x


def _posterior_sample(schedule: Schedule, t: Tensor, s: Tensor, eta: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    kept, fresh = posterior(schedule, t, s, eta)
    return *move_weights(schedule, t, s, kept), fresh


def noisy_move(weights: Sequence[float], x: Tensor, x0: Tensor, noise: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the sum of x, x0 and new noise with these weights. No noise is drawn for weight 0."""
    *kept, fresh = weights
    moved = combine(kept, (x, x0))
    return torch.add(moved, noise(x), alpha=fresh) if fresh else moved


def langevin_step(denoiser: DenoiserLike, x: Tensor, t: Tensor, z: Tensor, ratio: float = RATIO, **cond: Any) -> Tensor:
    """Take one Langevin step at t with noise z [B, ...], of size e = 2 (ratio |z| / |score|)^2 (2011.13456, Alg. 4). One NFE.

    The norms are of each sample, where the paper has means over the batch, so that no sample depends on the others.
    """
    gradient = score(denoiser, x, t, **cond)
    size = 2 * (ratio * z.flatten(1).norm(dim=1) / gradient.flatten(1).norm(dim=1).clamp(min=1e-12)).square()
    return x + expand(size, x) * gradient + expand((2 * size).sqrt(), x) * z


def predictor_corrector(
    denoiser: DenoiserLike, x: Tensor, times: Tensor, *, noise: Callable[[Tensor], Tensor] = torch.randn_like, **cond: Any
) -> Tensor:
    """Sample with a step of the reverse SDE, then a `langevin_step` at its end (2011.13456, Alg. 1). 2 steps - 1 NFE: none at the data.

    ``noise``: x -> standard normal noise of the shape of x.
    """
    schedule = denoiser.schedule
    for t, s in pairwise(times[:-1]):
        x = noisy_move(numbers(_posterior_sample, schedule, t, s), x, denoiser(x, t, **cond), noise)
        x = langevin_step(denoiser, x, s, noise(x), **cond)
    return denoiser(x, times[-2], **cond)


def annealed_langevin(
    denoiser: DenoiserLike, x: Tensor, times: Tensor, *, noise: Callable[[Tensor], Tensor] = torch.randn_like, **cond: Any
) -> Tensor:
    """Sample with annealed Langevin dynamics (Song & Ermon 1907.05600, Alg. 1): `AT_LEVEL` steps at each time, x0 at the last.

    Between two levels x / alpha is kept; where alpha is 0, a DDIM step leads to the next one. See `annealed_calls` for the NFE.
    ``noise``: x -> standard normal noise of the shape of x.
    """
    schedule = denoiser.schedule
    for t, s in pairwise(times[:-1]):
        if math.isfinite(half_logsnr_step(schedule, t, s)):
            for _ in range(AT_LEVEL):
                x = langevin_step(denoiser, x, t, noise(x), **cond)
            x = scaled(numbers(_alpha_ratio, schedule, t, s)[0], x)
        else:
            x = move(schedule, x, denoiser(x, t, **cond), t, s)
    if len(times) > 2:
        for _ in range(AT_LEVEL):
            x = langevin_step(denoiser, x, times[-2], noise(x), **cond)
    return denoiser(x, times[-2], **cond)


def _alpha_ratio(schedule: Schedule, t: Tensor, s: Tensor) -> tuple[Tensor]:
    return (schedule.alpha(s) / schedule.alpha(t),)


def annealed_calls(steps: int) -> int:
    """Return the NFE of `annealed_langevin`, at most: fewer where it starts with a DDIM step from alpha = 0."""
    return AT_LEVEL * steps + 1 if steps > 1 else 1
