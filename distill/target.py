"""x0_hat, what a training step takes for x0 at x_t: the datum, a teacher's E[x0 | x_t], a mix of both, or a posterior mean.

All have the mean E[x0 | x_t] where the teacher is right; they differ in variance, which is what distillation saves:

    x0_hat = (1 - g) x0 + g D(x_t, t)      E|x0_hat - E[x0 | x_t]|^2 = (1 - g)^2 Var[x0 | x_t] + g^2 |D - E[x0 | x_t]|^2

g = 0 is training from data, g = 1 distillation. A student averages its targets, by which the variance falls and the bias does not: over
n of them the best part is g = (Var / n) / (Var / n + bias^2).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from distill.denoiser import DenoiserLike, ask_in
from distill.schedule import Schedule, add_noise, expand

CHUNK = 256  # samples that a teacher is asked at once
AVERAGED = 64.0  # targets that a student averages, in effect: from 1 to 64 tried in EXPERIMENTS.md


class Target(Protocol):
    """x0_hat [B, ...] at x_t [B, ...], t [B], which came from the data x0 [B, ...]."""

    def __call__(self, schedule: Schedule, x_t: Tensor, t: Tensor, x0: Tensor, **cond: Any) -> Tensor: ...


@dataclass(frozen=True)
class Datum:
    """x0 itself: training from data, with all of Var[x0 | x_t]."""

    def __call__(self, schedule: Schedule, x_t: Tensor, t: Tensor, x0: Tensor, **cond: Any) -> Tensor:
        return x0


@dataclass(frozen=True)
class Mix:
    """(1 - g) x0 + g D(x_t, t). ``g`` is a number in [0, 1], or numbers at the noise levels ``logsnr`` (rising), linear between.

    Raises ValueError for g outside [0, 1].
    """

    teacher: DenoiserLike
    g: float | Tensor = 1.0
    logsnr: Tensor | None = None

    def __post_init__(self):
        g = torch.as_tensor(self.g)
        if not (g.min() >= 0 and g.max() <= 1):
            raise ValueError(
                f"the part of the teacher in a target is {float(g.min()):g} to {float(g.max()):g}: accepted are 0 to 1"
            )

    def part(self, schedule: Schedule, t: Tensor) -> Tensor:
        """g at each t."""
        if self.logsnr is None:
            return torch.as_tensor(self.g).to(t)
        assert isinstance(self.g, Tensor)
        knots, values = self.logsnr.to(t), self.g.to(t)
        at = schedule.logsnr(t).clamp(knots[0], knots[-1])
        high = torch.searchsorted(knots, at).clamp(1, len(knots) - 1)
        share = (at - knots[high - 1]) / (knots[high] - knots[high - 1])
        return torch.lerp(values[high - 1], values[high], share)

    @torch.no_grad()
    def __call__(self, schedule: Schedule, x_t: Tensor, t: Tensor, x0: Tensor, **cond: Any) -> Tensor:
        if isinstance(self.g, float | int) and self.g == 0:
            return x0
        expected = ask_in(self.teacher, schedule)(x_t, t, **cond)
        return x0 + expand(self.part(schedule, t), x0) * (expected - x0)


@dataclass(frozen=True)
class PosteriorMean:
    """The mean of the batch's own data, weighed by how well each explains x_t (stable target field, Xu et al. 2023).

    softmax over i of -|x_t - alpha x_i|^2 / (2 sigma^2), among the data of the same label where there are labels; no teacher needed.
    """

    @torch.no_grad()
    def __call__(self, schedule: Schedule, x_t: Tensor, t: Tensor, x0: Tensor, **cond: Any) -> Tensor:
        return posterior_mean(schedule, x_t, t, x0, cond.get("labels"), cond.get("labels"))


def posterior_mean(
    schedule: Schedule, x_t: Tensor, t: Tensor, data: Tensor, labels: Tensor | None = None, of_data: Tensor | None = None
) -> Tensor:
    """E[x0 | x_t] were ``data`` [N, ...] all there is; with ``labels`` [B] of x_t and ``of_data`` [N], within the same label where any
    has it."""
    x, points = x_t.flatten(1).double(), data.flatten(1).double()
    alpha, sigma = expand(schedule.alpha(t).double(), x), expand(schedule.sigma(t).double(), x)
    squared = x.square().sum(1, keepdim=True) - 2 * alpha * (x @ points.T) + alpha**2 * points.square().sum(1)
    scores = -squared / (2 * sigma**2)
    if labels is not None and of_data is not None:
        same = labels[:, None] == of_data[None]
        scores = scores.masked_fill(~(same | ~same.any(1, keepdim=True)), -torch.inf)
    return (scores.softmax(1) @ points).to(x_t).reshape(x_t.shape[0], *data.shape[1:])


@dataclass(frozen=True)
class Sample:
    """Data drawn for one noise level: x_t [B, ...] with the x0 and the conditions it came from, the teacher's ``answer``, and the
    ``correction`` that takes it to E[x0 | x_t] as well as that can be told, estimated from each half of the sample: [2, B, ...]."""

    x_t: Tensor
    t: Tensor
    x0: Tensor
    cond: dict[str, Tensor]
    answer: Tensor
    correction: Tensor

    @property
    def expected(self) -> Tensor:
        """E[x0 | x_t]."""
        return self.answer + self.correction.mean(0)

    @property
    def bias(self) -> Tensor:
        """E|D - E[x0 | x_t]|^2 a pixel, without bias of its own: the two corrections err independently. Below 0 by chance."""
        return (self.correction[0] * self.correction[1]).mean()


@dataclass(frozen=True)
class Judge:
    """How far a teacher is from E[x0 | x_t] on ``data`` [N, ...] in random order, with ``labels`` [N].

    x0 - E[x0 | x_t] is orthogonal to every function of x_t. What a linear function of 1, x_t, D(x_t) and the posterior mean of other
    data can tell of x0 - D(x_t) is therefore an error of the teacher, and D with it is what is taken for E[x0 | x_t] here: the bias
    found is, but for chance, a lower bound. x0 comes from one half of the data and the posterior mean from the other; that of all the
    data, x0 among them, would count as an error all that the teacher generalises. ``condition``: labels -> what the teacher is told.
    Raises ValueError for fewer than two data.
    """

    teacher: DenoiserLike
    data: Tensor
    labels: Tensor | None = None
    condition: Callable[[Tensor | None], dict[str, Tensor]] = lambda labels: {} if labels is None else {"labels": labels}

    def __post_init__(self):
        if len(self.data) < 2:
            raise ValueError(f"a teacher is judged by two data or more, here are {len(self.data)}")

    @torch.no_grad()
    def draw(self, schedule: Schedule, logsnr: Tensor, n: int, rng: torch.Generator) -> Sample:
        """``n`` samples, at least 2, at one noise level."""
        half = len(self.data) // 2
        index = torch.randint(half, (n,), generator=rng).to(self.data.device)
        x0, labels = self.data[index], None if self.labels is None else self.labels[index]
        others, of_others = self.data[half:], None if self.labels is None else self.labels[half:]
        t = schedule.time(logsnr).expand(n).to(x0)
        x_t = add_noise(schedule, x0, torch.randn(x0.shape, generator=rng).to(x0), t)
        cond = self.condition(labels)
        asked = ask_in(self.teacher, schedule)
        parts = [slice(i, i + CHUNK) for i in range(0, n, CHUNK)]
        answer = torch.cat([asked(x_t[p], t[p], **{k: v[p] for k, v in cond.items()}) for p in parts])
        elsewhere = posterior_mean(schedule, x_t, t, others, labels, of_others)
        told = torch.stack([torch.ones_like(x_t), x_t, answer, elsewhere], -1)
        halves = [_fit(told[part], (x0 - answer)[part]) for part in (slice(0, n // 2), slice(n // 2, n))]
        return Sample(x_t, t, x0, cond, answer, torch.stack([told @ weights for weights in halves]))

    def errors(
        self, schedule: Schedule, logsnr: Tensor, rng: torch.Generator, samples: int = 1024, averaged: float = AVERAGED
    ) -> dict[str, Tensor]:
        """Mean squares per pixel at each noise level [L]: ``variance`` of the datum and ``bias`` of the teacher about E[x0 | x_t],
        and ``best``, the part of the teacher that minimises the error of ``averaged`` of their mixes' mean."""
        variance, bias = [], []
        for level in logsnr:
            drawn = self.draw(schedule, level, samples, rng)
            variance.append((drawn.x0 - drawn.expected).square().mean())
            bias.append(drawn.bias.clamp(min=0))
        v, b = torch.stack(variance), torch.stack(bias)
        return {"variance": v, "bias": b, "best": v / (v + averaged * b).clamp(min=1e-12)}


def _fit(told: Tensor, wrong: Tensor) -> Tensor:
    """The weights [K] with which told [B, ..., K] is nearest to wrong [B, ...]; the columns may all but coincide, where the normal
    equations are singular."""
    columns = told.flatten(0, -2)
    products = torch.stack([(columns * column[:, None]).sum(0, dtype=torch.float64) for column in columns.unbind(1)])
    against = (columns * wrong.flatten()[:, None]).sum(0, dtype=torch.float64)
    return (torch.linalg.pinv(products, hermitian=True, rtol=1e-10) @ against).to(told)
