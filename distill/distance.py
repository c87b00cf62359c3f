"""Distances between images, one number per sample, and weights over noise levels.

All errors are measured in x0. An error d in x0 is an error d alpha/sigma in eps, so every loss of the literature is a distance
in x0 times a weight of t.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from distill.schedule import Schedule

Distance = Callable[[Tensor, Tensor], Tensor]  # x, y [B, ...] -> [B]
Weight = Callable[[Schedule, Tensor], Tensor]  # schedule, t [] or [B] -> weight of the x0 error, of the shape of t


def l2(x: Tensor, y: Tensor) -> Tensor:
    """Return the mean squared error of each sample: [B, ...] -> [B]."""
    return (x - y).square().flatten(1).mean(1)


@dataclass(frozen=True)
class PseudoHuber:
    """Return sqrt(||x - y||^2 + c^2) - c over the WHOLE sample, c = scale sqrt(dim) (Song & Dhariwal 2310.14189): [B, ...] -> [B]."""

    scale: float = 0.00054

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        error = (x - y).flatten(1)
        c = self.scale * error.shape[1] ** 0.5
        return (error.square().sum(1) + c * c).sqrt() - c


DISTANCES: dict[str, Distance] = {"l2": l2, "pseudo_huber": PseudoHuber()}


def one(schedule: Schedule, t: Tensor) -> Tensor:
    """Weight 1: the mean squared error of x0."""
    return torch.ones_like(t)


def snr(schedule: Schedule, t: Tensor) -> Tensor:
    """Weight alpha^2 / sigma^2: the mean squared error of eps."""
    return torch.exp(schedule.logsnr(t))


def truncated_snr(schedule: Schedule, t: Tensor) -> Tensor:
    """Weight max(snr, 1) (Salimans & Ho 2202.00512, section 4)."""
    return snr(schedule, t).clamp(min=1)


def snr_plus_one(schedule: Schedule, t: Tensor) -> Tensor:
    """Weight snr + 1: the mean squared error of v (2202.00512)."""
    return snr(schedule, t) + 1


def min_snr(schedule: Schedule, t: Tensor) -> Tensor:
    """Weight min(snr, 5) (Hang et al. 2303.09556)."""
    return snr(schedule, t).clamp(max=5)


@dataclass(frozen=True)
class SoftSNR:
    """Weight snr / (1 + snr / limit), which saturates at ``limit`` and is finite at both ends of a schedule."""

    limit: float

    def __call__(self, schedule: Schedule, t: Tensor) -> Tensor:
        return 1 / (torch.exp(-schedule.logsnr(t)) + 1 / self.limit)


WEIGHTS: dict[str, Weight] = {
    "x0": one,
    "snr": snr,
    "truncated_snr": truncated_snr,
    "snr_plus_one": snr_plus_one,
    "min_snr": min_snr,
    "soft_min_snr": SoftSNR(4.0),  # Crowson et al. 2401.11605, gamma = 4
    "p2": SoftSNR(1.0),  # Choi et al. 2204.00227, k = 1, gamma = 1: eps weighted by 1 / (1 + snr)
}
