"""Properties of the exact E[x0 | x_t]: as terms to add to any loss, and as residuals to report for any model.

martingale         E[D(x_s, s) | x_t] = D(x_t, t) along the reverse process (consistent diffusion models, Daras et al. 2302.09057)
fokker-planck      d score / d sigma = sigma grad(div score + |score|^2) in the variance-exploding form (Lai et al. 2210.04296)
self-consistency   D(x_s, s) = D(x_t, t) along the probability flow: true of a consistency function, not of E[x0 | x_t]
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distill.denoiser import DenoiserLike, on_schedule, score
from distill.rng import Rng
from distill.schedule import EDM, Schedule, add_noise, expand, move, posterior, to_eps
from distill.scm import forward_mode, unwrapped
from distill.train import Method

Residual = Callable[..., Tensor]  # (student, x_t, t, rng, **cond) -> [B], 0 in expectation where the property holds
RANGE = (-6.0, 6.0)  # log-SNRs at which residuals are evaluated


def _cleaner(schedule: Schedule, t: Tensor, by: float) -> Tensor:
    """Return the time at which the log-SNR is higher than at t by ``by``."""
    return schedule.time(schedule.logsnr(t) + by)


def martingale(student: DenoiserLike, x_t: Tensor, t: Tensor, rng: Rng, by: float = 0.5, **cond: Any) -> Tensor:
    """Return |D(x_t, t) - E[D(x_s, s) | x_t]|^2 per pixel, [B].

    The estimate is unbiased: it is the product of the differences of two independent reverse steps to s. The steps carry no gradient.
    """
    schedule = student.schedule
    s = _cleaner(schedule, t, by)
    here = student(x_t, t, **cond)
    with torch.no_grad():
        kept, fresh = posterior(schedule, t, s)
        mean = expand(schedule.alpha(s), x_t) * here + expand(kept, x_t) * to_eps(schedule, x_t, here, t)
        draws = [mean + expand(fresh, x_t) * rng.normal(x_t) for _ in range(2)]
    first, second = (here - student(x_s, s, **cond) for x_s in draws)
    return (first * second).flatten(1).mean(1)


def self_consistency(student: DenoiserLike, x_t: Tensor, t: Tensor, rng: Rng, by: float = 0.5, **cond: Any) -> Tensor:
    """Return |D(x_t, t) - D(x_s, s)|^2 per pixel, [B], where x_s is one DDIM step after x_t."""
    schedule = student.schedule
    s = _cleaner(schedule, t, by)
    here = student(x_t, t, **cond)
    with torch.no_grad():
        x_s = move(schedule, x_t, here, t, s)
    return (here - student(x_s, s, **cond)).square().flatten(1).mean(1)


def fokker_planck(student: DenoiserLike, x_t: Tensor, t: Tensor, rng: Rng, **cond: Any) -> Tensor:
    """Return the squared residual of the score Fokker-Planck equation per pixel, times sigma^4, at x = x_t / alpha: [B].

    The divergence is Hutchinson's estimate v . (J v) with one vector v of random signs per sample. It is exact on average: a linear
    score has residual 0; any other score has the variance of the estimate on top.
    """
    schedule = student.schedule
    inner = on_schedule(unwrapped(student), EDM())
    sigma = schedule.level(t)
    x = x_t / expand(schedule.alpha(t), x_t)
    v = torch.where(rng.normal(x) > 0, 1.0, -1.0).to(x)

    def potential(x: Tensor) -> Tensor:
        value, along = torch.func.jvp(lambda z: score(inner, z, sigma, **cond), (x,), (v,))[:2]
        return (v * along).sum() + value.square().sum()

    with forward_mode():
        _, change = torch.func.jvp(lambda z: score(inner, x, z, **cond), (sigma,), (torch.ones_like(sigma),))[:2]
        residual = change - expand(sigma, x) * torch.func.grad(potential)(x)
    return (expand(sigma, x).square() * residual).square().flatten(1).mean(1)


RESIDUALS: dict[str, Residual] = {
    "martingale": martingale,
    "fokker-planck": fokker_planck,
    "self-consistency": self_consistency,
}


def _noisy(schedule: Schedule, x0: Tensor, rng: Rng, logsnr: float | None = None) -> tuple[Tensor, Tensor]:
    """Return x_t and t [B] of x0 at one ``logsnr``, or at noise levels uniform in it (None)."""
    level = RANGE[0] + (RANGE[1] - RANGE[0]) * rng.uniform() if logsnr is None else torch.full((len(x0),), logsnr)
    t = schedule.time(level).to(x0.dtype)
    return add_noise(schedule, x0, rng.normal(x0), t), t


@dataclass(frozen=True)
class Regularized:
    """Return the loss of ``method`` plus weight times residual for each (name in `RESIDUALS`, weight) of ``terms``, [B].

    The residuals are evaluated at noise levels uniform in log-SNR.
    """

    method: Method
    terms: tuple[tuple[str, float], ...]

    @property
    def averaged(self) -> bool:
        return getattr(self.method, "averaged", False)

    def __call__(self, student: Any, x0: Tensor, *, rng: Rng, progress: float, **cond: Any) -> Tensor:
        loss = self.method(student, x0, rng=rng, progress=progress, **cond)
        cond.pop("average", None)
        x_t, t = _noisy(student.schedule, x0, rng)
        for name, weight in self.terms:
            loss = loss + weight * RESIDUALS[name](student, x_t, t, rng, **cond)
        return loss


@torch.no_grad()
def residuals(denoiser: DenoiserLike, x0: Tensor, rng: Rng, logsnr: float | None = None, **cond: Any) -> dict[str, float]:
    """Return the mean of each residual over the data x0, at one ``logsnr`` or at noise levels uniform in it (None)."""
    x_t, t = _noisy(denoiser.schedule, x0, rng, logsnr)
    return {name: float(residual(denoiser, x_t, t, rng, **cond).mean()) for name, residual in RESIDUALS.items()}
