"""Samplers, deterministic and stochastic, written once on E[x0 | x_t].

A sampler is a plain function (denoiser, x, times, **cond) -> x0. ``times`` is a float64 tensor [steps + 1] on the CPU that
decreases from the time at which x lives to t_clean, where the last move returns the denoiser's x0. A multistep method finds
the x0 its extrapolation stands for, and then makes the ordinary `move`. Where alpha is 0 at the start (zero terminal SNR) or
sigma is 0 at the end, the step is infinite in log-SNR and every method takes its own limit there, the DDIM step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from distill.denoiser import DenoiserLike
from distill.schedule import Schedule, move, posterior, to_eps, to_x0

Sampler = Callable[..., Tensor]


def ddim(denoiser: DenoiserLike, x: Tensor, times: Tensor, **cond: Any) -> Tensor:
    """Song et al. 2021, eq. 12 with eta = 0: Euler's method in sigma/alpha. Order 1, one NFE a step."""
    for t, s in pairwise(times):
        x = move(denoiser.schedule, x, denoiser(x, t, **cond), t, s)
    return x


def heun(denoiser: DenoiserLike, x: Tensor, times: Tensor, **cond: Any) -> Tensor:
    """Karras et al. 2022, Alg. 1. Order 2, 2 steps - 1 NFE: the step onto the data is an Euler one."""
    schedule = denoiser.schedule
    for t, s in pairwise(times):
        x0 = denoiser(x, t, **cond)
        if math.isfinite(_half_logsnr_step(schedule, t, s)):
            ahead = move(schedule, x, x0, t, s)
            eps = (to_eps(schedule, x, x0, t) + to_eps(schedule, ahead, denoiser(ahead, s, **cond), s)) / 2
            x0 = to_x0(schedule, x, eps, t)
        x = move(schedule, x, x0, t, s)
    return x


def dpm_solver_pp_2m(denoiser: DenoiserLike, x: Tensor, times: Tensor, **cond: Any) -> Tensor:
    """DPM-Solver++(2M), Lu et al. 2022b, Alg. 2. Order 2, one NFE a step."""
    return _multistep(denoiser, x, times, 2, False, cond)


def dpm_solver_pp_3m(denoiser: DenoiserLike, x: Tensor, times: Tensor, **cond: Any) -> Tensor:
    """DPM-Solver++(3M), Lu et al. 2022b, with the quadratic through three x0 integrated exactly. Order 3, one NFE a step.

    The formula in common use halves the quadratic's last term, which leaves order 2 (measured in EXPERIMENTS.md).
    """
    return _multistep(denoiser, x, times, 3, False, cond)


def unipc(denoiser: DenoiserLike, x: Tensor, times: Tensor, *, order: int = 3, **cond: Any) -> Tensor:
    """UniPC-p with B2(h) on x0, Zhao et al. 2023, Alg. 7. The corrector reuses the next x0: one NFE a step."""
    return _multistep(denoiser, x, times, order, True, cond)


def deis(denoiser: DenoiserLike, x: Tensor, times: Tensor, *, order: int = 3, **cond: Any) -> Tensor:
    """DEIS (Zhang & Chen 2023) with polynomials in log(sigma/alpha): the exponential Adams method on eps. Order p, one NFE a step."""
    schedule = denoiser.schedule
    behind: list[tuple[Tensor, Tensor]] = []  # (time, eps), newest first
    for left, (t, s) in zip(range(len(times) - 1, 0, -1), pairwise(times), strict=True):
        x0 = denoiser(x, t, **cond)
        behind = [(t, to_eps(schedule, x, x0, t)), *behind[: order - 1]]
        points = behind[:left]
        weights = _adams_weights(schedule, [time for time, _ in points], t, s, on_eps=True)
        if any(weights[1:]):
            x0 = to_x0(schedule, x, _combine(weights, [eps for _, eps in points]), t)
        x = move(schedule, x, x0, t, s)
    return x


def ipndm(denoiser: DenoiserLike, x: Tensor, times: Tensor, **cond: Any) -> Tensor:
    """iPNDM-4, Zhang & Chen 2023: Adams-Bashforth on eps with the weights of equal steps. One NFE a step."""
    weights = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))
    schedule = denoiser.schedule
    history: list[Tensor] = []  # eps, newest first
    for t, s in pairwise(times):
        x0 = denoiser(x, t, **cond)
        history = [to_eps(schedule, x, x0, t), *history[:3]]
        if len(history) > 1:
            x0 = to_x0(schedule, x, _combine(weights[len(history) - 1], history), t)
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
    """DDPM's posterior sampling (Ho et al. 2020; eta = 1 in Song et al. 2021, eq. 16). One NFE a step.

    ``noise``: x -> noise like x.
    """
    schedule = denoiser.schedule
    for t, s in pairwise(times):
        x0 = denoiser(x, t, **cond)
        if float(schedule.sigma(s)) == 0:
            return move(schedule, x, x0, t, s)
        kept, fresh = map(float, posterior(schedule, t, s))
        x = float(schedule.alpha(s)) * x0 + kept * to_eps(schedule, x, x0, t) + fresh * noise(x)
    return x


def consistency(
    denoiser: DenoiserLike,
    x: Tensor,
    times: Tensor,
    *,
    gamma: float = 1.0,
    noise: Callable[[Tensor], Tensor] = torch.randn_like,
    **cond: Any,
) -> Tensor:
    """Multistep consistency sampling (Song et al. 2023, Alg. 1): jump to the data, go back to s with fresh noise. One NFE a step.

    ``gamma`` between 1 and 0, where it is `ddim`: the deterministic move goes on to (1 - gamma) s first, and fresh noise from
    there to s (Zheng et al. 2024, gamma-sampling). ``noise``: x -> noise like x.
    """
    schedule = denoiser.schedule
    for t, s in pairwise(times):
        x0 = denoiser(x, t, **cond)
        if float(schedule.sigma(s)) == 0:
            return move(schedule, x, x0, t, s)
        below = lower(schedule, s, gamma)
        alpha, sigma = float(schedule.alpha(s)), float(schedule.sigma(s))
        kept = alpha * float(schedule.level(below))
        x = alpha * x0 + kept * to_eps(schedule, x, x0, t) + math.sqrt(max(0.0, sigma**2 - kept**2)) * noise(x)
    return x


def jump(denoiser: DenoiserLike, x: Tensor, times: Tensor, **cond: Any) -> Tensor:
    """`ddim` with a student of two times, which is told where each step ends (MeanFlow, Geng et al. 2025). One NFE a step."""
    for t, s in pairwise(times):
        x = move(denoiser.schedule, x, denoiser(x, t, to=s, **cond), t, s)
    return x


def lower(schedule: Schedule, s: Tensor, gamma: float) -> Tensor:
    """The time (1 - gamma) of the way from the data to s, from which gamma-sampling goes back to s with fresh noise. On VE, whose
    data lie at -inf, of the way from t_min."""
    clean = schedule.t_min if math.isinf(schedule.t_clean) and gamma < 1 else schedule.t_clean
    return torch.full_like(s, clean) if gamma == 1 else clean + (1 - gamma) * (s - clean)


SAMPLERS: dict[str, Sampler] = {
    "ddim": ddim,
    "heun": heun,
    "dpm++2m": dpm_solver_pp_2m,
    "dpm++3m": dpm_solver_pp_3m,
    "unipc": unipc,
    "ipndm": ipndm,
    "deis": deis,
    "ancestral": ancestral,
    "consistency": consistency,
    "jump": jump,
}
STOCHASTIC = ("ancestral", "consistency")  # these take ``noise``
ACCEPTED = f"{', '.join(SAMPLERS)} and consistency:GAMMA with GAMMA from 0 to 1"


def named(name: str) -> Sampler:
    """The sampler of this name; ``consistency:0.3`` is `consistency` with gamma 0.3. ValueError for any other name."""
    base = name.partition(":")[0]
    if name in SAMPLERS:
        return SAMPLERS[name]
    try:
        if base == "consistency" and 0 <= gamma_of(name) <= 1:
            return partial(consistency, gamma=gamma_of(name))
    except ValueError:
        pass
    raise ValueError(f"unknown sampler {name!r}: accepted are {ACCEPTED}")


def gamma_of(name: str) -> float:
    """The gamma of a sampler's name: 0 for the deterministic ones."""
    base, _, gamma = name.partition(":")
    return (float(gamma) if gamma else 1.0) if base == "consistency" else 0.0


def stochastic(name: str) -> bool:
    """Whether the sampler of this name draws noise between its steps, and so takes ``noise``."""
    return name.partition(":")[0] in STOCHASTIC


def nfe(sampler: str, steps: int) -> int:
    """Network evaluations that ``steps`` steps of a sampler take at most (before guidance doubles them)."""
    return 2 * steps - 1 if sampler == "heun" else steps


def _half_logsnr_step(schedule: Schedule, t: Tensor, s: Tensor) -> float:
    return float(schedule.logsnr(s) - schedule.logsnr(t)) / 2


def _combine(weights: Sequence[float], tensors: Sequence[Tensor]) -> Tensor:
    total = weights[0] * tensors[0]
    for weight, tensor in zip(weights[1:], tensors[1:], strict=True):
        if weight:
            total = total + weight * tensor
    return total


def _multistep(denoiser: DenoiserLike, x: Tensor, times: Tensor, order: int, correct: bool, cond: dict) -> Tensor:
    """Exponential Adams methods: extrapolate x0 from the last ``order`` points and, with ``correct``, once x0 at the end of
    the step is known, make the step again with it before going on."""
    schedule = denoiser.schedule
    behind: list[tuple[Tensor, Tensor]] = []  # (time, x0), newest first
    last: tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]] | None = None
    for left, (t, s) in zip(range(len(times) - 1, 0, -1), pairwise(times), strict=True):
        x0 = denoiser(x, t, **cond)
        if correct and last is not None:
            x_start, start, points = last
            x = move(schedule, x_start, _integrated_x0(schedule, [*points, (t, x0)], start, t), start, t)
        behind = [(t, x0), *behind[: order - 1]]
        points = behind[:left]  # the order comes down again towards the end
        last = x, t, points
        x = move(schedule, x, _integrated_x0(schedule, points, t, s), t, s)
    return x


def _integrated_x0(schedule: Schedule, points: list[tuple[Tensor, Tensor]], t: Tensor, s: Tensor) -> Tensor:
    """The constant x0 that moves x_t to x_s like the polynomial through ``points``, (time, x0) with t's first."""
    weights = _adams_weights(schedule, [time for time, _ in points], t, s, on_eps=False)
    return _combine(weights, [x0 for _, x0 in points])


def _adams_weights(schedule: Schedule, times: list[Tensor], t: Tensor, s: Tensor, on_eps: bool) -> list[float]:
    """Weights of the values at ``times``, t's first, whose polynomial in log-SNR is integrated exactly from t to s.

    With u the part of the step done in half log-SNR and h its length, a step weighs x0(u) by h exp(-h (1 - u)) and eps(u) by
    h exp(-h u). So weights w of nodes r satisfy sum_k w_k r_k^j = m_j / m_0, where the moments m_j of u^j are, by parts,
    1 - j m_{j-1} / h on x0 and j m_{j-1} / h - exp(-h) on eps, from m_0 = 1 - exp(-h). For two points on x0 the papers put
    1/2 for m_1 / m_0, its value at small h. Infinite steps and nodes, at pure noise and at the data, have no say.
    """
    h = _half_logsnr_step(schedule, t, s)
    if math.isinf(h):
        return [1.0] + [0.0] * (len(times) - 1)
    positions = [_half_logsnr_step(schedule, t, time) / h for time in times]
    nodes = [r for r in positions if math.isfinite(r)]
    moments = [-math.expm1(-h)]
    for j in range(1, len(nodes)):
        part = j * moments[-1] / h
        moments.append(part - math.exp(-h) if on_eps else 1 - part)
    ratios = [moment / moments[0] for moment in moments]
    if len(nodes) == 2 and not on_eps:
        ratios[1] = 0.5
    powers = torch.tensor([[r**j for r in nodes] for j in range(len(nodes))], dtype=torch.float64)
    weights = iter(torch.linalg.solve(powers, torch.tensor(ratios, dtype=torch.float64)).tolist())
    return [next(weights) if math.isfinite(r) else 0.0 for r in positions]
