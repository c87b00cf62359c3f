"""Distances between images, one number a sample, and weights over noise levels. All of x0-space: an error d in x0 is an
error d alpha/sigma in eps, so every loss of the literature is the x0 distance times a weight of t."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from distill.schedule import Schedule


def l2(x: Tensor, y: Tensor) -> Tensor:
    """Mean squared error over each sample: [B, ...] -> [B]."""
    return (x - y).square().flatten(1).mean(1)


@dataclass(frozen=True)
class PseudoHuber:
    """sqrt(||x - y||^2 + c^2) - c over the WHOLE sample (Song & Dhariwal 2023), c = scale sqrt(dim); [B, ...] -> [B]."""

    scale: float = 0.00054

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        error = (x - y).flatten(1)
        c = self.scale * error.shape[1] ** 0.5
        return (error.square().sum(1) + c * c).sqrt() - c


Distance = Callable[[Tensor, Tensor], Tensor]
DISTANCES: dict[str, Distance] = {"l2": l2, "pseudo_huber": PseudoHuber()}


def _snr(schedule: Schedule, t: Tensor) -> Tensor:
    return torch.exp(schedule.logsnr(t))


def _soft(most: float) -> Callable[[Schedule, Tensor], Tensor]:
    """snr / (1 + snr / most): the snr, which saturates at ``most``; finite at both ends of a schedule."""
    return lambda schedule, t: 1 / (torch.exp(-schedule.logsnr(t)) + 1 / most)


# name -> (schedule, t) -> weight of the x0 error; t is [] or [B]
WEIGHTS: dict[str, Callable[[Schedule, Tensor], Tensor]] = {
    "x0": lambda schedule, t: torch.ones_like(t),
    "snr": _snr,  # the mean squared error of eps
    "truncated_snr": lambda schedule, t: _snr(schedule, t).clamp(min=1),  # Salimans & Ho 2022, section 4
    "snr_plus_one": lambda schedule, t: _snr(schedule, t) + 1,  # the mean squared error of v
    "min_snr": lambda schedule, t: _snr(schedule, t).clamp(max=5),  # Hang et al. 2023, gamma = 5
    "soft_min_snr": _soft(4.0),  # Crowson et al. 2024, gamma = 4
    "p2": _soft(1.0),  # Choi et al. 2022, k = 1, gamma = 1: eps weighed by 1 / (1 + snr)
}
