"""Time grids: float64 tensors [steps + 1] that fall from t_max to t_clean, for the samplers and the ladders."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from distill.schedule import Schedule, Table


def _ends(schedule: Schedule) -> tuple[Tensor, Tensor]:
    return torch.tensor([schedule.t_max], dtype=torch.float64), torch.tensor([schedule.t_clean], dtype=torch.float64)


def uniform(schedule: Schedule, steps: int) -> Tensor:
    """Equal steps in t from t_max to the data; on VE, whose data lie at -inf, to t_min and from there to the data."""
    if math.isinf(schedule.t_clean):
        _, clean = _ends(schedule)
        return torch.cat([torch.linspace(schedule.t_max, schedule.t_min, steps, dtype=torch.float64), clean])
    return torch.linspace(schedule.t_max, schedule.t_clean, steps + 1, dtype=torch.float64)


def trailing(schedule: Schedule, steps: int) -> Tensor:
    """`uniform`, rounded to the entries of a discrete table: round(T - i T / steps) - 1 (Lin et al. 2023, Table 2)."""
    times = uniform(schedule, steps)
    if isinstance(schedule, Table):
        times = (times * schedule.steps).round() / schedule.steps
    return times


def _from_noise_levels(schedule: Schedule, steps: int, level: Callable[[float, float, Tensor], Tensor]) -> Tensor:
    """Times of the noise levels sigma/alpha that ``level(highest, lowest, u)`` names at u in [0, 1], then the data.

    The first time is t_max whatever its level, so that all grids of a schedule start from the same x; where sigma/alpha is
    above 80 there (infinite, with zero terminal SNR), the next ones continue as if it were 80, the usual sigma_max.
    """
    first, clean = _ends(schedule)
    low = torch.tensor(max(schedule.t_min, schedule.t_clean), dtype=torch.float64)
    lowest = float(schedule.level(low))
    highest = min(80.0, float(schedule.level(first)))
    u = torch.linspace(0, 1, steps, dtype=torch.float64)[1:]
    return torch.cat([first, schedule.time(-2 * level(highest, lowest, u).log()), clean])


def karras(schedule: Schedule, steps: int, rho: float = 7.0) -> Tensor:
    """sigma/alpha = (max^(1/rho) + u (min^(1/rho) - max^(1/rho)))^rho (Karras et al. 2022, eq. 5), then the data."""
    return _from_noise_levels(
        schedule, steps, lambda high, low, u: (high ** (1 / rho) + u * (low ** (1 / rho) - high ** (1 / rho))) ** rho
    )


def logsnr(schedule: Schedule, steps: int) -> Tensor:
    """Equal steps in log-SNR (Lu et al. 2022), then the data."""
    return _from_noise_levels(schedule, steps, lambda high, low, u: high ** (1 - u) * low**u)


GRIDS: dict[str, Callable[[Schedule, int], Tensor]] = {
    "uniform": uniform,
    "trailing": trailing,
    "karras": karras,
    "logsnr": logsnr,
}
