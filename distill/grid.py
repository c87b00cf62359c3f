"""Time grids for samplers and ladders: float64 tensors [steps + 1] that fall from t_max to t_clean."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from distill.schedule import Schedule, Table


def uniform(schedule: Schedule, steps: int) -> Tensor:
    """Return equal steps in t from t_max to the data. On VE, whose data are at -inf, they end at t_min before the last step."""
    if math.isinf(schedule.t_clean):
        steps_to_t_min = torch.linspace(schedule.t_max, schedule.t_min, steps, dtype=torch.float64)
        return torch.cat([steps_to_t_min, steps_to_t_min.new_tensor([schedule.t_clean])])
    return torch.linspace(schedule.t_max, schedule.t_clean, steps + 1, dtype=torch.float64)


def trailing(schedule: Schedule, steps: int) -> Tensor:
    """Return `uniform` rounded to the entries of a discrete table: round(T - i T / steps) - 1 (Lin et al. 2305.08891, Table 2)."""
    times = uniform(schedule, steps)
    if isinstance(schedule, Table):
        times = (times * schedule.steps).round() / schedule.steps
    return times


def _from_noise_levels(schedule: Schedule, steps: int, level: Callable[[float, float, Tensor], Tensor]) -> Tensor:
    """Return the times of the noise levels sigma/alpha given by ``level(highest, lowest, u)`` at u in [0, 1], then the data.

    The first time is always t_max, so that all grids of a schedule start from the same x. If sigma/alpha exceeds 80 there (it is
    infinite with zero terminal SNR), the other levels are computed as if it were 80, the usual sigma_max.
    """
    first, clean = torch.tensor([[schedule.t_max], [schedule.t_clean]], dtype=torch.float64)
    low = torch.tensor(max(schedule.t_min, schedule.t_clean), dtype=torch.float64)
    lowest = float(schedule.level(low))
    highest = min(80.0, float(schedule.level(first)))
    u = torch.linspace(0, 1, steps, dtype=torch.float64)[1:]
    return torch.cat([first, schedule.time_of(level(highest, lowest, u)), clean])


def karras(schedule: Schedule, steps: int, rho: float = 7.0) -> Tensor:
    """Return sigma/alpha = (max^(1/rho) + u (min^(1/rho) - max^(1/rho)))^rho (Karras et al. 2206.00364, eq. 5), then the data."""
    return _from_noise_levels(
        schedule, steps, lambda high, low, u: (high ** (1 / rho) + u * (low ** (1 / rho) - high ** (1 / rho))) ** rho
    )


def logsnr(schedule: Schedule, steps: int) -> Tensor:
    """Return equal steps in log-SNR (Lu et al. 2206.00927), then the data."""
    return _from_noise_levels(schedule, steps, lambda high, low, u: high ** (1 - u) * low**u)


GRIDS: dict[str, Callable[[Schedule, int], Tensor]] = {
    "uniform": uniform,
    "trailing": trailing,
    "karras": karras,
    "logsnr": logsnr,
}
