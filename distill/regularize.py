"""Properties that the exact E[x0 | x_t] has, as terms to add to any method and as residuals to print of any model.

martingale        E[D(x_s, s) | x_t] = D(x_t, t) along the reverse process (consistent diffusion models, Daras et al. 2023)
fokker_planck     d score / d sigma = sigma grad(div score + |score|^2) in the variance-exploding form (Lai et al. 2023)
consistency       D(x_s, s) = D(x_t, t) along the probability flow, which a consistency function has and E[x0 | x_t] has not
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from distill.denoiser import DenoiserLike, ask_in
from distill.rng import Rng
from distill.schedule import EDM, Schedule, add_noise, expand, move, posterior, to_eps
from distill.scm import bare
from distill.train import Method

Residual = Callable[..., Tensor]  # (student, x_t, t, rng, **cond) -> [B], 0 in expectation where the property holds
RANGE = (-6.0, 6.0)  # log-SNRs at which residuals are taken


def _step(schedule: Schedule, t: Tensor, by: float) -> Tensor:
    """The time whose log-SNR is ``by`` higher than at t."""
    return schedule.time(schedule.logsnr(t) + by)


def martingale(student: DenoiserLike, x_t: Tensor, t: Tensor, rng: Rng, by: float = 0.5, **cond: Any) -> Tensor:
    """|D(x_t, t) - E[D(x_s, s) | x_t]|^2 a pixel, unbiased from two independent reverse steps to s, whose product of differences
    has that mean; the steps themselves carry no gradient."""
    schedule = student.schedule
    s = _step(schedule, t, by)
    here = student(x_t, t, **cond)
    with torch.no_grad():
        kept, fresh = posterior(schedule, t, s)
        mean = expand(schedule.alpha(s), x_t) * here + expand(kept, x_t) * to_eps(schedule, x_t, here, t)
        draws = [mean + expand(fresh, x_t) * rng.normal(x_t) for _ in range(2)]
    one, two = (here - student(x_s, s, **cond) for x_s in draws)
    return (one * two).flatten(1).mean(1)


def consistency(student: DenoiserLike, x_t: Tensor, t: Tensor, rng: Rng, by: float = 0.5, **cond: Any) -> Tensor:
    """|D(x_t, t) - D(x_s, s)|^2 a pixel, x_s one DDIM step on."""
    schedule = student.schedule
    s = _step(schedule, t, by)
    here = student(x_t, t, **cond)
    with torch.no_grad():
        x_s = move(schedule, x_t, here, t, s)
    return (here - student(x_s, s, **cond)).square().flatten(1).mean(1)


def fokker_planck(student: DenoiserLike, x_t: Tensor, t: Tensor, rng: Rng, **cond: Any) -> Tensor:
    """The square a pixel of sigma^2 times the equation's residual, in the variance-exploding form x = x_t / alpha.

    The divergence is Hutchinson's estimate v . (J v), of one v of signs a sample: exact on average, so that a linear score has no
    residual and others have the estimate's variance on top.
    """
    schedule = student.schedule
    inner = ask_in(bare(student), EDM())
    sigma = schedule.level(t)
    x = x_t / expand(schedule.alpha(t), x_t)
    v = torch.where(rng.normal(x) > 0, 1.0, -1.0).to(x)

    def score(x: Tensor, sigma: Tensor) -> Tensor:
        return (inner(x, sigma, **cond) - x) / expand(sigma, x).square()

    def potential(x: Tensor) -> Tensor:
        value, along = torch.func.jvp(lambda z: score(z, sigma), (x,), (v,))[:2]
        return (v * along).sum() + value.square().sum()

    with sdpa_kernel(SDPBackend.MATH):
        _, change = torch.func.jvp(lambda z: score(x, z), (sigma,), (torch.ones_like(sigma),))[:2]
        residual = change - expand(sigma, x) * torch.func.grad(potential)(x)
    return (expand(sigma, x).square() * residual).square().flatten(1).mean(1)


RESIDUALS: dict[str, Residual] = {"consistent": martingale, "fokker-planck": fokker_planck, "consistency": consistency}


@dataclass(frozen=True)
class Regularized:
    """method + sum of weight * residual, at noise levels uniform in log-SNR. ``terms``: (name in `RESIDUALS`, weight)."""

    method: Method
    terms: tuple[tuple[str, float], ...]

    @property
    def averaged(self) -> bool:
        return getattr(self.method, "averaged", False)

    def __call__(self, student: Any, x0: Tensor, *, rng: Rng, progress: float, **cond: Any) -> Tensor:
        loss = self.method(student, x0, rng=rng, progress=progress, **cond)
        cond.pop("average", None)
        schedule = student.schedule
        t = schedule.time(RANGE[0] + (RANGE[1] - RANGE[0]) * rng.uniform()).to(x0)
        x_t = add_noise(schedule, x0, rng.normal(x0), t)
        for name, weight in self.terms:
            loss = loss + weight * RESIDUALS[name](student, x_t, t, rng, **cond)
        return loss


@torch.no_grad()
def residuals(denoiser: DenoiserLike, x0: Tensor, rng: Rng, **cond: Any) -> dict[str, float]:
    """The mean of each residual over data x0 at noise levels uniform in log-SNR."""
    schedule = denoiser.schedule
    t = schedule.time(RANGE[0] + (RANGE[1] - RANGE[0]) * rng.uniform()).to(x0)
    x_t = add_noise(schedule, x0, rng.normal(x0), t)
    return {name: float(residual(denoiser, x_t, t, rng, **cond).mean()) for name, residual in RESIDUALS.items()}
