"""Readings of a network: how its output becomes E[x0 | x_t], and what it answers to each noise level when it is read so."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distill.denoiser import PREDICTIONS, TIMES, Denoiser, DenoiserLike
from distill.schedule import Schedule, Table, add_noise, expand
from teachers.codec import Codec

PRECISION = 0.1  # part of the variance of its output that a trained network may miss
SIGMAS = 4.0  # a false alarm in 1,000 probes of a dozen levels and a dozen readings
LATENT_SCALES = (0.18215, 0.13025, 0.3611, 1.5305)  # of the autoencoders of SD 1 and 2, SDXL, Flux, SD 3
STATED = "as stated"


@dataclass(frozen=True)
class Reading:
    """How a network's output becomes E[x0 | x_t]: it was made for data ``scale`` x0 + ``shift``, told its noise by ``time``."""

    prediction: str
    time: str
    sigma_data: float = 0.5
    reverse: bool = False
    scale: float = 1.0
    shift: float = 0.0

    def against(self, stated: Reading) -> str:
        """What differs from the stated reading, in words."""
        if self == stated:
            return STATED
        parts = []
        if self.prediction != stated.prediction:
            parts.append(f"prediction {self.prediction}")
        if self.time != stated.time:
            parts.append(f"time {self.time}")
        if self.reverse:
            parts.append("time axis reversed")
        if self.sigma_data != stated.sigma_data:
            parts.append(f"sigma_data {self.sigma_data:g}")
        if self.shift:
            parts.append("network made for data in [0, 1]" if self.scale == 0.5 else "data handed in as [0, 1]")
        elif self.scale != 1:
            parts.append(f"latents times {self.scale:g}")
        return ", ".join(parts)


@dataclass(frozen=True)
class Facts:
    """Data and noise [N, ...] with conditions, and mean and variance of each pixel over all data that were given."""

    x0: Tensor
    eps: Tensor
    cond: dict[str, Tensor]
    mean: Tensor
    variance: Tensor

    def bound(self, logsnr: float) -> float:
        square = math.exp(-logsnr)
        return float((self.variance * square / (self.variance + square)).mean())


@dataclass(frozen=True)
class Answers:
    """D at each level, its squared errors [L, N], the levels' log-SNR, bound and slack [L]."""

    x0: list[Tensor]
    errors: Tensor
    logsnr: Tensor
    bound: Tensor
    slack: Tensor

    @property
    def error(self) -> Tensor:
        return self.errors.mean(1)

    @property
    def allowed(self) -> Tensor:
        return self.bound + self.slack + SIGMAS * self.errors.std(1) / self.errors.shape[1] ** 0.5

    @property
    def misfit(self) -> float:
        return float((self.error / (self.bound + self.slack)).log().mean())

    def beats(self, other: Answers) -> bool:
        """The delta method on the mean over levels of log error, over the same images and noise."""
        relative = (other.errors / other.error[:, None] - self.errors / self.error[:, None]).mean(0)
        deviation = float(relative.std()) / len(relative) ** 0.5
        return other.misfit - self.misfit > SIGMAS * max(deviation, 1e-6)


def log_snrs(schedule: Schedule) -> tuple[float, float]:
    """The log-SNRs at which a network may be asked."""
    low, high = schedule.logsnr(torch.tensor([schedule.t_max, schedule.t_min], dtype=torch.float64)).tolist()
    return low, high


def readings_near(stated: Reading, schedule: Schedule, codec: Codec | None) -> list[Reading]:
    """The stated reading, and each that differs from it in one thing."""
    times = [t for t in TIMES if t != "index" or isinstance(schedule, Table)]
    out = [stated, *(replace(stated, prediction=p) for p in PREDICTIONS if p != stated.prediction)]
    out += [replace(stated, time=t) for t in times if t != stated.time] + [replace(stated, reverse=True)]
    if stated.prediction == "edm":
        out += [replace(stated, sigma_data=stated.sigma_data * factor) for factor in (0.5, 2.0)]
    if codec is None:
        return [*out, replace(stated, scale=0.5, shift=0.5), replace(stated, scale=2.0, shift=-1.0)]
    scales = {codec.scale, *LATENT_SCALES} - {1.0}
    return out + [replace(stated, scale=scale) for s in sorted(scales) for scale in (s, 1 / s)]


def ask_all(d: Denoiser, readings: list[Reading], facts: Facts, grid: Tensor) -> dict[Reading, Answers]:
    """Each reading's answers but for those that repeat an earlier one's; a network that cannot be asked so is not."""
    out: dict[Reading, Answers] = {}
    outputs: dict[tuple, Tensor] = {}
    for reading in readings:
        try:
            answers = _ask(d, reading, facts, grid, outputs)
        except (RuntimeError, IndexError):  # e.g. a learned time embedding, told a fraction
            if not out:
                raise
            continue
        if not any(torch.allclose(answers.errors, other.errors, rtol=1e-4) for other in out.values()):
            out[reading] = answers
    return out


def _ask(d: Denoiser, reading: Reading, facts: Facts, grid: Tensor, outputs: dict[tuple, Tensor]) -> Answers:
    """Answers of a reading, from the network's ``outputs`` where another reading has asked the same."""
    schedule, answers, levels, own = d.schedule, [], [], []
    low, high = log_snrs(schedule)
    gain = 2 * math.log(reading.scale)
    for level in grid:
        u = schedule.time((level - gain).clamp(low, high))
        told = TIMES[reading.time](schedule, schedule.t_max + schedule.t_min - u if reading.reverse else u)
        a, s = schedule.alpha(u), schedule.sigma(u)
        c_in, c_skip, c_out = PREDICTIONS[reading.prediction](a, s, reading.sigma_data)
        x_t = add_noise(schedule, reading.scale * facts.x0 + reading.shift, facts.eps, u)
        asked = (float(u), float(told), float(c_in), reading.scale, reading.shift)
        if asked not in outputs:
            outputs[asked] = d.net(expand(c_in, x_t) * x_t, told.to(x_t).expand(len(x_t)), **facts.cond)
        x0 = expand(c_skip, x_t) * x_t + expand(c_out, x_t) * outputs[asked]
        answers.append((x0 - reading.shift) / reading.scale)
        levels.append(float(schedule.logsnr(u)) + gain)
        own.append(float((1 - c_skip * a) ** 2 * facts.variance.mean().cpu() + (c_skip * s / reading.scale) ** 2))
    return _measured(answers, facts, levels, own)


def ask_oracle(denoiser: DenoiserLike, facts: Facts, grid: Tensor) -> Answers:
    schedule, answers = denoiser.schedule, []
    for level in grid:
        u = schedule.time(level)
        answers.append(denoiser(add_noise(schedule, facts.x0, facts.eps, u), u, **facts.cond))
    return _measured(answers, facts, grid.tolist(), [0.0] * len(grid))


def _measured(answers: list[Tensor], facts: Facts, levels: list[float], own: list[float]) -> Answers:
    errors = torch.stack([(x0 - facts.x0).square().flatten(1).mean(1) for x0 in answers]).double().cpu()
    bound = torch.tensor([facts.bound(level) for level in levels], dtype=torch.float64)
    slack = PRECISION * (bound + torch.tensor(own, dtype=torch.float64))
    finite = errors.nan_to_num(1e12, 1e12).clamp(1e-12, 1e12)
    return Answers(answers, finite, torch.tensor(levels, dtype=torch.float64), bound, slack)
