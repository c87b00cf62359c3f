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

Skill. T = min(v, l^2) is the error of the better of the mean and x_t / alpha, per pixel. An output D = E[x0 | x_t] + n, with noise or
bias n of the network's own that is uncorrelated with E[x0 | x_t], has E<D - x0, D - E x0> = E|n|^2. This costs a part of its skill:

    skill = (T - error) / (T - bound)        1 for the best linear denoiser, 0 for none
    lost = E|n|^2 / (T - error + E|n|^2)     0 for an exact denoiser, 1 if nothing is left; measured as the slope times v, where positive

Both are given where T - bound is more than a tenth of T, and their means over these levels are in the verdict. A model that passes gets
a warning where its error exceeds `WARN` times the bound by more than `SIGMAS` standard errors, or if it loses more than `LOST`.

Readings. The same network is evaluated as if its prediction, time input, sigma_data, data range or discrete table were another. The
misfit is the mean over levels of log(error / (bound + slack)); levels are those of x0 for every scale of the data, and only levels that
both tables reach are compared. One reading beats another if its misfit is lower by `SIGMAS` standard errors, paired over `CLOSER` times
the images that the readings were first compared on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from distill.denoiser import Denoiser
from teachers.probe_readings import (
    SIGMAS,
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
WARN = 2.0  # an error of so many times the bound passes with a warning
LOST = 0.1  # so does such a loss of skill


@dataclass(frozen=True)
class Probe:
    """Hold the measurements at each noise level, one value per level, and the verdict.

    ``logsnr``: the level. ``error``: the mean squared error of D, per pixel. ``bound``: that of the best linear denoiser.
    ``allowed``: the largest error that passes, bound plus slack. ``bias``: the root mean square over pixels of E[D - x0], in standard
    deviations of the data; 0 is best. ``slope``: E<D - x0, D - mean> over the variance of the data; 0 is best. ``spread``: the
    standard deviation of D over that of the data; it falls below 1 with noise. ``reach``: the largest |D| over the largest |x0|.
    ``skill``, ``lost``: as above; nan at levels where they say nothing.

    ``readings``: (words, misfit) of each reading, best first, the stated one among them; empty for an oracle. ``ok``: the model is a
    denoiser as stated. ``verdict``: this, or what is wrong, in one line. ``warning``: what is poor about a model that passes, or "".
    """

    logsnr: tuple[float, ...]
    error: tuple[float, ...]
    bound: tuple[float, ...]
    allowed: tuple[float, ...]
    bias: tuple[float, ...]
    slope: tuple[float, ...]
    spread: tuple[float, ...]
    reach: tuple[float, ...]
    skill: tuple[float, ...]
    lost: tuple[float, ...]
    readings: tuple[tuple[str, float], ...]
    verdict: str
    ok: bool
    warning: str

    @property
    def best(self) -> str:
        """The reading that fits best, in words."""
        return self.readings[0][0] if self.readings else STATED

    def lines(self) -> list[str]:
        """Return one line per level with the measurements as columns, then the best readings, then the verdict."""
        out = ["log-SNR     error     bound   allowed    bias   slope  spread   reach   skill    lost"]
        columns = (self.logsnr, self.error, self.bound, self.allowed, self.bias, self.slope, self.spread, self.reach)
        for level, error, bound, allowed, *rest in zip(*columns, self.skill, self.lost, strict=True):
            ratios = "".join("       -" if math.isnan(value) else f"{value:8.3f}" for value in rest)
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
    ranked = _ranked(found, stated)
    lower = ranked[: ranked.index(stated)]
    close = [stated, *(r for r in lower if not found[ranked[0]].beats(found[r]))]
    if len(close) > 1:
        found |= evaluate_readings(denoiser, close, data, grid)
    else:
        data = few
    ranked = _ranked(found, stated)
    best = next((r for r in ranked if r in close and found[r].beats(found[stated])), stated)
    misfit = found[stated].misfit
    readings = [(r.against(stated), misfit - found[r].gain(found[stated])) for r in (best, *(r for r in ranked if r != best))]
    problem = _shortfall(found[best])
    if best != stated:
        gain = math.exp(found[best].gain(found[stated]))
        also = f", but even then {problem}" if problem else ""
        problem = f"misread: with {best.against(stated)} it fits {gain:.3g} times better{also}"
    return _conclude(data, found[stated], tuple(readings), problem, f"{stated.prediction}, {stated.time}")


def _ranked(found: dict[Reading, ProbeResult], stated: Reading) -> list[Reading]:
    """Return the readings, the one that fits best first."""
    return sorted(found, key=lambda r: -found[r].gain(found[stated]))


def _conclude(data: ProbeData, result: ProbeResult, readings: tuple, problem: str, how: str) -> Probe:
    variance, scale = float(data.variance.mean()), float(data.x0.abs().max())
    bias, slope, spread, reach = [], [], [], []
    for x0 in result.x0:
        bias.append(float((x0 - data.x0).mean(0).square().mean() / variance) ** 0.5)
        slope.append(float(((x0 - data.x0) * (x0 - data.mean)).mean()) / variance)
        spread.append((float(x0.var()) / float(data.x0.var())) ** 0.5)
        reach.append(float(x0.abs().max()) / scale)
    skill, lost = _skill(data, result, torch.tensor(slope, dtype=torch.float64))
    warning = "" if problem else _warning(result, float(lost.nanmean()))
    part = result.error / result.bound
    verdict = f"a denoiser as stated ({how}): its error is {float(part.min()):.2f} to {float(part.max()):.3g} of the bound"
    if (above := _above(result, result.bound)).any():
        verdict += f" (above it at log-SNR {_levels(result.logsnr, above)})"
    if not skill.isnan().all():
        verdict += f", its skill {float(skill.nanmean()):.2f} of a linear denoiser's, {float(lost.nanmean()):.0%} lost to noise or bias"
    verdict += f"; warning: {warning}" if warning else ""
    measured = (result.logsnr, result.error, result.bound, result.allowed, skill, lost)
    logsnr, error, bound, allowed, skills, losses = (tuple(x.tolist()) for x in measured)
    return Probe(
        logsnr, error, bound, allowed, tuple(bias), tuple(slope), tuple(spread), tuple(reach), skills, losses,
        readings, problem or verdict, not problem, warning,
    )  # fmt: skip


def _skill(data: ProbeData, result: ProbeResult, slope: Tensor) -> tuple[Tensor, Tensor]:
    """Return the skill and the part of it that is lost, each [L]; nan where the bound is not well below the trivial error."""
    squares = torch.exp(-result.logsnr)[:, None]
    trivial = torch.minimum(data.variance.flatten().double().cpu(), squares).mean(1)
    gain, own = trivial - result.bound, slope.clamp(min=0) * float(data.variance.mean())
    skill, lost = (trivial - result.error) / gain, own / ((trivial - result.error).clamp(min=1e-12) + own)
    useless = gain <= 0.1 * trivial
    return skill.masked_fill(useless, math.nan), lost.masked_fill(useless, math.nan)


def _above(result: ProbeResult, limit: Tensor) -> Tensor:
    """Return at which levels the error is above ``limit`` [L] by more than `SIGMAS` standard errors."""
    return result.error - SIGMAS * result.deviation > limit


def _levels(logsnr: Tensor, chosen: Tensor) -> str:
    """Return the chosen log-SNRs in words, neighbours as a range."""
    groups: list[list[float]] = []
    for before, here, level in zip([False, *chosen.tolist()[:-1]], chosen.tolist(), logsnr.tolist(), strict=True):
        if here and before:
            groups[-1].append(level)
        elif here:
            groups.append([level])
    return ", ".join(f"{g[0]:.1f}" if len(g) == 1 else f"{g[0]:.1f} to {g[-1]:.1f}" for g in groups)


def _warning(result: ProbeResult, lost: float) -> str:
    """Return what is poor about a model that passes, "" if nothing is. ``lost``: the part of its skill."""
    warnings = []
    if (above := _above(result, WARN * result.bound)).any():
        most = float((result.error / result.bound)[above].max())
        warnings.append(f"up to {most:.3g} times the bound at log-SNR {_levels(result.logsnr, above)}, more than {WARN:g}")
    if lost > LOST:
        warnings.append(f"{lost:.0%} of its skill lost, more than {LOST:.0%}")
    return " and ".join(warnings)


def _shortfall(result: ProbeResult) -> str:
    """Return what is wrong at the level with the largest error relative to the allowed one; "" if nothing is."""
    excess = result.error / result.allowed
    worst = int(excess.argmax())
    if not excess[worst] > 1:
        return ""
    where, error, allowed = _levels(result.logsnr, excess > 1), float(result.error[worst]), float(result.allowed[worst])
    at = f"{float(result.logsnr[worst]):.1f}"
    where = "" if where == at else f" (too large at {where})"
    return f"no denoiser: at log-SNR {at} the error per pixel is {error:.3g}, the largest accepted one is {allowed:.3g}{where}"


def _draw(teacher: Teacher, images: Tensor, labels: Tensor | None, samples: int, seed: int, encoded: bool) -> ProbeData:
    rng = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images), generator=rng)[:1024]
    data = images[order] if teacher.codec is None or encoded else teacher.codec.encode(images[order[:samples]])
    x0 = data[:samples]
    eps = torch.randn(x0.shape, generator=rng).to(x0)
    cond = teacher.condition(None if labels is None else labels[order[:samples]].to(x0.device))
    return ProbeData(x0, eps, cond, data.mean(0), data.var(0, correction=0))
