"""How a model is sampled, as one value: sampler, time grid, and the step counts that a student was made for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from distill.denoiser import DenoiserLike
from distill.grid import GRIDS
from distill.names import SAMPLER_TEXT as ACCEPTED
from distill.samplers import SAMPLERS
from distill.schedule import EDM, VE, Schedule, Table
from distill.self_conditioning import carrying

SEARCHED = "searched"  # the name of a grid whose times were found by a search and are listed


@dataclass(frozen=True)
class Sampling:
    """A sampler with its time grid.

    ``name``: a key of `SAMPLERS`. ``gamma``: part of the noise that "consistency" draws anew; None stands for 1. ``grid``: a key of
    `GRIDS`, or "searched". ``steps``: the step counts that a student was made for; empty for a model that takes any. ``times``: the
    grid [steps + 1] of each step count that has one of its own. ``eta``: strength of the noise of "sde"; None stands for 1.

    Raises ValueError for an unknown sampler or grid, for gamma outside [0, 1], and for eta outside [0, 10].
    """

    name: str = "ddim"
    gamma: float | None = None
    grid: str = "uniform"
    steps: tuple[int, ...] = ()
    times: Mapping[int, tuple[float, ...]] = field(default_factory=dict)
    eta: float | None = None

    def __post_init__(self):
        fits = self.gamma is None or (self.name == "consistency" and 0 <= self.gamma <= 1)
        fits = fits and (self.eta is None or (self.name == "sde" and 0 <= self.eta <= 10))
        if self.name not in SAMPLERS or not fits:
            raise ValueError(f"unknown sampler {self.label!r}: accepted are {ACCEPTED}")
        if self.grid not in (*GRIDS, SEARCHED):
            raise ValueError(f"unknown time grid {self.grid!r}: accepted are {', '.join(GRIDS)}")

    @classmethod
    def parse(cls, text: str, **fields: Any) -> Sampling:
        """Read "NAME", "consistency:GAMMA" or "sde:ETA", as on the command line. ``fields``: the other fields of the value."""
        name, colon, number = text.partition(":")
        try:
            given: dict[str, Any] = {"eta" if name == "sde" else "gamma": float(number)} if colon else {}
            return cls(name, **given, **fields)
        except ValueError:
            raise ValueError(f"unknown sampler {text!r}: accepted are {ACCEPTED}") from None

    @classmethod
    def from_description(cls, description: dict) -> Sampling:
        """Read the result of `describe`."""
        if not description:
            return cls()
        times = {int(n): tuple(grid) for n, grid in description.get("times", {}).items()}
        return cls.parse(description["name"], grid=description["grid"], steps=tuple(description["steps"]), times=times)

    def describe(self) -> dict:
        """Return the value as JSON data: {} for a model that takes any step count."""
        if not self.steps:
            return {}
        times = {"times": {str(n): list(grid) for n, grid in self.times.items()}} if self.times else {}
        return {"name": self.label, "grid": self.grid, "steps": list(self.steps), **times}

    @property
    def label(self) -> str:
        """The sampler as the command line spells it."""
        number = self.gamma if self.eta is None else self.eta
        return self.name if number is None else f"{self.name}:{number:g}"

    @property
    def fresh(self) -> float:
        """Part of the noise that is drawn anew between two steps, the gamma of "consistency"; 0 for every other sampler."""
        return (1.0 if self.gamma is None else self.gamma) if self.name == "consistency" else 0.0

    @property
    def noisy(self) -> bool:
        """Whether the sampler draws noise between its steps."""
        return SAMPLERS[self.name].noisy

    @property
    def two_times(self) -> bool:
        """Whether the sampler needs a two-time network."""
        return SAMPLERS[self.name].two_times

    def calls(self, steps: int) -> int:
        """Return the network evaluations of ``steps`` steps, at most, before guidance doubles them."""
        return SAMPLERS[self.name].calls(steps)

    def times_for(self, schedule: Schedule, steps: int) -> Tensor:
        """Return the time grid, float64 [steps + 1]: the step count's own where it has one, else the named grid's."""
        if steps in self.times:
            return torch.tensor(self.times[steps], dtype=torch.float64)
        return GRIDS[self.grid](schedule, steps)

    def run(self, denoiser: DenoiserLike, x: Tensor, times: Tensor, noise: Callable[[Tensor], Tensor], **cond: Any) -> Tensor:
        """Return the x0 [B, ...] that the sampler makes of x along ``times``. ``noise``: the source of a noisy sampler's noise.

        A self-conditioned denoiser gets its previous estimate at each step (`distill.self_conditioning`), zeros at first.
        """
        extra: dict[str, Any] = {"noise": noise} if self.noisy else {}
        extra |= {key: value for key in ("gamma", "eta") if (value := getattr(self, key)) is not None}
        return SAMPLERS[self.name].run(carrying(denoiser), x, times, **extra, **cond)

    def on_best_grid(self, schedule: Schedule, steps: int) -> Sampling:
        """Return the same sampler on the grid that serves it best for a training-free model (figures in EXPERIMENTS.md).

        On EDM and VE that is Karras' grid. On other schedules it is uniform in t below 8 steps; from 8 steps on each sampler has its
        own, because uniform steps then starve the middle of the path for the high-order ones.
        """
        if isinstance(schedule, EDM | VE):
            return replace(self, grid="karras")
        return replace(self, grid=SAMPLERS[self.name].best_grid if steps >= 8 else "uniform")

    def on_entries(self, schedule: Schedule, steps: int) -> Sampling:
        """Return the same sampler on the grid "trailing" where its uniform grid misses the entries of a discrete table.

        A network with the time input "index" was trained at the entries only. Diffusers visits the same ones.
        """
        misses = isinstance(schedule, Table) and steps < schedule.steps and schedule.steps % steps
        return replace(self, grid="trailing") if misses and self.grid == "uniform" and steps not in self.times else self
