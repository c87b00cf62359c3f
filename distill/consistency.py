"""Consistency models (Song et al. 2023): f(x_t, t) says where the path through x_t ends, the same from every t of the path.

    x_s = move(x_t, x0_hat, t, s)          one step along the path
    loss = w(t, s) d(f(x_t, t), sg f(x_s, s))

With x0_hat a teacher's E[x0 | x_t] this is consistency distillation, with x0_hat the datum consistency training, between them a
mix. f is the student itself, and x at the time of the data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from distill.denoiser import DenoiserLike
from distill.distance import Distance, l2
from distill.grid import GRIDS
from distill.rng import Rng
from distill.schedule import Schedule, add_noise, move, to_eps, to_x0
from distill.target import Target

HIGHEST = 80.0  # sigma / alpha above which levels count as one: the usual sigma_max


class Pairs(Protocol):
    """(t, s), both [B], t with more noise: the two times of a training step. ``progress`` runs from 0 to 1."""

    def __call__(self, schedule: Schedule, rng: Rng, progress: float) -> tuple[Tensor, Tensor]: ...


def level(schedule: Schedule, t: Tensor) -> Tensor:
    """sigma / alpha, the noise level in which the literature's formulas stand, at most `HIGHEST`."""
    return schedule.level(t).clamp(max=HIGHEST)


@dataclass(frozen=True)
class Neighbours:
    """Neighbouring times of a grid of N steps, N = ``steps(progress)``; the last pair ends at the data.

    ``grid``: a name of `GRIDS`, Karras' in the papers. ``density``: None for uniform over pairs, or (mean, deviation) of ln sigma
    (iCT, Song & Dhariwal 2023, eq. 10).
    """

    steps: Callable[[float], int]
    density: tuple[float, float] | None = None
    grid: str = "karras"

    def __call__(self, schedule: Schedule, rng: Rng, progress: float) -> tuple[Tensor, Tensor]:
        times = GRIDS[self.grid](schedule, self.steps(progress)).float()
        u = rng.uniform()
        times = times.to(u.device)
        if self.density is None:
            i = (u * (len(times) - 1)).long()
        else:
            mean, deviation = self.density
            sigma = schedule.level(times.double())  # from infinity, where alpha is 0, to 0
            cumulative = torch.erf((sigma.log() - mean) / (deviation * math.sqrt(2)))
            probability = (cumulative[:-1] - cumulative[1:]).clamp(min=0)
            edges = (probability / probability.sum()).cumsum(0)
            i = torch.searchsorted(edges, u.double()).clamp(max=len(times) - 2)
        return times[i], times[i + 1]


@dataclass(frozen=True)
class Gap:
    """ECT (Geng et al. 2024): ln sigma_t normal; sigma_s = sigma_t max(0, 1 - q^-(stage + 1) (1 + k sigmoid(-b sigma_t))).

    ``stages`` doublings, or multiplications by q, of the closeness over the run; sigma_s = 0, the datum, while it is negative.
    """

    mean: float = -1.1
    deviation: float = 2.0
    q: float = 2.0
    k: float = 8.0
    b: float = 1.0
    stages: int = 8

    def __call__(self, schedule: Schedule, rng: Rng, progress: float) -> tuple[Tensor, Tensor]:
        u = rng.uniform().double()
        sigma = torch.exp(self.mean + self.deviation * math.sqrt(2) * torch.erfinv(2 * u - 1)).clamp(1e-4, None)
        stage = min(int(progress * self.stages), self.stages - 1)
        ratio = 1 - self.q ** -(stage + 1) * (1 + self.k * torch.sigmoid(-self.b * sigma))
        t = schedule.time(-2 * sigma.log()).clamp(max=schedule.t_max)
        t = torch.where(sigma >= HIGHEST, torch.full_like(t, schedule.t_max), t)
        s = schedule.time(-2 * (sigma.clamp(max=HIGHEST) * ratio.clamp(min=0)).log())
        return t.float(), torch.where(ratio <= 0, torch.full_like(s, schedule.t_clean), s).float()


def ct_steps(first: int = 2, last: int = 150) -> Callable[[float], int]:
    """N(k) = ceil(sqrt(k/K ((s1 + 1)^2 - s0^2) + s0^2) - 1) + 1 (Song et al. 2023, appendix C)."""
    return lambda progress: math.ceil(math.sqrt(progress * ((last + 1) ** 2 - first**2) + first**2) - 1) + 1


def ict_steps(first: int = 10, last: int = 1280) -> Callable[[float], int]:
    """N(k) = min(s0 2^floor(k / K'), s1) + 1, K' = floor(K / (log2 floor(s1 / s0) + 1)) (Song & Dhariwal 2023, eq. 11)."""
    doublings = math.floor(math.log2(last // first)) + 1
    return lambda progress: min(first * 2 ** math.floor(progress * doublings), last) + 1


# name -> (sigma_t, sigma_s), both over alpha -> weight of the distance
GAP_WEIGHTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "one": lambda t, s: torch.ones_like(t),
    "inverse_gap": lambda t, s: 1 / (t - s).clamp(min=1e-4),
    "inverse_level": lambda t, s: 1 + 1 / t.clamp(min=1e-3),
    "truncated_snr": lambda t, s: (1 / t.clamp(min=1e-3)).square().clamp(min=1),
}


@dataclass(frozen=True)
class Consistency:
    """w(t, s) d(f(x_t, t), sg f_target(x_s, s)) with the same dropout mask on both sides.

    ``order``: 1 for an Euler step along x0_hat, 2 for a Heun step (a teacher's, which is asked again at s). ``substeps``: how
    many of them lie between t and s; with a teacher, few long pairs of many substeps train faster than many short pairs, since
    what is right at the data reaches pure noise over fewer of the student's own answers. ``averaged``: the
    target network is the EMA of the student, otherwise the student itself.
    """

    target: Target
    pairs: Pairs
    weight: str = "one"
    distance: Distance = l2
    order: int = 1
    substeps: int = 1
    averaged: bool = False

    def __call__(
        self, student: DenoiserLike, x0: Tensor, *, rng: Rng, progress: float, average: DenoiserLike | None = None, **cond: Any
    ) -> Tensor:
        schedule = student.schedule
        t, s = self.pairs(schedule, rng, progress)
        x_t = add_noise(schedule, x0, rng.normal(x0), t)
        with torch.no_grad():
            x_s = self._path(schedule, x_t, t, s, x0, **cond)
            with same_dropout(x0.device):
                f_s = bounded(average if self.averaged and average is not None else student, x_s, s, **cond)
        weight = GAP_WEIGHTS[self.weight](level(schedule, t), level(schedule, s))
        return weight * self.distance(student(x_t, t, **cond), f_s)

    def _path(self, schedule: Schedule, x_t: Tensor, t: Tensor, s: Tensor, x0: Tensor, **cond: Any) -> Tensor:
        """x_s along the target's path, in ``substeps`` steps of equal length in t."""
        low = s.clamp(min=schedule.t_min) if math.isinf(schedule.t_clean) else s
        times = [t, *(t + (low - t) * (k / self.substeps) for k in range(1, self.substeps)), s]
        for here, there in pairwise(times):
            x_t = self._step(schedule, x_t, here, there, x0, **cond)
        return x_t

    def _step(self, schedule: Schedule, x_t: Tensor, t: Tensor, s: Tensor, x0: Tensor, **cond: Any) -> Tensor:
        """One Euler or Heun step (in sigma / alpha); Heun steps that are infinite in log-SNR are Euler's."""
        x0_hat = self.target(schedule, x_t, t, x0, **cond)
        x_s = move(schedule, x_t, x0_hat, t, s)
        if self.order == 1:
            return x_s
        eps = to_eps(schedule, x_t, x0_hat, t) + to_eps(schedule, x_s, self.target(schedule, x_s, s, x0, **cond), s)
        again = move(schedule, x_t, to_x0(schedule, x_t, eps / 2, t), t, s)
        finite = (schedule.logsnr(s) - schedule.logsnr(t)).isfinite()
        return torch.where(finite.reshape(-1, *[1] * (x_t.dim() - 1)), again, x_s)


def bounded(f: DenoiserLike, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
    """f(x, t), and x itself where t is the time of the data: the boundary that an eps, v, flow or edm network meets by itself, and
    an x0 network, or any on a schedule whose data lie at -inf, does not."""
    schedule = f.schedule
    clean = t <= schedule.t_clean
    out = f(x, torch.where(clean, torch.full_like(t, schedule.t_min), t), **cond)
    return torch.where(clean.reshape(-1, *[1] * (x.dim() - 1)), x, out)


@contextmanager
def same_dropout(device: torch.device) -> Iterator[None]:
    """Inside, the global random numbers are used without being used up, on the CPU and on ``device``: what comes after draws
    the same masks again."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        yield
