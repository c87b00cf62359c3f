"""Is this a denoiser, and is it read rightly? Properties that E[x0 | x_t] has whatever the data, and readings of the same network.

At levels l = sigma / alpha, on real data x0 with x_t = alpha (x0 + l eps), per pixel:

    E|D - x0|^2 <= mean of v l^2 / (v + l^2)      the best linear answer, v the pixel's variance: below both v and l^2,
                                                  which answering the mean and answering the input reach
    E[D] = E[x0]       E<D - x0, D> = 0           unbiased, with an error orthogonal to the answer

Slack. A network gives F, and x0 = c_skip x_t + c_out F, so an error in F of the part `PRECISION` of its variance is one in x0 of

    PRECISION c_out^2 Var F = PRECISION ((1 - c_skip alpha)^2 v + c_skip^2 sigma^2)

which is large for eps near noise and for x0 near the data, where these are known to be vague. A network may pass the bound by this,
by the part `PRECISION` of the bound, and by `SIGMAS` standard errors of what was measured; what is no network has the last two.

Readings. The same network is asked as if its prediction, time, sigma_data or data range were another. Misfit is the mean over levels
of log(error / (bound + slack)), where the levels are those of x0 whatever the scale of the data. A reading beats another where its
misfit is lower by `SIGMAS` standard errors, paired image by image, on `CLOSER` times the images on which it was found lower.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distill.denoiser import Denoiser
from teachers.load import Teacher
from teachers.reading import STATED, Answers, Facts, Reading, ask_all, ask_oracle, log_snrs, readings_near

CLOSER = 8


@dataclass(frozen=True)
class Probe:
    """What was measured at each noise level, and what follows.

    ``error``, ``bound``, ``allowed``: per pixel, squares; ``allowed`` is bound and slack. ``bias``: rms over pixels of E[D - x0], in
    deviations of the data. ``slope``: E<D - x0, D - mean> over the variance. ``spread``: deviation of D over that of the data.
    ``reach``: largest |D| over largest |x0|. ``readings``: (words, misfit), best first, the stated one among them; none for an
    oracle. ``ok``: it is a denoiser as it is read; ``verdict`` says so, or what is wrong, in one line.
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
        return self.readings[0][0] if self.readings else STATED

    def lines(self) -> list[str]:
        """The measurements as a table, and the verdict."""
        out = ["log-SNR     error     bound   allowed    bias   slope  spread   reach"]
        columns = (self.logsnr, self.error, self.bound, self.allowed, self.bias, self.slope, self.spread, self.reach)
        for level, error, bound, allowed, *rest in zip(*columns, strict=True):
            facts = "".join(f"{value:8.3f}" for value in rest)
            out.append(f"{level:7.2f} {error:9.2e} {bound:9.2e} {allowed:9.2e}{facts}")
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
    """Asks the teacher at ``levels`` noise levels, log-SNR -8 to 8 as far as its schedule goes, about ``samples`` of the real
    ``images`` [N, C, H, W] in [-1, 1], or of latents where ``encoded``, with their labels [N]. One pass of the network for each
    reading and level at most. ValueError for fewer than two images."""
    if len(images) < 2:
        raise ValueError(f"{len(images)} images to probe a teacher with: at least 2 are needed")
    denoiser, schedule = teacher.denoiser, teacher.denoiser.schedule
    low, high = log_snrs(schedule)
    grid = torch.linspace(max(-8.0, low), min(8.0, high), levels, dtype=torch.float64)
    facts = _facts(teacher, images, labels, CLOSER * samples, seed, encoded)
    few = _first(facts, samples)
    if not isinstance(denoiser, Denoiser):
        answers = ask_oracle(denoiser, facts, grid)
        return _conclude(facts, answers, (), _shortfall(answers), "oracle")
    stated = Reading(denoiser.prediction, denoiser.time, denoiser.sigma_data)
    found = ask_all(denoiser, readings_near(stated, schedule, teacher.codec), few, grid)
    ranked = sorted(found, key=lambda r: found[r].misfit)
    lower = ranked[: ranked.index(stated)]
    close = [stated, *(r for r in lower if not found[ranked[0]].beats(found[r]))]
    if len(close) > 1:
        found |= ask_all(denoiser, close, facts, grid)
    else:
        facts = few
    ranked = sorted(found, key=lambda r: found[r].misfit)
    best = next((r for r in ranked if r in close and found[r].beats(found[stated])), stated)
    readings = [(best.against(stated), found[best].misfit)]
    readings += [(r.against(stated), found[r].misfit) for r in ranked if r != best]
    problem = _shortfall(found[best])
    if best != stated:
        gain = math.exp(found[stated].misfit - found[best].misfit)
        problem = f"misread: with {best.against(stated)} it fits {gain:.3g} times better" + (
            f", and even so {problem}" if problem else ""
        )
    return _conclude(facts, found[stated], tuple(readings), problem, f"{stated.prediction}, {stated.time}")


def _conclude(facts: Facts, answers: Answers, readings: tuple, problem: str, how: str) -> Probe:
    variance, scale = float(facts.variance.mean()), float(facts.x0.abs().max())
    bias, slope, spread, reach = [], [], [], []
    for x0 in answers.x0:
        bias.append(float((x0 - facts.x0).mean(0).square().mean() / variance) ** 0.5)
        slope.append(float(((x0 - facts.x0) * (x0 - facts.mean)).mean()) / variance)
        spread.append((float(x0.var()) / float(facts.x0.var())) ** 0.5)
        reach.append(float(x0.abs().max()) / scale)
    part = answers.error / answers.bound
    verdict = f"a denoiser as stated ({how}): its error is {float(part.min()):.2f} to {float(part.max()):.2f} of the bound"
    logsnr, error, bound, allowed = (tuple(x.tolist()) for x in (answers.logsnr, answers.error, answers.bound, answers.allowed))
    return Probe(
        logsnr, error, bound, allowed, tuple(bias), tuple(slope), tuple(spread), tuple(reach),
        readings, problem or verdict, not problem,
    )  # fmt: skip


def _shortfall(answers: Answers) -> str:
    """What is wrong at the level where the error is highest against what is allowed; empty where nothing is."""
    worst = int((answers.error / answers.allowed).argmax())
    error, allowed = float(answers.error[worst]), float(answers.allowed[worst])
    if error <= allowed:
        return ""
    return (
        f"no denoiser: at log-SNR {float(answers.logsnr[worst]):.1f} the error is {error:.3g} a pixel, allowed is {allowed:.3g}"
    )


def _facts(teacher: Teacher, images: Tensor, labels: Tensor | None, samples: int, seed: int, encoded: bool) -> Facts:
    rng = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images), generator=rng)[:1024]
    data = images[order] if teacher.codec is None or encoded else teacher.codec.encode(images[order[:samples]])
    x0 = data[:samples]
    eps = torch.randn(x0.shape, generator=rng).to(x0)
    cond = teacher.condition(None if labels is None else labels[order[:samples]].to(x0.device))
    return Facts(x0, eps, cond, data.mean(0), data.var(0, correction=0))


def _first(facts: Facts, n: int) -> Facts:
    return replace(facts, x0=facts.x0[:n], eps=facts.eps[:n], cond={k: v[:n] for k, v in facts.cond.items()})
