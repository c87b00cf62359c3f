"""Linear multistep methods with exact integration in log-SNR: what DPM-Solver++, UniPC and DEIS have in common."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from distill.denoiser import DenoiserLike
from distill.schedule import Schedule, move_weights, numbers

Points = list[tuple[Tensor, Tensor]]  # (time, value at that time), newest first


def exponential_adams(
    denoiser: DenoiserLike, x: Tensor, times: Tensor, order: int, correct: bool, cond: dict[str, Any]
) -> Tensor:
    """Sample with an exponential Adams method on x0; one NFE per step.

    Each step extrapolates x0 from the last ``order`` evaluations. With ``correct`` a step is repeated as soon as x0 at its end is
    evaluated, which costs no further evaluation (UniPC, 2302.04867, Alg. 7). The order falls again over the last steps.
    """
    schedule = denoiser.schedule
    behind: Points = []
    last: tuple[Tensor, Tensor, Points] | None = None
    for left, (t, s) in zip(range(len(times) - 1, 0, -1), pairwise(times), strict=True):
        x0 = denoiser(x, t, **cond)
        if correct and last is not None:
            x_start, start, points = last
            x = _advance(schedule, x_start, [*points, (t, x0)], start, t)
        behind = [(t, x0), *behind[: order - 1]]
        points = behind[:left]
        last = x, t, points
        x = _advance(schedule, x, points, t, s)
    return x


def _advance(schedule: Schedule, x: Tensor, points: Points, t: Tensor, s: Tensor) -> Tensor:
    """Return x_s, where x0 along the way from x at t is the polynomial through ``points``, t's first."""
    weights = numbers(_advance_weights, schedule, t, s, *(time for time, _ in points))
    return combine(weights, [x, *(x0 for _, x0 in points)])


def _advance_weights(schedule: Schedule, t: Tensor, s: Tensor, *times: Tensor) -> list[float]:
    """Return the weights of x and of x0 at each of ``times``: those of `move`, x0 being the mean with `adams_weights`."""
    on_x, on_x0 = map(float, move_weights(schedule, t, s))
    return [on_x, *(on_x0 * weight for weight in _adams_weights(schedule, False, t, s, *times))]


def half_logsnr_step(schedule: Schedule, t: Tensor, s: Tensor) -> float:
    """Return (logsnr(s) - logsnr(t)) / 2, the step length of the exponential integrators."""
    return numbers(_half_logsnr_step, schedule, t, s)[0]


def _half_logsnr_step(schedule: Schedule, t: Tensor, s: Tensor) -> tuple[Tensor]:
    return ((schedule.logsnr(s) - schedule.logsnr(t)) / 2,)


def combine(weights: Sequence[float], tensors: Sequence[Tensor]) -> Tensor:
    """Return the weighted sum of tensors of equal shape. Tensors of weight 0 are skipped; one weight at least is not 0."""
    (first, start), *others = [(w, tensor) for w, tensor in zip(weights, tensors, strict=True) if w]
    total = first * start
    for weight, tensor in others:
        total = torch.add(total, tensor, alpha=weight)
    return total


def adams_weights(schedule: Schedule, times: list[Tensor], t: Tensor, s: Tensor, on_eps: bool) -> tuple[float, ...]:
    """Return weights for the values at ``times`` (t's first) whose polynomial in log-SNR is integrated exactly from t to s.

    Let h be the length of the step in half log-SNR, and u in [0, 1] the part of it that is done. The exact solution weighs x0(u) by
    h exp(-h (1 - u)) and eps(u) by h exp(-h u). The weights w of nodes r therefore solve sum_k w_k r_k^j = m_j / m_0 for all j. By
    parts, the moments m_j of u^j are 1 - j m_{j-1} / h on x0 and j m_{j-1} / h - exp(-h) on eps, with m_0 = 1 - exp(-h).

    For two points on x0 the papers use 1/2 for m_1 / m_0, its value at small h. Nodes at infinite log-SNR (pure noise, the data)
    get weight 0; an infinite step is an Euler step.
    """
    return numbers(_adams_weights, schedule, on_eps, t, s, *times)


def _adams_weights(schedule: Schedule, on_eps: bool, t: Tensor, s: Tensor, *times: Tensor) -> list[float]:
    h = half_logsnr_step(schedule, t, s)
    if math.isinf(h):
        return [1.0] + [0.0] * (len(times) - 1)
    positions = [half_logsnr_step(schedule, t, time) / h for time in times]
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
