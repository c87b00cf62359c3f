"""Likelihood of data under a denoiser: a variational bound, and the density of the probability flow. Both in nats per sample.

Both are computed on one axis, u = ln tan(phi / 2) with tan(phi) = sigma / alpha, from t_min to t_max. z = x_t / hypot(alpha, sigma) is

    z = cos(phi) x0 + sin(phi) eps        dz/du = cos(phi) z - D        (the probability flow)

on every schedule, and finite at both ends even with zero terminal SNR. The prior is the samplers' initial distribution,
N(0, sigma(t_max)^2); alpha(t_max) E|x0| should be small against sigma(t_max).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distill.denoiser import DenoiserLike
from distill.schedule import Schedule, add_noise, expand

LOWEST = -20.0  # lowest log-SNR of the bound; below it nothing of x0 is left (alpha may reach 0)


@dataclass(frozen=True)
class Bound:
    """Hold the terms of -log p(x0) <= prior + diffusion + decoder, each [B] in nats."""

    prior: Tensor
    diffusion: Tensor
    decoder: Tensor

    @property
    def total(self) -> Tensor:
        return self.prior + self.diffusion + self.decoder


@dataclass(frozen=True)
class Proposal:
    """Draw log-SNRs from a density that is constant between ``edges`` [K + 1], with probabilities ``mass`` [K], both float64."""

    edges: Tensor
    mass: Tensor

    @classmethod
    def uniform(cls, low: float, high: float) -> Proposal:
        """Return the uniform density from low to high."""
        return cls(torch.tensor([low, high], dtype=torch.float64), torch.ones(1, dtype=torch.float64))

    @classmethod
    def measured(cls, edges: Tensor, values: Tensor, floor: float = 0.05) -> Proposal:
        """Return a density proportional to ``values`` [K] at least 0, mixed with a part ``floor`` of the uniform one.

        The floor bounds the weights where the measured values are too small.
        """
        widths = edges.diff()
        mass = values.double() * widths
        return cls(edges, (1 - floor) * mass / mass.sum() + floor * widths / widths.sum())

    def __call__(self, share: Tensor) -> tuple[Tensor, Tensor]:
        """Return log-SNRs [B] at which the cumulative probability is ``share`` [B] in [0, 1], and 1 / density there."""
        ends = self.mass.cumsum(0)
        k = torch.searchsorted(ends, share, right=True).clamp(max=len(self.mass) - 1)
        wide = self.edges.diff()[k]
        inside = (share - (ends - self.mass)[k]) / self.mass[k]
        return self.edges[k] + wide * inside, wide / self.mass[k]


def span(schedule: Schedule) -> tuple[float, float]:
    """Return the log-SNRs over which the bound integrates, from t_max or `LOWEST` to t_min."""
    low, high = (float(v) for v in schedule.logsnr(schedule.ends()))
    return max(low, LOWEST), high


@torch.no_grad()
def integrand(denoiser: DenoiserLike, x0: Tensor, logsnr: Tensor, rng: torch.Generator, **cond: Any) -> Tensor:
    """Return exp(L) |x0 - D(x_t)|^2 / 2 at log-SNRs L [B] of x0 [B, ...] with new noise: float64 [B], nats per unit of L.

    Its expectation over the noise is the integrand of the diffusion term of `bound`.
    """
    schedule = denoiser.schedule
    t = schedule.time(logsnr).clamp(*sorted((schedule.t_min, schedule.t_max))).to(x0.dtype)
    x_t = add_noise(schedule, x0, _normal(x0, rng), t)
    error = (denoiser(x_t, t, **cond) - x0).square().flatten(1).sum(1).double().cpu()
    return logsnr.exp() * error / 2


@torch.no_grad()
def discrete(denoiser: DenoiserLike, x0: Tensor, rng: torch.Generator, steps: int, **cond: Any) -> Tensor:
    """Return the diffusion terms of a chain of T = ``steps`` equal steps in log-SNR, [steps, B] in nats, the noisiest first.

        L_t = KL[q(x_s | x_t, x0) | p(x_s | x_t)] = (snr(s) - snr(t)) |x0 - D(x_t, t)|^2 / 2        (VDM, 2107.00630, eq. 13)

    with one x_t per term. The sum falls to the diffusion term of `bound` as T grows.
    """
    edges = torch.linspace(*span(denoiser.schedule), steps + 1, dtype=torch.float64)
    gaps = edges.diff()
    return torch.stack(
        [
            torch.expm1(gap) * integrand(denoiser, x0, edge.expand(len(x0)), rng, **cond)
            for edge, gap in zip(edges, gaps, strict=False)
        ]
    )


@torch.no_grad()
def bound(
    denoiser: DenoiserLike,
    x0: Tensor,
    rng: torch.Generator,
    *,
    levels: int = 64,
    values: int | None = None,
    proposal: Proposal | None = None,
    **cond: Any,
) -> Bound:
    """Return the continuous-time variational bound (VDM, Kingma et al. 2107.00630, eq. 14) of x0 [B, ...], with L = log-SNR:

        prior      KL[N(alpha x0, sigma^2) | N(0, sigma^2)] at t_max = |x0|^2 exp(L(t_max)) / 2
        diffusion  1/2 int exp(L) E|x0 - D|^2 dL from t_max to t_min, Monte Carlo at ``levels`` stratified L a sample
        decoder    -log p(x0 | x_t) at t_min

    ``levels``: noise levels per sample. ``proposal``: the density of L; default is the uniform one. ``values``: the number of
    equidistant values in [-1, 1] of discrete data. The decoder is then a probability, proportional to N(x_t; alpha x0, sigma^2) over
    the values. For continuous data (None) it is a density,
    N(x0; x_t / alpha, (sigma / alpha)^2). The bound of an exact denoiser on continuous data is loose only by the smoothing at t_min,
    for a Gaussian ln(1 + level(t_min)^2 / std^2) / 2 per dimension.
    """
    schedule, axis = denoiser.schedule, tuple(range(1, x0.dim()))
    low, high = span(schedule)
    draw = proposal or Proposal.uniform(low, high)
    total = torch.zeros(len(x0), dtype=torch.float64)
    for k in range(levels):
        share = (k + torch.rand(len(x0), generator=rng, dtype=torch.float64)) / levels
        logsnr, weight = draw(share)
        total += integrand(denoiser, x0, logsnr, rng, **cond) * weight / levels
    level = float(schedule.level(schedule.ends()[1]))
    prior = x0.square().sum(axis).double().cpu() * (math.exp(low) / 2)
    return Bound(prior, total, _decoder(x0, _normal(x0, rng), level, values).cpu())


def _decoder(x0: Tensor, eps: Tensor, level: float, values: int | None) -> Tensor:
    axis = tuple(range(1, x0.dim()))
    if values is None:
        return (0.5 * eps.double().square() + 0.5 * math.log(2 * math.pi * level**2)).sum(axis)
    grid = torch.linspace(-1, 1, values, dtype=torch.float64, device=x0.device)
    y = x0.double() + level * eps.double()
    scores = -(y[..., None] - grid).square() / (2 * level**2)
    own = ((x0.double() + 1) * (values - 1) / 2).round().long().clamp(0, values - 1)
    return -scores.log_softmax(-1).gather(-1, own[..., None])[..., 0].sum(axis)


def flow(
    denoiser: DenoiserLike, x: Tensor, rng: torch.Generator, *, steps: int = 32, probes: int | None = 1, **cond: Any
) -> Tensor:
    """Return log p(x) [B] of the probability flow (Song et al. 2011.13456, eq. 39), the density of x_t / alpha at t_min.

    ``steps``: Runge-Kutta steps of order 4, equal in u, each with 4 evaluations and their derivatives. ``probes``: vectors of random
    signs that estimate the trace of dD/dx (Hutchinson), fixed along a path; None computes it exactly, one derivative per dimension.
    """
    schedule = denoiser.schedule
    angles = torch.atan(schedule.level(schedule.ends()))
    u = torch.tan(angles.flip(0) / 2).log()  # from the data to noise
    d, h = x[0].numel(), float(u[1] - u[0]) / steps
    signs = None if probes is None else [_signs(x, rng) for _ in range(probes)]

    def slope(z: Tensor, at: float) -> tuple[Tensor, Tensor]:
        return _slope(denoiser, z, at, signs, cond)

    z, change = x * math.cos(float(angles[1])), torch.zeros(len(x), dtype=torch.float64)
    for k in range(steps):
        at = float(u[0]) + k * h
        a, da = slope(z, at)
        b, db = slope(z + h / 2 * a, at + h / 2)
        c, dc = slope(z + h / 2 * b, at + h / 2)
        e, de = slope(z + h * c, min(at + h, float(u[1])))
        z = z + h / 6 * (a + 2 * b + 2 * c + e)
        change += h / 6 * (da + 2 * db + 2 * dc + de)
    scale = math.sin(float(angles[0]))  # z of pure noise
    prior = -0.5 * (z.double() / scale).square().flatten(1).sum(1).cpu() - d * math.log(scale * math.sqrt(2 * math.pi))
    return prior + change + d * math.log(math.cos(float(angles[1])))


def _slope(denoiser: DenoiserLike, z: Tensor, u: float, signs: list[Tensor] | None, cond: dict) -> tuple[Tensor, Tensor]:
    """Return dz/du [B, ...] and its divergence [B]."""
    schedule = denoiser.schedule
    phi = 2 * math.atan(math.exp(u))
    logsnr = torch.tensor(-2 * math.log(math.tan(phi)) if phi < math.pi / 2 else -math.inf, dtype=torch.float64)
    t = schedule.time(logsnr).clamp(schedule.t_min, schedule.t_max)
    norm = expand(torch.hypot(*schedule.at(t)), z)
    with torch.enable_grad():
        z = z.detach().requires_grad_(True)
        x0 = denoiser(norm * z, t, **cond)
        if signs is None:
            flat = x0.flatten(1)
            rows = [
                torch.autograd.grad(flat[:, i].sum(), z, retain_graph=True)[0].flatten(1)[:, i] for i in range(flat.shape[1])
            ]
            trace = torch.stack(rows).double().sum(0)
        else:
            pulled = [(torch.autograd.grad((x0 * v).sum(), z, retain_graph=True)[0] * v).flatten(1).sum(1) for v in signs]
            trace = torch.stack(pulled).double().mean(0)
    cosine = math.cos(phi)
    return (cosine * z - x0).detach(), cosine * z[0].numel() - trace.cpu()


def bits(nats: Tensor, dimensions: int, width: float = 1.0) -> Tensor:
    """Return -log p as bits per dimension. ``nats``: -log p per sample, of a density of data in bins of ``width``."""
    return (nats / dimensions - math.log(width)) / math.log(2)


def _normal(x: Tensor, rng: torch.Generator) -> Tensor:
    return torch.randn(x.shape, generator=rng).to(x)


def _signs(x: Tensor, rng: torch.Generator) -> Tensor:
    return (torch.randint(2, x.shape, generator=rng) * 2 - 1).to(x)
