"""Consistency models (Song et al. 2303.01469): f(x_t, t) is the end of the path through x_t, the same for every t of the path.

    x_s = move(x_t, x0_hat, t, s)                       one step along the path, s < t
    loss = w(t, s) d(f(x_t, t), sg f(x_s, s))           sg: no gradient

If x0_hat is a teacher's E[x0 | x_t], this is consistency distillation. If x0_hat is the data sample, it is consistency training. A mix
of both lies between them. f is the student itself, with f(x, t) = x at the time of the data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from distill.denoiser import DenoiserLike
from distill.distance import Distance, l2
from distill.grid import GRIDS
from distill.noise_paths import PathSteps, steps_from_noise
from distill.rng import Rng
from distill.schedule import Schedule, add_noise, expand, heun_x0, move, per_sample
from distill.self_conditioning import carrying, carrying_target, first_estimate
from distill.target import Target

HIGHEST = 80.0  # noise levels sigma / alpha above this count as this, the usual sigma_max


class Pairs(Protocol):
    """Draw the two times of a training step, (t, s), both [B], t with more noise. ``progress`` runs from 0 to 1."""

    def __call__(self, schedule: Schedule, rng: Rng, progress: float) -> tuple[Tensor, Tensor]: ...


def noise_level(schedule: Schedule, t: Tensor) -> Tensor:
    """Return sigma / alpha, the variable of the literature's formulas, clamped to `HIGHEST`."""
    return schedule.level(t).clamp(max=HIGHEST)


@dataclass(frozen=True)
class Neighbours:
    """Draw neighbouring times of a grid of N = ``steps(progress)`` steps. The last pair ends at the data.

    ``density``: None for uniform over pairs, or (mean, standard deviation) of ln sigma (iCT, Song & Dhariwal 2310.14189, eq. 10).
    ``grid``: a key of `GRIDS`; the papers use "karras".
    """

    steps: Callable[[float], int]
    density: tuple[float, float] | None = None
    grid: str = "karras"

    def times(self, schedule: Schedule, progress: float) -> Tensor:
        """Return the grid at this part of the training, float32 [N + 1]."""
        return GRIDS[self.grid](schedule, self.steps(progress)).float()

    def __call__(self, schedule: Schedule, rng: Rng, progress: float) -> tuple[Tensor, Tensor]:
        times = self.times(schedule, progress)
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
    """Draw pairs as ECT does (Geng et al. 2406.14548), with ln sigma_t ~ N(mean, deviation^2) and

        sigma_s = sigma_t max(0, 1 - q^-(stage + 1) (1 + k sigmoid(-b sigma_t)))

    ``stages``: how often the gap shrinks by the factor q over the run. sigma_s = 0 means that the target is the data sample.
    ``constant``: instead, sigma_s = sigma_t (1 - constant) throughout, for a student that mid-training has prepared (2509.24526).
    """

    mean: float = -1.1
    deviation: float = 2.0
    q: float = 2.0
    k: float = 8.0
    b: float = 1.0
    stages: int = 8
    constant: float | None = None

    def __call__(self, schedule: Schedule, rng: Rng, progress: float) -> tuple[Tensor, Tensor]:
        u = rng.uniform().double()
        sigma = torch.exp(self.mean + self.deviation * math.sqrt(2) * torch.erfinv(2 * u - 1)).clamp(1e-4, None)
        stage = min(int(progress * self.stages), self.stages - 1)
        gap = self.q ** -(stage + 1) * (1 + self.k * torch.sigmoid(-self.b * sigma))
        ratio = 1 - (gap if self.constant is None else torch.full_like(sigma, self.constant))
        t = schedule.time_of(sigma).clamp(max=schedule.t_max)
        t = torch.where(sigma >= HIGHEST, torch.full_like(t, schedule.t_max), t)
        s = schedule.time_of(sigma.clamp(max=HIGHEST) * ratio.clamp(min=0))
        return t.float(), torch.where(ratio <= 0, torch.full_like(s, schedule.t_clean), s).float()


def ct_steps(first: int = 2, last: int = 150) -> Callable[[float], int]:
    """Return N(k) = ceil(sqrt(k/K ((s1 + 1)^2 - s0^2) + s0^2) - 1) + 1 as a function of k/K (2303.01469, appendix C)."""
    return lambda progress: math.ceil(math.sqrt(progress * ((last + 1) ** 2 - first**2) + first**2) - 1) + 1


def ict_steps(first: int = 10, last: int = 1280) -> Callable[[float], int]:
    """Return N(k) = min(s0 2^floor(k / K'), s1) + 1, K' = floor(K / (log2 floor(s1 / s0) + 1)), of k/K (2310.14189, eq. 11)."""
    doublings = math.floor(math.log2(last // first)) + 1
    return lambda progress: min(first * 2 ** math.floor(progress * doublings), last) + 1


GapWeight = Callable[[Tensor, Tensor], Tensor]  # noise levels sigma_t, sigma_s, both [B] -> weight [B]


def one(t: Tensor, s: Tensor) -> Tensor:
    """Weight 1 (2303.01469)."""
    return torch.ones_like(t)


def inverse_gap(t: Tensor, s: Tensor) -> Tensor:
    """Weight 1 / (sigma_t - sigma_s) (iCT 2310.14189, ECT 2406.14548), or 1 / sigma_t where both levels count as `HIGHEST`."""
    return 1 / torch.where(t > s, t - s, t)


def inverse_level(t: Tensor, s: Tensor) -> Tensor:
    """Weight 1 + 1 / sigma_t."""
    return 1 + 1 / t.clamp(min=1e-3)


def truncated_snr(t: Tensor, s: Tensor) -> Tensor:
    """Weight max(1, 1 / sigma_t^2)."""
    return (1 / t.clamp(min=1e-3)).square().clamp(min=1)


GAP_WEIGHTS: dict[str, GapWeight] = {
    "one": one,
    "inverse_gap": inverse_gap,
    "inverse_level": inverse_level,
    "truncated_snr": truncated_snr,
}


@dataclass(frozen=True)
class Consistency:
    """Return the loss w(t, s) d(f(x_t, t), sg f(x_s, s)), [B], with one dropout mask on both sides.

    ``target``: x0_hat, the direction of the path. ``pairs``: where (t, s) is drawn. ``weight``, ``distance``: w and d.
    ``order``: 1 for Euler steps along the path, 2 for Heun steps, which evaluate the target twice.
    ``substeps``: steps between t and s. With a teacher, few long pairs of many substeps train faster than many short pairs: the error
    of the student's own output, f(x_s, s), then accumulates over fewer pairs between the data and pure noise.
    ``averaged``: take f(x_s, s) from the EMA of the student instead of the student.
    ``data_free``: (x_t, x_s) is a step of the target's own path from pure noise on the grid of ``pairs``, which must be `Neighbours`.
    A condition ``noise`` [B, ...] takes the place of new noise, see `distill.source`.
    """

    target: Target
    pairs: Pairs
    weight: GapWeight = one
    distance: Distance = l2
    order: int = 1
    substeps: int = 1
    averaged: bool = False
    data_free: bool = False

    def __call__(
        self,
        student: DenoiserLike,
        x0: Tensor,
        *,
        rng: Rng,
        progress: float,
        average: DenoiserLike | None = None,
        noise: Tensor | None = None,
        **cond: Any,
    ) -> Tensor:
        schedule = student.schedule
        if self.data_free:
            at = replace(self, target=carrying_target(self.target))._from_noise(schedule, x0, rng, progress, cond, noise)
            x_t, t, s, cond = at.x_t, at.t, at.s, at.cond
        else:
            t, s = self.pairs(schedule, rng, progress)
            x_t = add_noise(schedule, x0, rng.normal(x0) if noise is None else noise, t)
        previous = first_estimate(student, x_t, t, rng, **cond)
        with torch.no_grad():
            walking = replace(self, target=carrying_target(self.target, previous))
            x_s = at.x_s if self.data_free else walking._path(schedule, x_t, t, s, x0, **cond)
            with same_dropout(x0.device):
                f = average if self.averaged and average is not None else student
                f_s = with_boundary(carrying(f, previous), x_s, s, **cond)
        weight = self.weight(noise_level(schedule, t), noise_level(schedule, s))
        distance = self.distance(carrying(student, previous)(x_t, t, **cond), f_s)
        return expand(weight, distance) * distance

    def _from_noise(
        self, schedule: Schedule, x0: Tensor, rng: Rng, progress: float, cond: dict[str, Any], noise: Tensor | None
    ) -> PathSteps:
        """Return steps of the target's paths from noise on the grid of the pairs."""
        assert isinstance(self.pairs, Neighbours)
        times = self.pairs.times(schedule, progress)

        def step(x: Tensor, i: int, **cond: Any) -> Tensor:
            t, s = (time.expand(len(x)) for time in times[i : i + 2])
            return self._path(schedule, x, t, s, x, **cond)

        return steps_from_noise(step, schedule, times, x0, rng, cond, noise)

    def _path(self, schedule: Schedule, x_t: Tensor, t: Tensor, s: Tensor, x0: Tensor, **cond: Any) -> Tensor:
        """Return x_s on the target's path, after ``substeps`` steps of equal length in t."""
        low = s.clamp(min=schedule.t_min) if math.isinf(schedule.t_clean) else s
        times = [t, *(t + (low - t) * (k / self.substeps) for k in range(1, self.substeps)), s]
        for here, there in pairwise(times):
            x_t = self._step(schedule, x_t, here, there, x0, **cond)
        return x_t

    def _step(self, schedule: Schedule, x_t: Tensor, t: Tensor, s: Tensor, x0: Tensor, **cond: Any) -> Tensor:
        """Take one Euler or Heun step in sigma / alpha. A Heun step that is infinite in log-SNR is an Euler step."""
        x0_hat = self.target(schedule, x_t, t, x0, **cond)
        euler = move(schedule, x_t, x0_hat, t, s)
        if self.order == 1:
            return euler
        corrected = heun_x0(schedule, x_t, x0_hat, t, euler, self.target(schedule, euler, s, x0, **cond), s)
        finite = (schedule.logsnr(s) - schedule.logsnr(t)).isfinite()
        return torch.where(per_sample(finite, x_t), move(schedule, x_t, corrected, t, s), euler)


def with_boundary(f: DenoiserLike, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
    """Enforce the boundary condition f(x, t_clean) = x.

    eps, v, flow and edm networks satisfy it by construction. x0 networks do not, nor does any network on a schedule with t_clean at
    -inf.
    """
    schedule = f.schedule
    clean = t <= schedule.t_clean
    out = f(x, torch.where(clean, torch.full_like(t, schedule.t_min), t), **cond)
    return torch.where(per_sample(clean, x), x, out)


@contextmanager
def same_dropout(device: torch.device) -> Iterator[None]:
    """Restore the global random state afterwards, on the CPU and on ``device``, so that the next forward pass repeats the masks."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        yield
