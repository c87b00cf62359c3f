"""denoiser(x_t [B, ...], t [] or [B], **cond) -> E[x0 | x_t] [B, ...]          and denoiser.schedule

The one contract. Teacher, student, EMA copy, guided teacher and oracle are all denoisers; they are changed by wrapping.
The table of prediction types stands here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from distill.schedule import Schedule, Table, expand


class DenoiserLike(Protocol):
    """What every function of this project takes: a call that returns E[x0 | x_t], and the schedule of x_t."""

    @property
    def schedule(self) -> Schedule: ...

    def __call__(self, x_t: Tensor, t: Tensor, **cond: Any) -> Tensor: ...


def _edm(a: Tensor, s: Tensor, sd: float):
    scale = (s * s + a * a * sd * sd).sqrt()
    return 1 / scale, a * sd * sd / scale**2, s * sd / scale


# x0 = c_skip x_t + c_out F(c_in x_t): name -> (alpha, sigma, sigma_data) -> c_in, c_skip, c_out
PREDICTIONS: dict[str, Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor, Tensor]]] = {
    "x0": lambda a, s, sd: (torch.ones_like(a), torch.zeros_like(a), torch.ones_like(a)),
    "eps": lambda a, s, sd: (torch.ones_like(a), 1 / a, -s / a),
    "v": lambda a, s, sd: (torch.ones_like(a), a / (a * a + s * s), -s / (a * a + s * s)),  # F = a eps - s x0
    "score": lambda a, s, sd: (torch.ones_like(a), 1 / a, s * s / a),
    "flow": lambda a, s, sd: (torch.ones_like(a), 1 / (a + s), -s / (a + s)),  # F = eps - x0
    "edm": _edm,
}


def to_output(prediction: str, schedule: Schedule, x_t: Tensor, x0: Tensor, t: Tensor, sigma_data: float = 0.5) -> Tensor:
    """The F of a row of `PREDICTIONS` that says x0 at x_t: (x0 - c_skip x_t) / c_out."""
    _, c_skip, c_out = PREDICTIONS[prediction](schedule.alpha(t), schedule.sigma(t), sigma_data)
    return (x0 - expand(c_skip, x_t) * x_t) / expand(c_out, x_t)


# What the network is told about the noise level: name -> (schedule, t) -> a number a sample
TIMES: dict[str, Callable[[Schedule, Tensor], Tensor]] = {
    "time": lambda schedule, t: t,
    "thousand_time": lambda schedule, t: 1000 * t,
    "index": lambda schedule, t: t * getattr(schedule, "steps", 1000) - 1,  # entry of a discrete table
    "level": lambda schedule, t: schedule.level(t),  # sigma / alpha
    "log_sigma": lambda schedule, t: -schedule.logsnr(t) / 8,  # ln(sigma / alpha) / 4 (Karras et al. 2022)
    "thousand_log_sigma": lambda schedule, t: -schedule.logsnr(t) * 125,  # 1000 ln(sigma / alpha) / 4
}


@dataclass(frozen=True)
class Denoiser:
    """E[x0 | x_t] from a network F: x0 = c_skip x_t + c_out F(c_in x_t, c_noise(t), **cond).

    A network of two times is also given ``to``, the time of the jump's end, in the same convention as t.

    ``net``: any module called as (x [B, ...], c_noise [B], **cond) -> [B, ...]; ``prediction``: a row of `PREDICTIONS`;
    ``time``: a row of `TIMES`; ``sigma_data``: used by "edm" alone. Raises ValueError for unknown names and for a
    prediction that divides by alpha on a schedule whose alpha reaches 0.
    """

    net: nn.Module
    schedule: Schedule
    prediction: str = "v"
    time: str = "time"
    sigma_data: float = 0.5

    def __post_init__(self):
        if self.prediction not in PREDICTIONS:
            raise ValueError(f"unknown prediction {self.prediction!r}: accepted are {', '.join(PREDICTIONS)}")
        if self.time not in TIMES:
            raise ValueError(f"unknown time convention {self.time!r}: accepted are {', '.join(TIMES)}")
        last = torch.tensor(self.schedule.t_max, dtype=torch.float64)
        if self.prediction in ("eps", "score") and self.schedule.alpha(last) < 1e-6:
            raise ValueError(
                f"prediction {self.prediction!r} divides by alpha, which is 0 at the end of this schedule: "
                "use a v, x0 or flow network here"
            )
        if self.time == "index" and not isinstance(self.schedule, Table):
            raise ValueError("time convention 'index' needs a schedule of kind 'table'")

    def __call__(self, x_t: Tensor, t: Tensor, **cond: Any) -> Tensor:
        c_in, c_skip, c_out = PREDICTIONS[self.prediction](self.schedule.alpha(t), self.schedule.sigma(t), self.sigma_data)
        c_noise = TIMES[self.time](self.schedule, t).to(x_t).expand(x_t.shape[0])
        if "to" in cond:
            cond["to"] = TIMES[self.time](self.schedule, cond["to"]).to(x_t).expand(x_t.shape[0])
        output = self.net(expand(c_in, x_t) * x_t, c_noise, **cond)
        return expand(c_skip, x_t) * x_t + expand(c_out, x_t) * output


@dataclass(frozen=True)
class Guided:
    """Classifier-free guidance: D(x, null) + scale (D(x, cond) - D(x, null)); scale 1 is no guidance (one call).

    ``null``: the condition that stands for "none", tensors of one row that are repeated over the batch.
    """

    denoiser: DenoiserLike
    null: dict[str, Tensor]
    scale: float

    @property
    def schedule(self) -> Schedule:
        return self.denoiser.schedule

    def __call__(self, x_t: Tensor, t: Tensor, **cond: Any) -> Tensor:
        conditional = self.denoiser(x_t, t, **cond)
        if self.scale == 1:
            return conditional
        null = {k: v.to(x_t.device).expand(x_t.shape[0], *v.shape[1:]) for k, v in self.null.items()}
        unconditional = self.denoiser(x_t, t, **cond | null)
        return unconditional + self.scale * (conditional - unconditional)


@dataclass(frozen=True)
class Rescheduled:
    """The same denoiser asked in the x_t and t of another schedule.

    E[x0 | x_t] depends on x_t only through the log-SNR and the scale: with the time of equal log-SNR, x_t is rescaled
    by the ratio of hypot(alpha, sigma), which stays finite where alpha is 0. Where there is more noise than the denoiser knows, as at
    pure noise for one of VE or EDM, it is asked at its own end.
    """

    denoiser: DenoiserLike
    schedule: Schedule

    def __call__(self, x_t: Tensor, t: Tensor, **cond: Any) -> Tensor:
        inner = self.denoiser.schedule
        u = inner.time(self.schedule.logsnr(t)).clamp(max=inner.t_max)
        scale = torch.hypot(inner.alpha(u), inner.sigma(u)) / torch.hypot(self.schedule.alpha(t), self.schedule.sigma(t))
        if "to" in cond:
            cond["to"] = inner.time(self.schedule.logsnr(cond["to"])).clamp(max=inner.t_max)
        return self.denoiser(expand(scale, x_t) * x_t, u, **cond)


def ask_in(denoiser: DenoiserLike, schedule: Schedule) -> DenoiserLike:
    """The denoiser, as one that is asked in the x_t and t of ``schedule``."""
    return denoiser if denoiser.schedule == schedule else Rescheduled(denoiser, schedule)
