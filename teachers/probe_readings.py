"""Readings of a network, and how well each of them denoises.

A reading is a choice of prediction, time input, sigma_data and data range. It determines how the network's output becomes E[x0 | x_t].
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distill.denoiser import PREDICTIONS, TIMES, Denoiser, DenoiserLike
from distill.schedule import Schedule, Table, add_noise, expand
from teachers.codec import Codec
from teachers.diffusers_scheduler import table_of

PRECISION = 0.05  # part of its output's variance by which a trained network may be wrong
SIGMAS = 4.0  # one false alarm in 1,000 probes of a dozen levels and a dozen readings
LATENT_SCALES = (0.18215, 0.13025, 0.3611, 1.5305)  # scaling factors of the autoencoders of SD 1 and 2, SDXL, Flux, SD 3
STATED = "as stated"
TABLES: dict[str, dict] = {  # of published models, as diffusers spells them
    "linear": {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02},
    "scaled_linear 0.00085 to 0.012": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "squaredcos_cap_v2": {"beta_schedule": "squaredcos_cap_v2"},
}


@dataclass(frozen=True)
class Reading:
    """Hold one way to read a network, as made for the data ``scale`` x0 + ``shift``.

    ``prediction``: a key of `PREDICTIONS`. ``time``: a key of `TIMES`. ``reverse``: the time axis is reversed. ``sign``: of the output,
    -1 for a velocity from noise to data. ``table``: the name and value of the discrete table that the network was trained on, if it is
    not the stated schedule.
    """

    prediction: str
    time: str
    sigma_data: float = 0.5
    reverse: bool = False
    scale: float = 1.0
    shift: float = 0.0
    table: tuple[str, Table] | None = None
    sign: float = 1.0

    def against(self, stated: Reading) -> str:
        """Return the difference from the stated reading in words."""
        if self == stated:
            return STATED
        parts = []
        if self.prediction != stated.prediction:
            parts.append(f"prediction {self.prediction}")
        if self.time != stated.time:
            parts.append(f"time {self.time}")
        if self.table is not None:
            parts.append(f"table {self.table[0]}")
        if self.reverse:
            parts.append("time=reversed" if self.sign < 0 else "time axis reversed")
        if self.sigma_data != stated.sigma_data:
            parts.append(f"sigma_data {self.sigma_data:g}")
        if self.shift:
            parts.append("network made for data in [0, 1]" if self.scale == 0.5 else "data passed in as [0, 1]")
        elif self.scale != 1:
            parts.append(f"latents times {self.scale:g}")
        return ", ".join(parts)


@dataclass(frozen=True)
class ProbeData:
    """Hold data x0 and noise eps [N, ...] with their conditions, and the mean and variance per pixel over all data."""

    x0: Tensor
    eps: Tensor
    cond: dict[str, Tensor]
    mean: Tensor
    variance: Tensor

    def first(self, n: int) -> ProbeData:
        """Return the first ``n`` samples, with the mean and variance of all."""
        return replace(self, x0=self.x0[:n], eps=self.eps[:n], cond={k: v[:n] for k, v in self.cond.items()})

    def bound(self, logsnr: float) -> float:
        """Return the mean squared error per pixel of the best linear denoiser: the mean of v l^2 / (v + l^2), l^2 = exp(-logsnr)."""
        square = math.exp(-logsnr)
        return float((self.variance * square / (self.variance + square)).mean())


@dataclass(frozen=True)
class ProbeResult:
    """Hold D(x_t) per level, squared errors per sample [L, N], and each level's log-SNR, bound and slack [L]."""

    x0: list[Tensor]
    errors: Tensor
    logsnr: Tensor
    bound: Tensor
    slack: Tensor

    @property
    def error(self) -> Tensor:
        """The mean squared error per pixel, [L]."""
        return self.errors.mean(1)

    @property
    def deviation(self) -> Tensor:
        """The standard error of `error`, [L]."""
        return self.errors.std(1) / self.errors.shape[1] ** 0.5

    @property
    def allowed(self) -> Tensor:
        """The largest error of a denoiser: bound, slack, and `SIGMAS` standard errors of what was measured, [L]."""
        return self.bound + self.slack + SIGMAS * self.deviation

    @property
    def misfit(self) -> float:
        """The mean over levels of log(error / (bound + slack)); below 0 for a denoiser."""
        return float((self.error / (self.bound + self.slack)).log().mean())

    def gain(self, other: ProbeResult) -> float:
        """Return by how much the misfit is lower than another's, over the levels that both were evaluated at."""
        same = self._shared(other)
        fits = [(r.error / (r.bound + r.slack)).log()[same].mean() for r in (other, self)]
        return float(fits[0] - fits[1]) if same.any() else -math.inf

    def beats(self, other: ProbeResult) -> bool:
        """Return whether the misfit is lower by `SIGMAS` standard errors, paired over the same images and noise, and by 0.001."""
        same = self._shared(other)
        # the delta method for the mean of log(error)
        relative = (other.errors / other.error[:, None] - self.errors / self.error[:, None])[same].mean(0)
        deviation = float(relative.std()) / len(relative) ** 0.5
        return self.gain(other) > SIGMAS * max(deviation, 2.5e-4)

    def _shared(self, other: ProbeResult) -> Tensor:
        """Return which levels are the same, bool [L]. A table ends at a noise level of its own."""
        return (self.logsnr - other.logsnr).abs() < 0.05


def logsnr_range(schedule: Schedule) -> tuple[float, float]:
    """Return the lowest and the highest log-SNR at which a network may be evaluated."""
    low, high = schedule.logsnr(schedule.ends()).tolist()
    return low, high


def readings_near(stated: Reading, schedule: Schedule, codec: Codec | None) -> list[Reading]:
    """Return the stated reading, and all that differ from it in one thing."""
    times = [t for t in TIMES if t != "index" or isinstance(schedule, Table)]
    out = [stated, *(replace(stated, prediction=p) for p in PREDICTIONS if p != stated.prediction)]
    out += [replace(stated, time=t) for t in times if t != stated.time] + [replace(stated, reverse=True)]
    if stated.prediction == "flow":
        out.append(replace(stated, reverse=True, sign=-1.0))
    if isinstance(schedule, Table):
        out += [replace(stated, table=table) for table in tables_near(schedule)]
    if stated.prediction == "edm":
        out += [replace(stated, sigma_data=stated.sigma_data * factor) for factor in (0.5, 2.0)]
    if codec is None:
        return [*out, replace(stated, scale=0.5, shift=0.5), replace(stated, scale=2.0, shift=-1.0)]
    own = () if isinstance(codec.scale, list) else (codec.scale,)
    scales = {*own, *LATENT_SCALES} - {1.0}
    return out + [replace(stated, scale=scale) for s in sorted(scales) for scale in (s, 1 / s)]


def tables_near(stated: Table) -> list[tuple[str, Table]]:
    """Return names and values of other tables of as many entries: those of `TABLES`, and the stated one with zero terminal SNR."""
    entries = torch.tensor((1.0, *stated.alphas_cumprod), dtype=torch.float64)
    same = {"trained_betas": (1 - entries[1:] / entries[:-1]).tolist(), "rescale_betas_zero_snr": True}
    tables = [(name, table_of({"num_train_timesteps": stated.steps, **options})) for name, options in TABLES.items()]
    if stated.steps > 1 and entries[-1] > 0:
        tables.append(("with zero terminal SNR", table_of({"num_train_timesteps": stated.steps, **same})))
    return [(name, table) for name, table in tables if not _alike(table, stated)]


def _alike(one: Table, other: Table) -> bool:
    """Return whether two tables differ only by rounding."""
    a, b = (torch.tensor(table.alphas_cumprod).sqrt() for table in (one, other))
    return bool(torch.allclose(a, b, rtol=0, atol=1e-4))


def evaluate_readings(d: Denoiser, readings: list[Reading], data: ProbeData, grid: Tensor) -> dict[Reading, ProbeResult]:
    """Return the result of each reading at the log-SNRs ``grid`` [L].

    Readings that repeat an earlier result, or that the network cannot be evaluated with, are left out.
    """
    out: dict[Reading, ProbeResult] = {}
    outputs: dict[tuple, Tensor] = {}
    for reading in readings:
        try:
            result = _evaluate(d, reading, data, grid, outputs)
        except (RuntimeError, IndexError):  # a learned time embedding refuses fractions, for example
            if not out:
                raise
            continue
        if not any(torch.allclose(result.errors, other.errors, rtol=1e-4) for other in out.values()):
            out[reading] = result
    return out


def _evaluate(d: Denoiser, reading: Reading, data: ProbeData, grid: Tensor, outputs: dict[tuple, Tensor]) -> ProbeResult:
    """Return the result of one reading. ``outputs`` holds the network's outputs for inputs that readings share."""
    schedule: Schedule = d.schedule if reading.table is None else reading.table[1]
    x0s, levels, own = [], [], []
    low, high = logsnr_range(schedule)
    gain = 2 * math.log(reading.scale)
    for level in grid:
        u = schedule.time((level - gain).clamp(low, high))
        c_noise = TIMES[reading.time](schedule, schedule.t_max + schedule.t_min - u if reading.reverse else u)
        a, s = schedule.alpha(u), schedule.sigma(u)
        c_in, c_skip, c_out = PREDICTIONS[reading.prediction](a, s, reading.sigma_data)
        x_t = add_noise(schedule, reading.scale * data.x0 + reading.shift, data.eps, u)
        key = (float(a), float(s), float(c_noise), float(c_in), reading.scale, reading.shift)
        if key not in outputs:
            outputs[key] = d.net(expand(c_in, x_t) * x_t, c_noise.to(x_t).expand(len(x_t)), **data.cond)
        x0 = expand(c_skip, x_t) * x_t + expand(reading.sign * c_out, x_t) * outputs[key]
        x0s.append((x0 - reading.shift) / reading.scale)
        levels.append(float(schedule.logsnr(u)) + gain)
        own.append(float((1 - c_skip * a) ** 2 * data.variance.mean().cpu() + (c_skip * s / reading.scale) ** 2))
    return _result(x0s, data, levels, own)


def evaluate_oracle(denoiser: DenoiserLike, data: ProbeData, grid: Tensor) -> ProbeResult:
    """Return the result of a denoiser that is not a network, at the log-SNRs ``grid`` [L]."""
    schedule, x0s = denoiser.schedule, []
    for level in grid:
        u = schedule.time(level)
        x0s.append(denoiser(add_noise(schedule, data.x0, data.eps, u), u, **data.cond))
    return _result(x0s, data, grid.tolist(), [0.0] * len(grid))


def _result(x0s: list[Tensor], data: ProbeData, levels: list[float], own: list[float]) -> ProbeResult:
    """``own``: the variance of the network's part of x0 per level, c_out^2 Var F."""
    errors = torch.stack([(x0 - data.x0).square().flatten(1).mean(1) for x0 in x0s]).double().cpu()
    bound = torch.tensor([data.bound(level) for level in levels], dtype=torch.float64)
    slack = PRECISION * (bound + torch.tensor(own, dtype=torch.float64))
    finite = errors.nan_to_num(1e12, 1e12).clamp(1e-12, 1e12)
    return ProbeResult(x0s, finite, torch.tensor(levels, dtype=torch.float64), bound, slack)
