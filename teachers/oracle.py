"""Denoisers in closed form. Samplers, losses and students are tested against them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distill.images import from_uint8
from distill.schedule import Cosine, Schedule, expand
from teachers.digits import digits
from teachers.teacher import Teacher


@dataclass(frozen=True)
class Gaussian:
    """Return E[x0 | x_t] of independent x0 ~ N(mean, std^2): mean + alpha std^2 (x_t - alpha mean) / (alpha^2 std^2 + sigma^2).

    ``mean`` and ``std`` have the shape of one sample, or broadcast to it.
    """

    schedule: Schedule
    mean: Tensor
    std: Tensor

    def __call__(self, x_t: Tensor, t: Tensor, to: Tensor | None = None, **cond: Any) -> Tensor:
        a, s = expand(self.schedule.alpha(t), x_t), expand(self.schedule.sigma(t), x_t)
        mean, variance = self.mean.to(x_t), self.std.to(x_t) ** 2
        return mean + a * variance / (a * a * variance + s * s) * (x_t - a * mean)

    def log_prob(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Return log p(x_t) [B] of the noisy data, N(alpha mean, alpha^2 std^2 + sigma^2); t is [] or [B]."""
        a, s = expand(self.schedule.alpha(t), x_t), expand(self.schedule.sigma(t), x_t)
        mean, variance = a * self.mean.to(x_t), (a * self.std.to(x_t)) ** 2 + s * s
        return -0.5 * ((x_t - mean).square() / variance + (2 * math.pi * variance).log()).flatten(1).sum(1)

    def flow(self, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """Return the exact probability-flow map from t to s: each coordinate keeps its quantile."""
        a_t, a_s = expand(self.schedule.alpha(t), x_t), expand(self.schedule.alpha(s), x_t)
        s_t, s_s = expand(self.schedule.sigma(t), x_t), expand(self.schedule.sigma(s), x_t)
        mean, variance = self.mean.to(x_t), self.std.to(x_t) ** 2
        scale = ((a_s**2 * variance + s_s**2) / (a_t**2 * variance + s_t**2)).sqrt()
        return a_s * mean + scale * (x_t - a_t * mean)


@dataclass(frozen=True)
class Mixture:
    """Return E[x0 | x_t] of x0 ~ sum_k weights_k N(means_k, std_k^2 I): means [K, ...], stds [K], weights [K] that sum to 1.

    With stds 0 and equal weights this is the exact denoiser of the finite data set ``means``.
    """

    schedule: Schedule
    means: Tensor
    stds: Tensor
    weights: Tensor

    def __call__(self, x_t: Tensor, t: Tensor, to: Tensor | None = None, **cond: Any) -> Tensor:
        a = self.schedule.alpha(t).to(x_t).reshape(-1, 1)
        x, means = x_t.flatten(1), self.means.to(x_t).flatten(1)
        log_joint, total = self._log_joint(x_t, t)
        posterior = log_joint.softmax(1)
        gain = a * self.stds.to(x_t) ** 2 / total  # of each component: E_k = m_k + gain_k (x - a m_k)
        weighted = posterior * gain
        mean = (posterior - weighted * a) @ means + weighted.sum(1, keepdim=True) * x
        return mean.reshape(x_t.shape)

    def log_prob(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Return log p(x_t) [B] of the noisy data; t is [] or [B]. A set of points has a density where sigma is above 0."""
        return self._log_joint(x_t, t)[0].logsumexp(1) - x_t[0].numel() / 2 * math.log(2 * math.pi)

    def _log_joint(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return log p(x_t, k) + d/2 log 2 pi [B, K], and the variance of each component of x_t [B or 1, K]."""
        a = self.schedule.alpha(t).to(x_t).reshape(-1, 1)
        s = self.schedule.sigma(t).to(x_t).reshape(-1, 1)
        x, means = x_t.flatten(1), self.means.to(x_t).flatten(1)
        total = a * a * self.stds.to(x_t) ** 2 + s * s
        distance = x.square().sum(1, keepdim=True) - 2 * a * (x @ means.T) + a * a * means.square().sum(1)
        return self.weights.to(x_t).log() - distance / (2 * total) - x.shape[1] / 2 * total.log(), total


def finite(schedule: Schedule, data: Tensor) -> Mixture:
    """Return the exact denoiser of the finite data set ``data`` [N, ...]."""
    n = len(data)
    return Mixture(schedule, data, torch.zeros(n), torch.full((n,), 1 / n))


def load(spec: str) -> Teacher:
    """Load oracle:gaussian or oracle:mixture (two dimensions), or oracle:digits (the exact denoiser of the 1797 digits).

    Raises ValueError for any other name.
    """
    name, schedule, record = spec.removeprefix("oracle:"), Cosine(), {"source": spec}
    if name == "gaussian":
        return Teacher(Gaussian(schedule, torch.tensor([0.5, -0.25]), torch.tensor([0.5, 0.2])), (2,), record=record)
    if name == "mixture":
        angles = torch.arange(8) * (math.pi / 4)
        means = torch.stack([angles.cos(), angles.sin()], 1) * 0.8
        return Teacher(Mixture(schedule, means, torch.full((8,), 0.1), torch.full((8,), 1 / 8)), (2,), record=record)
    if name == "digits":
        images, _ = digits()
        return Teacher(finite(schedule, from_uint8(images)), tuple(images.shape[1:]), record=record)
    raise ValueError(f"unknown oracle {name!r}: accepted are gaussian, mixture, digits")
