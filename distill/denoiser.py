"""denoiser(x_t [B, ...], t [] or [B], to=None, **cond) -> E[x0 | x_t], [B, ...]         and denoiser.schedule

This is the one contract. Teacher, student, EMA copy, guided teacher and oracle are all denoisers. Wrap a denoiser to change it.
``to`` is the end of the jump, [] or [B], for two-time (flow-map) networks; all other denoisers ignore it or refuse it. Times are on
the CPU or on the device of x_t; the CPU is faster, see `distill.device`.
The table of prediction types is in this file and in no other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from distill.device import send
from distill.schedule import Schedule, Table, coefficients, expand, expand_all, is_number, numbers, scaled, weighted


class DenoiserLike(Protocol):
    """A call that returns E[x0 | x_t], and the schedule of x_t. Samplers, losses and metrics require nothing else."""

    @property
    def schedule(self) -> Schedule: ...

    def __call__(self, x_t: Tensor, t: Tensor, to: Tensor | None = None, **cond: Any) -> Tensor: ...


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
    "edm": _edm,  # 2206.00364, Table 1
}


def to_output(prediction: str, schedule: Schedule, x_t: Tensor, x0: Tensor, t: Tensor, sigma_data: float = 0.5) -> Tensor:
    """Return the network output F that means x0 at x_t: (x0 - c_skip x_t) / c_out, with a row of `PREDICTIONS`."""
    _, *skip_and_out = PREDICTIONS[prediction](*schedule.at(t), sigma_data)
    c_skip, c_out = expand_all(skip_and_out, x_t)
    return (x0 - c_skip * x_t) / c_out


def score(denoiser: DenoiserLike, x_t: Tensor, t: Tensor, **cond: Any) -> Tensor:
    """Return the gradient of log p(x_t) by Tweedie's formula, (alpha E[x0 | x_t] - x_t) / sigma^2, [B, ...] like x_t. t is [] or [B]."""
    alpha, variance = coefficients(_alpha_and_variance, denoiser.schedule, x_t, t)
    return (scaled(alpha, denoiser(x_t, t, **cond)) - x_t) / variance


def _alpha_and_variance(schedule: Schedule, t: Tensor) -> tuple[Tensor, Tensor]:
    alpha, sigma = schedule.at(t)
    return alpha, sigma.square()


def _index(schedule: Schedule, t: Tensor) -> Tensor:
    assert isinstance(schedule, Table)
    return t * schedule.steps - 1


# The time input of the network, c_noise: name -> (schedule, t) -> one number per sample
TIMES: dict[str, Callable[[Schedule, Tensor], Tensor]] = {
    "time": lambda schedule, t: t,
    "thousand_time": lambda schedule, t: 1000 * t,
    "index": _index,  # entry of a discrete table
    "level": lambda schedule, t: schedule.level(t),  # sigma / alpha
    "log_sigma": lambda schedule, t: -schedule.logsnr(t) / 8,  # ln(sigma / alpha) / 4 (2206.00364)
    "thousand_log_sigma": lambda schedule, t: -schedule.logsnr(t) * 125,  # 1000 ln(sigma / alpha) / 4
}


def _coefficients(
    schedule: Schedule, prediction: str, sigma_data: float, time: str, t: Tensor, *to: Tensor
) -> Iterable[Tensor]:
    """Return c_in, c_skip, c_out and c_noise at t, and c_noise at the end of the jump."""
    scales = PREDICTIONS[prediction](*schedule.at(t), sigma_data)
    return *scales, *(TIMES[time](schedule, z) for z in (t, *to))


def _per_sample(c_noise: Tensor | float, x_t: Tensor) -> Tensor:
    """Return c_noise as [B] in the dtype of x_t [B, ...], on its device."""
    if isinstance(c_noise, Tensor):
        return send(c_noise.flatten().expand(x_t.shape[0]), x_t.device)
    return x_t.new_full(x_t.shape[:1], c_noise)


@dataclass(frozen=True)
class Denoiser:
    """Turn a network F into E[x0 | x_t] = c_skip x_t + c_out F(c_in x_t, c_noise(t), **cond).

    ``net``: any module called as (x [B, ...], c_noise [B], **cond) -> [B, ...]. A two-time network also takes ``to`` [B], the end
    of the jump in the same convention as c_noise. ``prediction``: a row of `PREDICTIONS`. ``time``: a row of `TIMES`.
    ``sigma_data``: standard deviation of the data, used by prediction "edm" only.

    Raises ValueError for an unknown prediction or time, for "index" without a discrete table, and for a prediction that divides by
    alpha on a schedule whose alpha reaches 0.
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
        if self.prediction in ("eps", "score") and self.schedule.alpha(self.schedule.ends()[0]) < 1e-6:
            raise ValueError(
                f"prediction {self.prediction!r} divides by alpha, which is 0 at the end of this schedule: "
                "use a v, x0 or flow network here"
            )
        if self.time == "index" and not isinstance(self.schedule, Table):
            raise ValueError("time convention 'index' needs a schedule of kind 'table'")

    def __call__(self, x_t: Tensor, t: Tensor, to: Tensor | None = None, **cond: Any) -> Tensor:
        times = (t,) if to is None else (t, to)
        row = self.prediction, self.sigma_data, self.time
        c_in, c_skip, c_out, *c_noise = coefficients(_coefficients, self.schedule, x_t, *row, *times)
        at, *end = (_per_sample(c, x_t) for c in c_noise)
        output = self.net(scaled(c_in, x_t), at, **({"to": end[0]} if end else {}), **cond)
        return weighted(c_skip, x_t, c_out, output)


@dataclass(frozen=True)
class Guided:
    """Apply classifier-free guidance (2207.12598): D(x, null) + scale (D(x, cond) - D(x, null)).

    ``null``: the conditions of an unconditional call, tensors of one row that are repeated over the batch. ``scale``: 1 means no
    guidance; None takes the scale of each sample from the condition ``guidance`` [B]. Both halves are one batch of 2 B, and the memory
    that such a batch needs. Conditions whose shapes differ, or that one half lacks, take two calls. ``norm``: x_t minus the result keeps
    this norm of x_t - D(x, cond), as Qwen-Image needs it (2508.02324); None keeps none.
    """

    denoiser: DenoiserLike
    null: dict[str, Tensor]
    scale: float | None
    norm: Callable[[Tensor], Tensor] | None = None

    @property
    def schedule(self) -> Schedule:
        return self.denoiser.schedule

    def __call__(self, x_t: Tensor, t: Tensor, to: Tensor | None = None, **cond: Any) -> Tensor:
        if self.scale == 1:
            return self.denoiser(x_t, t, to=to, **cond)
        scale = expand(cond.pop("guidance"), x_t) if self.scale is None else self.scale
        null = {k: send(v, x_t.device).expand(x_t.shape[0], *v.shape[1:]) for k, v in self.null.items()}
        if all(isinstance(cond.get(k), Tensor) and cond[k].shape == v.shape for k, v in null.items()):
            batch = len(x_t)
            both = {k: _joined(v, null.get(k, v), batch) for k, v in cond.items()}
            ends = _joined(t, t, batch), _joined(to, to, batch)
            conditional, unconditional = self.denoiser(torch.cat([x_t, x_t]), *ends, **both).chunk(2)
        else:
            conditional, unconditional = (self.denoiser(x_t, t, to=to, **c) for c in (cond, cond | null))
        x0 = torch.lerp(unconditional, conditional, scale)
        if self.norm is None:
            return x0
        return x_t - (x_t - x0) * (self.norm(x_t - conditional) / self.norm(x_t - x0))


def _joined(one: Any, two: Any, batch: int) -> Any:
    """Return the rows of both, [2 B, ...]; ``one`` itself where it has no row per sample."""
    rows = isinstance(one, Tensor) and one.dim() > 0 and len(one) == batch
    return torch.cat([one, two]) if rows else one


@dataclass(frozen=True)
class Rescheduled:
    """Evaluate a denoiser at the x_t and t of another schedule.

    E[x0 | x_t] depends on x_t only through the log-SNR and the scale. The time of equal log-SNR is taken, and x_t is rescaled by the
    ratio of hypot(alpha, sigma), which is finite where alpha is 0. Noise levels above the denoiser's range are clamped to its t_max,
    such as pure noise for a VE or EDM network.
    """

    denoiser: DenoiserLike
    schedule: Schedule

    def __call__(self, x_t: Tensor, t: Tensor, to: Tensor | None = None, **cond: Any) -> Tensor:
        times = (t,) if to is None else (t, to)
        if all(map(is_number, times)):
            scale, *found = numbers(_rescheduled, self, *times)
            u, *end = (torch.full_like(t, number) for number in found)
            x = scale * x_t
        else:
            factor, u, *end = _rescheduled(self, *times)
            x = expand(factor, x_t) * x_t
        return self.denoiser(x, u, to=end[0] if end else None, **cond)

    @cached_property
    def _numbers(self) -> dict[tuple, tuple[float, ...]]:
        """What `numbers` has computed."""
        return {}


def _rescheduled(wrapped: Rescheduled, t: Tensor, *to: Tensor) -> Iterable[Tensor]:
    """Return the factor of x_t, and the times of the wrapped denoiser at t and at the end of the jump."""
    inner, outer = wrapped.denoiser.schedule, wrapped.schedule
    u, *end = (inner.time(outer.logsnr(z)).clamp(max=inner.t_max) for z in (t, *to))
    return torch.hypot(*inner.at(u)) / torch.hypot(*outer.at(t)), u, *end


def on_schedule(denoiser: DenoiserLike, schedule: Schedule) -> DenoiserLike:
    """Return the denoiser as a function of the x_t and t of ``schedule``; unchanged if it has this schedule already."""
    return denoiser if denoiser.schedule == schedule else Rescheduled(denoiser, schedule)


def network_of(denoiser: DenoiserLike) -> Denoiser:
    """Return the denoiser with a network that guidance, another schedule or autocast wrap. Raises ValueError where there is none."""
    while not isinstance(denoiser, Denoiser) and hasattr(denoiser, "denoiser"):
        denoiser = denoiser.denoiser
    if not isinstance(denoiser, Denoiser):
        raise ValueError("this method trains a copy of the teacher's network, and this teacher has no network")
    return denoiser


AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class _Autocast(nn.Module):
    """Call a network under autocast, and return its output in the dtype of x. It is ``module``, as in other wrappers of PyTorch."""

    def __init__(self, net: nn.Module, dtype: torch.dtype):
        super().__init__()
        self.module, self.dtype = net, dtype

    def forward(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        if x.device.type == "meta":  # which has no autocast
            return self.module(x, t, **cond)
        with torch.autocast(x.device.type, self.dtype):
            return self.module(x, t, **cond).to(x.dtype)


Like = TypeVar("Like", bound=DenoiserLike)


def under_autocast(denoiser: Like, precision: str) -> Like:
    """Return the denoiser with its networks, wrapped ones too, under autocast; coefficients stay in float32.

    ``precision``: "bf16" or "fp16"; any other name leaves the denoiser unchanged. So do oracles, which have no network.
    """
    if precision not in AUTOCAST:
        return denoiser
    if isinstance(denoiser, Denoiser):
        return replace(denoiser, net=_Autocast(denoiser.net, AUTOCAST[precision]))
    if hasattr(denoiser, "denoiser"):
        return replace(denoiser, denoiser=under_autocast(denoiser.denoiser, precision))  # type: ignore[type-var]
    if hasattr(denoiser, "experts"):
        return replace(denoiser, experts=tuple(under_autocast(one, precision) for one in denoiser.experts))  # type: ignore[type-var]
    return denoiser
