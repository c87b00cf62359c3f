"""x0_hat, what a training step takes for x0 at x_t: the datum, a teacher's E[x0 | x_t], a mix of both, or a posterior mean.

All have the mean E[x0 | x_t] where the teacher is right; they differ in variance, which is what distillation saves:

    x0_hat = (1 - g) x0 + g D(x_t, t)      E|x0_hat - E[x0 | x_t]|^2 = (1 - g)^2 Var[x0 | x_t] + g^2 |D - E[x0 | x_t]|^2

g = 0 is training from data, g = 1 distillation, and the minimiser g = Var / (Var + bias^2) lies between.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from distill.denoiser import DenoiserLike, ask_in
from distill.schedule import Schedule, add_noise, expand


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
    """E[x0 | x_t] were ``data`` [N, ...] all there is; with ``labels`` [B] of x_t and ``of_data`` [N], within the same label."""
    x, points = x_t.flatten(1).double(), data.flatten(1).double()
    alpha, sigma = expand(schedule.alpha(t).double(), x), expand(schedule.sigma(t).double(), x)
    squared = x.square().sum(1, keepdim=True) - 2 * alpha * (x @ points.T) + alpha**2 * points.square().sum(1)
    scores = -squared / (2 * sigma**2)
    if labels is not None and of_data is not None:
        scores = scores.masked_fill(labels[:, None] != of_data[None], -torch.inf)
    return (scores.softmax(1) @ points).to(x_t).reshape(x_t.shape[0], *data.shape[1:])


@torch.no_grad()
def errors(
    teacher: DenoiserLike | None,
    schedule: Schedule,
    data: Tensor,
    labels: Tensor | None,
    logsnr: Tensor,
    rng: torch.Generator,
    samples: int = 512,
) -> dict[str, Tensor]:
    """Mean squares per pixel at each noise level [L]: ``variance`` of the datum, |x0 - m|^2, and ``bias`` of the teacher, |D - m|^2,
    both about m = E[x0 | x_t] of the finite data, and ``best``, the g that minimises their mix."""
    variance, bias = [], []
    index = torch.randint(len(data), (samples,), generator=rng)
    x0, cond = data[index], {} if labels is None else {"labels": labels[index]}
    for level in logsnr:
        t = schedule.time(level).expand(samples).to(x0)
        x_t = add_noise(schedule, x0, torch.randn(x0.shape, generator=rng).to(x0), t)
        mean = posterior_mean(schedule, x_t, t, data, cond.get("labels"), labels)
        variance.append((x0 - mean).square().mean())
        bias.append(torch.zeros(()) if teacher is None else (ask_in(teacher, schedule)(x_t, t, **cond) - mean).square().mean())
    v, b = torch.stack(variance), torch.stack(bias).to(variance[0])
    return {"variance": v, "bias": b, "best": v / (v + b).clamp(min=1e-12)}
