"""Samplers, deterministic and stochastic, as functions of E[x0 | x_t].

A sampler is a function (denoiser, x, times, **cond) -> x0. ``times`` is a float64 tensor [steps + 1] on the CPU. It decreases from
the time of x to t_clean, where the last step returns the denoiser's x0. Where the step is infinite in log-SNR (from pure noise with
zero terminal SNR, or onto the data) every method takes its limit there, the DDIM step.

`SAMPLERS` holds one record per sampler. A new sampler is one function and one record. Those that simulate a stochastic process are in
`distill.stochastic`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from distill.denoiser import DenoiserLike
from distill.multistep import adams_weights, combine, exponential_adams, half_logsnr_step
from distill.schedule import Schedule, heun_x0, move, move_weights, numbers, to_eps, to_x0
from distill.stochastic import annealed_calls, annealed_langevin, noisy_move, predictor_corrector, sde


def ddim(denoiser: DenoiserLike, x: Tensor, times: Tensor, **cond: Any) -> Tensor:
    """Sample with DDIM, eta = 0 (Song et al. 2010.02502, eq. 12): Euler's method in sigma/alpha. Order 1, one NFE per step."""
    for t, s in pairwise(times):
        x = move(denoiser.schedule, x, denoiser(x, t, **cond), t, s)
    return x


def heun(denoiser: DenoiserLike, x: Tensor, times: Tensor, **cond: Any) -> Tensor:
    """Sample with Heun's method (Karras et al. 2206.00364, Alg. 1). Order 2, 2 steps - 1 NFE: the last step is an Euler step."""
    schedule = denoiser.schedule
    for t, s in pairwise(times):
        x0 = denoiser(x, t, **cond)
        if math.isfinite(half_logsnr_step(schedule, t, s)):
            ahead = move(schedule, x, x0, t, s)
            x0 = heun_x0(schedule, x, x0, t, ahead, denoiser(ahead, s, **cond), s)
        x = move(schedule, x, x0, t, s)
    return x


def dpm_solver_pp_2m(denoiser: DenoiserLike, x: Tensor, times: Tensor, **cond: Any) -> Tensor:
    """Sample with DPM-Solver++(2M) (Lu et al. 2211.01095, Alg. 2). Order 2, one NFE per step."""
    return exponential_adams(denoiser, x, times, 2, False, cond)


def dpm_solver_pp_3m(denoiser: DenoiserLike, x: Tensor, times: Tensor, **cond: Any) -> Tensor:
    """Sample with DPM-Solver++(3M) (Lu et al. 2211.01095), the quadratic through three x0 integrated exactly. Order 3, one NFE per step.

    The formula in common use halves the quadratic's last term, which reduces the order to 2 (measured in EXPERIMENTS.md).
    """
    return exponential_adams(denoiser, x, times, 3, False, cond)


def unipc(denoiser: DenoiserLike, x: Tensor, times: Tensor, *, order: int = 3, **cond: Any) -> Tensor:
    """Sample with UniPC-p, B2(h), on x0 (Zhao et al. 2302.04867, Alg. 7). One NFE per step: the corrector reuses the next x0."""
    return exponential_adams(denoiser, x, times, order, True, cond)


def deis(denoiser: DenoiserLike, x: Tensor, times: Tensor, *, order: int = 3, **cond: Any) -> Tensor:
    """Sample with DEIS (Zhang & Chen 2204.13902), polynomials in log(sigma/alpha): exponential Adams on eps. One NFE per step."""
    schedule = denoiser.schedule
    behind: list[tuple[Tensor, Tensor]] = []  # (time, eps), newest first
    for left, (t, s) in zip(range(len(times) - 1, 0, -1), pairwise(times), strict=True):
        x0 = denoiser(x, t, **cond)
        behind = [(t, to_eps(schedule, x, x0, t)), *behind[: order - 1]]
        points = behind[:left]
        weights = adams_weights(schedule, [time for time, _ in points], t, s, on_eps=True)
        if any(weights[1:]):
            x0 = to_x0(schedule, x, combine(weights, [eps for _, eps in points]), t)
        x = move(schedule, x, x0, t, s)
    return x


def ipndm(denoiser: DenoiserLike, x: Tensor, times: Tensor, **cond: Any) -> Tensor:
    """Sample with iPNDM-4 (Zhang & Chen 2204.13902): Adams-Bashforth on eps with the weights of equal steps. One NFE per step."""
    weights = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))
    schedule = denoiser.schedule
    history: list[Tensor] = []  # eps, newest first
    for t, s in pairwise(times):
        x0 = denoiser(x, t, **cond)
        history = [to_eps(schedule, x, x0, t), *history[:3]]
        if len(history) > 1:
            x0 = to_x0(schedule, x, combine(weights[len(history) - 1], history), t)
        x = move(schedule, x, x0, t, s)
    return x


def ancestral(
    denoiser: DenoiserLike,
    x: Tensor,
    times: Tensor,
    *,
    noise: Callable[[Tensor], Tensor] = torch.randn_like,
    **cond: Any,
) -> Tensor:
    """Sample from DDPM's posterior (Ho et al. 2006.11239; eta = 1 in 2010.02502, eq. 16). One NFE per step.

    ``noise``: x -> standard normal noise of the shape of x.
    """
    return sde(denoiser, x, times, eta=1.0, noise=noise, **cond)


def consistency(
    denoiser: DenoiserLike,
    x: Tensor,
    times: Tensor,
    *,
    gamma: float = 1.0,
    noise: Callable[[Tensor], Tensor] = torch.randn_like,
    **cond: Any,
) -> Tensor:
    """Sample with multistep consistency sampling (Song et al. 2303.01469, Alg. 1). One NFE per step.

    With ``gamma`` 1 each step jumps to the data and adds fresh noise up to s. With ``gamma`` below 1 it moves deterministically to
    (1 - gamma) s and adds fresh noise from there to s (gamma-sampling, 2402.19159); 0 is `ddim`.
    ``noise``: x -> standard normal noise of the shape of x.
    """
    schedule = denoiser.schedule
    for t, s in pairwise(times):
        x = noisy_move(numbers(_renoised, schedule, gamma, t, s), x, denoiser(x, t, **cond), noise)
    return x


def _renoised(schedule: Schedule, gamma: float, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    below = partial_noise_time(schedule, s, gamma)
    (alpha, sigma), (alpha_below, sigma_below) = schedule.at(s), schedule.at(below)
    kept = alpha * sigma_below / alpha_below
    return *move_weights(schedule, t, s, kept), (sigma.square() - kept.square()).clamp(min=0).sqrt()


def jump(denoiser: DenoiserLike, x: Tensor, times: Tensor, **cond: Any) -> Tensor:
    """Sample a two-time (flow-map) student: `ddim` with the end of each step as an input (2505.13447). One NFE per step."""
    for t, s in pairwise(times):
        x = move(denoiser.schedule, x, denoiser(x, t, to=s, **cond), t, s)
    return x


@dataclass(frozen=True)
class _Noted:
    """Evaluate a denoiser and note the states that it is evaluated at."""

    denoiser: DenoiserLike
    states: list[Tensor]

    @property
    def schedule(self) -> Schedule:
        return self.denoiser.schedule

    def __call__(self, x_t: Tensor, t: Tensor, to: Tensor | None = None, **cond: Any) -> Tensor:
        self.states.append(x_t)
        return self.denoiser(x_t, t, to=to, **cond)


def path(sampler: Callable[..., Tensor], denoiser: DenoiserLike, x: Tensor, times: Tensor, **cond: Any) -> Tensor:
    """Return the states of a sampler that evaluates the denoiser once per step, at all ``times``: [steps + 1, B, ...], x first.

    Raises ValueError for a sampler with more calls.
    """
    states: list[Tensor] = []
    end = sampler(_Noted(denoiser, states), x, times, **cond)
    if len(states) != len(times) - 1:
        raise ValueError(
            f"a path needs a sampler with one call per step; this one made {len(states)} in {len(times) - 1} steps"
        )
    return torch.stack([*states, end])


def partial_noise_time(schedule: Schedule, s: Tensor, gamma: float) -> Tensor:
    """Return the time at (1 - gamma) of the way from the data to s, from which gamma-sampling adds fresh noise.

    On VE, whose data are at -inf, the way is counted from t_min.
    """
    clean = schedule.t_min if math.isinf(schedule.t_clean) and gamma < 1 else schedule.t_clean
    return torch.full_like(s, clean) if gamma == 1 else clean + (1 - gamma) * (s - clean)


@dataclass(frozen=True)
class Sampler:
    """All that the project holds about one sampler.

    ``run``: (denoiser, x, times, **cond) -> x0. ``calls``: steps -> network evaluations, at most, before guidance doubles them.
    ``noisy``: draws noise between steps and takes ``noise``. ``two_times``: needs a two-time network. ``baseline``: a training-free
    sampler that students are compared with. ``best_grid``: the time grid that serves it best from 8 steps on (EXPERIMENTS.md).
    """

    run: Callable[..., Tensor]
    calls: Callable[[int], int] = lambda steps: steps
    noisy: bool = False
    two_times: bool = False
    baseline: bool = False
    best_grid: str = "uniform"


SAMPLERS: dict[str, Sampler] = {
    "ddim": Sampler(ddim, baseline=True),
    "heun": Sampler(heun, calls=lambda steps: 2 * steps - 1, baseline=True),
    "dpm++2m": Sampler(dpm_solver_pp_2m, baseline=True, best_grid="logsnr"),
    "dpm++3m": Sampler(dpm_solver_pp_3m, baseline=True, best_grid="logsnr"),
    "unipc": Sampler(unipc, baseline=True, best_grid="logsnr"),
    "ipndm": Sampler(ipndm, baseline=True, best_grid="logsnr"),
    "deis": Sampler(deis, baseline=True),
    "ancestral": Sampler(ancestral, noisy=True),
    "consistency": Sampler(consistency, noisy=True),
    "jump": Sampler(jump, two_times=True),
    "sde": Sampler(sde, noisy=True),
    "pc": Sampler(predictor_corrector, calls=lambda steps: 2 * steps - 1, noisy=True),
    "langevin": Sampler(annealed_langevin, calls=annealed_calls, noisy=True),
}
BASELINES = tuple(name for name, sampler in SAMPLERS.items() if sampler.baseline)
