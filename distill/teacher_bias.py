"""How far a teacher is from E[x0 | x_t], estimated on data, and the teacher weight that follows from it.

x0 - E[x0 | x_t] is orthogonal to every function of x_t. Whatever a linear function of 1, x_t, D(x_t) and a posterior mean predicts of
x0 - D(x_t) is therefore an error of the teacher. D plus this prediction is used as E[x0 | x_t]. Up to chance, the bias found this way
is a lower bound.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from distill.denoiser import DenoiserLike, on_schedule
from distill.device import send
from distill.schedule import Schedule, add_noise
from distill.target import posterior_mean

CHUNK = 256  # samples per teacher call
AVERAGED = 64.0  # targets that a student averages, in effect; 1 to 64 were tried (EXPERIMENTS.md)


@dataclass(frozen=True)
class NoisySample:
    """Samples at one noise level.

    ``x_t`` [B, ...] was made from ``x0`` under ``cond``; ``output`` is the teacher's D(x_t). ``correction`` [2, B, ...] takes the
    output to E[x0 | x_t]; it is estimated twice, from each half of the samples.
    """

    x_t: Tensor
    t: Tensor
    x0: Tensor
    cond: dict[str, Tensor]
    output: Tensor
    correction: Tensor

    @property
    def expected(self) -> Tensor:
        """The estimate of E[x0 | x_t], [B, ...]."""
        return self.output + self.correction.mean(0)

    @property
    def bias(self) -> Tensor:
        """The unbiased estimate of E|D - E[x0 | x_t]|^2 per pixel: the two corrections err independently. Below 0 by chance."""
        return (self.correction[0] * self.correction[1]).mean()


@dataclass(frozen=True)
class TeacherBias:
    """Estimate a teacher's bias on ``data`` [N, ...] in random order, with ``labels`` [N].

    x0 comes from one half of the data, the posterior mean from the other. A posterior mean over all of the data, x0 among it, would
    count as an error whatever the teacher generalises. ``condition``: labels -> the conditions of the teacher.

    Raises ValueError for fewer than two data samples.
    """

    teacher: DenoiserLike
    data: Tensor
    labels: Tensor | None = None
    condition: Callable[[Tensor | None], dict[str, Tensor]] = lambda labels: {} if labels is None else {"labels": labels}

    def __post_init__(self):
        if len(self.data) < 2:
            raise ValueError(f"a teacher's bias is estimated on at least 2 data samples, here are {len(self.data)}")

    @torch.no_grad()
    def draw(self, schedule: Schedule, logsnr: Tensor, n: int, rng: torch.Generator) -> NoisySample:
        """Draw ``n`` samples, at least 2, at one noise level."""
        half = len(self.data) // 2
        index = send(torch.randint(half, (n,), generator=rng), self.data.device)
        x0, labels = self.data[index], None if self.labels is None else self.labels[index]
        others, other_labels = self.data[half:], None if self.labels is None else self.labels[half:]
        t = schedule.time(logsnr).expand(n).to(x0.dtype)
        x_t = add_noise(schedule, x0, send(torch.randn(x0.shape, generator=rng).to(x0.dtype), x0.device), t)
        cond = self.condition(labels)
        teacher = on_schedule(self.teacher, schedule)
        parts = [slice(i, i + CHUNK) for i in range(0, n, CHUNK)]
        output = torch.cat([teacher(x_t[p], t[p], **{k: v[p] for k, v in cond.items()}) for p in parts])
        elsewhere = posterior_mean(schedule, x_t, t, others, labels, other_labels)
        features = torch.stack([torch.ones_like(x_t), x_t, output, elsewhere], -1)
        halves = [_fit(features[part], (x0 - output)[part]) for part in (slice(0, n // 2), slice(n // 2, n))]
        return NoisySample(x_t, t, x0, cond, output, torch.stack([features @ weights for weights in halves]))

    def errors(
        self,
        schedule: Schedule,
        logsnr: Iterable[Tensor],
        rng: torch.Generator,
        samples: int = 1024,
        averaged: float = AVERAGED,
    ) -> dict[str, Tensor]:
        """Return mean squares per pixel at each noise level, [L], on the CPU.

        ``variance``: of x0 about E[x0 | x_t]. ``bias``: of the teacher about E[x0 | x_t]. ``best``: the teacher weight that minimises
        the error of the mean of ``averaged`` mixed targets.
        """
        variance, bias = [], []
        for level in logsnr:
            drawn = self.draw(schedule, level, samples, rng)
            variance.append((drawn.x0 - drawn.expected).square().mean())
            bias.append(drawn.bias.clamp(min=0))
        v, b = torch.stack(variance).cpu(), torch.stack(bias).cpu()
        return {"variance": v, "bias": b, "best": v / (v + averaged * b).clamp(min=1e-12)}


def _fit(features: Tensor, error: Tensor) -> Tensor:
    """Return the least-squares weights [K] of features [B, ..., K] for error [B, ...].

    Columns may nearly coincide. The normal equations are then singular, so a pseudo-inverse is used.
    """
    columns = features.flatten(0, -2)
    products = torch.stack([(columns * column[:, None]).sum(0, dtype=torch.float64) for column in columns.unbind(1)])
    against = (columns * error.flatten()[:, None]).sum(0, dtype=torch.float64)
    return (torch.linalg.pinv(products, hermitian=True, rtol=1e-10) @ against).to(features)
