"""Test whether a model is a denoiser, and whether its network is read correctly.

Every E[x0 | x_t] has properties that do not depend on the data. At the levels l = sigma / alpha, on real data x0 with
x_t = alpha (x0 + l eps), per pixel with variance v:

    E|D - x0|^2 <= mean of v l^2 / (v + l^2)      the error of the best linear denoiser; it is below v and below l^2, the errors of
                                                  a denoiser that returns the mean of the data and of one that returns x_t / alpha
    E[D] = E[x0]       E<D - x0, D> = 0           unbiased; the error is orthogonal to the output

Slack. A network predicts F, and x0 = c_skip x_t + c_out F. An error in F of the part `PRECISION` of its variance becomes an error
in x0 of

    PRECISION c_out^2 Var F = PRECISION ((1 - c_skip alpha)^2 v + c_skip^2 sigma^2)

This is large for eps near pure noise and for x0 near the data, where these predictions are known to be inaccurate. A network may
exceed the bound by this, by the part `PRECISION` of the bound, and by `SIGMAS` standard errors of what was measured. An oracle may
exceed it by the last two.

Readings. The same network is evaluated as if its prediction, time input, sigma_data or data range were another. The misfit is the
mean over levels of log(error / (bound + slack)); levels are those of x0 for every scale of the data. One reading beats another if its
misfit is lower by `SIGMAS` standard errors, paired over `CLOSER` times the images that the readings were first compared on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from distill.denoiser import Denoiser
from teachers.probe_readings import (
    STATED,
    ProbeData,
    ProbeResult,
    Reading,
    evaluate_oracle,
    evaluate_readings,
    logsnr_range,
    readings_near,
)
from teachers.teacher import Teacher

CLOSER = 8


@dataclass(frozen=True)
class Probe:
    """Hold the measurements at each noise level, one value per level, and the verdict.

    ``logsnr``: the level. ``error``: the mean squared error of D, per pixel. ``bound``: that of the best linear denoiser.
    ``allowed``: the largest error that passes, bound plus slack. ``bias``: the root mean square over pixels of E[D - x0], in standard
    deviations of the data; 0 is best. ``slope``: E<D - x0, D - mean> over the variance of the data; 0 is best. ``spread``: the
    standard deviation of D over that of the data; it falls below 1 with noise. ``reach``: the largest |D| over the largest |x0|.

    ``readings``: (words, misfit) of each reading, best first, the stated one among them; empty for an oracle. ``ok``: the model is a
    denoiser as stated. ``verdict``: this, or what is wrong, in one line.
    """

    logsnr: tuple[float, ...]
    error: tuple[float, ...]
    bound: tuple[float, ...]
    allowed: tuple[float, ...]
    bias: tuple[float, ...]
    slope: tuple[float, ...]
    spread: tuple[float, ...]
    reach: tuple[float, ...]
    readings: tuple[tuple[str, float], ...]
    verdict: str
    ok: bool

    @property
    def best(self) -> str:
        """The reading that fits best, in words."""
        return self.readings[0][0] if self.readings else STATED

    def lines(self) -> list[str]:
        """Return one line per level with the measurements as columns, then the best readings, then the verdict."""
        out = ["log-SNR     error     bound   allowed    bias   slope  spread   reach"]
        columns = (self.logsnr, self.error, self.bound, self.allowed, self.bias, self.slope, self.spread, self.reach)
        for level, error, bound, allowed, *rest in zip(*columns, strict=True):
            ratios = "".join(f"{value:8.3f}" for value in rest)
            out.append(f"{level:7.2f} {error:9.2e} {bound:9.2e} {allowed:9.2e}{ratios}")
        shown = self.readings[:4] + tuple(r for r in self.readings[4:] if r[0] == STATED)
        out += [f"reading {name:<36} misfit {misfit:6.3f}" for name, misfit in shown]
        return [*out, self.verdict]


@torch.no_grad()
def probe(
    teacher: Teacher,
    images: Tensor,
    labels: Tensor | None = None,
    levels: int = 12,
    samples: int = 32,
    seed: int = 0,
    encoded: bool = False,
) -> Probe:
    """Evaluate a model at ``levels`` noise levels from log-SNR -8 to 8, within its schedule, on ``samples`` real images.

    ``images`` [N, C, H, W] in [-1, 1], or latents if ``encoded``; ``labels`` [N]. The cost is at most one pass per reading and level,
    and `CLOSER` passes for readings that are hard to tell apart. Raises ValueError for fewer than two images.
    """
    if len(images) < 2:
        raise ValueError(f"a probe needs at least 2 images; here are {len(images)}")
    denoiser, schedule = teacher.denoiser, teacher.denoiser.schedule
    low, high = logsnr_range(schedule)
    grid = torch.linspace(max(-8.0, low), min(8.0, high), levels, dtype=torch.float64)
    data = _draw(teacher, images, labels, CLOSER * samples, seed, encoded)
    if not isinstance(denoiser, Denoiser):
        result = evaluate_oracle(denoiser, data, grid)
        return _conclude(data, result, (), _shortfall(result), "oracle")
    stated = Reading(denoiser.prediction, denoiser.time, denoiser.sigma_data)
    few = data.first(samples)
    found = evaluate_readings(denoiser, readings_near(stated, schedule, teacher.codec), few, grid)
    ranked = sorted(found, key=lambda r: found[r].misfit)
    lower = ranked[: ranked.index(stated)]
    close = [stated, *(r for r in lower if not found[ranked[0]].beats(found[r]))]
    if len(close) > 1:
        found |= evaluate_readings(denoiser, close, data, grid)
    else:
        data = few
    ranked = sorted(found, key=lambda r: found[r].misfit)
    best = next((r for r in ranked if r in close and found[r].beats(found[stated])), stated)
    readings = [(r.against(stated), found[r].misfit) for r in (best, *(r for r in ranked if r != best))]
    problem = _shortfall(found[best])
    if best != stated:
        gain = math.exp(found[stated].misfit - found[best].misfit)
        also = f", but even then {problem}" if problem else ""
        problem = f"misread: with {best.against(stated)} it fits {gain:.3g} times better{also}"
    return _conclude(data, found[stated], tuple(readings), problem, f"{stated.prediction}, {stated.time}")


def _conclude(data: ProbeData, result: ProbeResult, readings: tuple, problem: str, how: str) -> Probe:
    variance, scale = float(data.variance.mean()), float(data.x0.abs().max())
    bias, slope, spread, reach = [], [], [], []
    for x0 in result.x0:
        bias.append(float((x0 - data.x0).mean(0).square().mean() / variance) ** 0.5)
        slope.append(float(((x0 - data.x0) * (x0 - data.mean)).mean()) / variance)
        spread.append((float(x0.var()) / float(data.x0.var())) ** 0.5)
        reach.append(float(x0.abs().max()) / scale)
    part = result.error / result.bound
    verdict = f"a denoiser as stated ({how}): its error is {float(part.min()):.2f} to {float(part.max()):.2f} of the bound"
    logsnr, error, bound, allowed = (tuple(x.tolist()) for x in (result.logsnr, result.error, result.bound, result.allowed))
    return Probe(
        logsnr, error, bound, allowed, tuple(bias), tuple(slope), tuple(spread), tuple(reach),
        readings, problem or verdict, not problem,
    )  # fmt: skip


def _shortfall(result: ProbeResult) -> str:
    """Return what is wrong at the level with the largest error relative to the allowed one; "" if nothing is."""
    worst = int((result.error / result.allowed).argmax())
    error, allowed = float(result.error[worst]), float(result.allowed[worst])
    if error <= allowed:
        return ""
    logsnr = float(result.logsnr[worst])
    return f"no denoiser: at log-SNR {logsnr:.1f} the error per pixel is {error:.3g}, the largest accepted one is {allowed:.3g}"


def _draw(teacher: Teacher, images: Tensor, labels: Tensor | None, samples: int, seed: int, encoded: bool) -> ProbeData:
    rng = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images), generator=rng)[:1024]
    data = images[order] if teacher.codec is None or encoded else teacher.codec.encode(images[order[:samples]])
    x0 = data[:samples]
    eps = torch.randn(x0.shape, generator=rng).to(x0)
    cond = teacher.condition(None if labels is None else labels[order[:samples]].to(x0.device))
    return ProbeData(x0, eps, cond, data.mean(0), data.var(0, correction=0))
