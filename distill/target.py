"""x0_hat, the regression target of a training step: the data sample, a teacher's E[x0 | x_t], a mix of both, or a posterior mean.

If the teacher is exact, all of them have the mean E[x0 | x_t]. They differ in variance:

    x0_hat = (1 - g) x0 + g D(x_t, t)      E|x0_hat - E[x0 | x_t]|^2 = (1 - g)^2 Var[x0 | x_t] + g^2 |D - E[x0 | x_t]|^2

g is the teacher weight: 0 trains on the data, 1 distils. A student averages over many targets, which reduces the variance but not
the bias. For an average of n targets the best weight is g = (Var / n) / (Var / n + bias^2), see `distill.teacher_bias`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, distributed

from distill.denoiser import DenoiserLike, on_schedule
from distill.schedule import Schedule, expand


class Target(Protocol):
    """Return x0_hat [B, ...] at x_t [B, ...], t [B], where x_t was made from the data sample x0 [B, ...]."""

    def __call__(self, schedule: Schedule, x_t: Tensor, t: Tensor, x0: Tensor, **cond: Any) -> Tensor: ...


@dataclass(frozen=True)
class DataSample:
    """Return the data sample x0: training from data, with all of Var[x0 | x_t] in the target."""

    def __call__(self, schedule: Schedule, x_t: Tensor, t: Tensor, x0: Tensor, **cond: Any) -> Tensor:
        return x0


@dataclass(frozen=True)
class Mix:
    """Return (1 - g) x0 + g D(x_t, t).

    ``g``: the teacher weight, a number in [0, 1], or numbers [L] at the noise levels ``logsnr`` [L] (rising), interpolated linearly.
    Both are on the CPU, as times are.

    Raises ValueError for g outside [0, 1].
    """

    teacher: DenoiserLike
    g: float | Tensor = 1.0
    logsnr: Tensor | None = None

    def __post_init__(self):
        g = torch.as_tensor(self.g)
        if not (g.min() >= 0 and g.max() <= 1):
            raise ValueError(f"the teacher weight of a target is {float(g.min()):g} to {float(g.max()):g}: accepted are 0 to 1")

    def weight(self, schedule: Schedule, t: Tensor) -> Tensor:
        """Return g at each t."""
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
        expected = on_schedule(self.teacher, schedule)(x_t, t, **cond)
        return torch.lerp(x0, expected, expand(self.weight(schedule, t), x0))


def teacher_of(target: Target) -> DenoiserLike:
    """Return the teacher whose E[x0 | x_t] alone is the target. Raises ValueError for any other target."""
    if not isinstance(target, Mix) or target.logsnr is not None or float(target.g) != 1:
        raise ValueError("this method follows the paths of a teacher: accepted is --target-mix 1")
    return target.teacher


@dataclass(frozen=True)
class PosteriorMean:
    """Return the posterior mean of x0 over the batch itself (stable target field, Xu et al. 2302.00670); no teacher needed.

    The weights are softmax over i of -|x_t - alpha x_i|^2 / (2 sigma^2), among samples of the same label where there are labels. The
    batch is that of all processes, gathered by a collective call. With microbatches it is the microbatch of all processes.
    """

    @torch.no_grad()
    def __call__(self, schedule: Schedule, x_t: Tensor, t: Tensor, x0: Tensor, **cond: Any) -> Tensor:
        labels = cond.get("labels")
        return posterior_mean(
            schedule, x_t, t, _over_processes(x0), labels, None if labels is None else _over_processes(labels)
        )


def _over_processes(rows: Tensor) -> Tensor:
    """Return the rows [B, ...] of all processes, [processes B, ...]. Every process must call it with equally many."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return rows
    parts = [torch.empty_like(rows, memory_format=torch.contiguous_format) for _ in range(distributed.get_world_size())]
    distributed.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


def posterior_mean(
    schedule: Schedule, x_t: Tensor, t: Tensor, data: Tensor, labels: Tensor | None = None, data_labels: Tensor | None = None
) -> Tensor:
    """Return E[x0 | x_t], [B, ...], for the empirical distribution of ``data`` [N, ...].

    With ``labels`` [B] and ``data_labels`` [N] the mean is over samples of the same label, or over all where no sample has it.
    """
    x, points = x_t.flatten(1).double(), data.flatten(1).double()
    alpha, sigma = (expand(c.double(), x) for c in schedule.at(t))
    squared = x.square().sum(1, keepdim=True) - 2 * alpha * (x @ points.T) + alpha**2 * points.square().sum(1)
    scores = -squared / (2 * sigma**2)
    if labels is not None and data_labels is not None:
        same = labels[:, None] == data_labels[None]
        scores = scores.masked_fill(~(same | ~same.any(1, keepdim=True)), -torch.inf)
    return (scores.softmax(1) @ points).to(x_t).reshape(x_t.shape[0], *data.shape[1:])
