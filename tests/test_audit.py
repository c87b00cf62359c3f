"""The audit gives students back the settings that they were made for, and refuses a model that is far from its base."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from distill.grid import GRIDS
from distill.schedule import EDM, Cosine, Flow, explain, prior_std
from recipes import audit
from teachers import Teacher, passport
from teachers.diffusers_scheduler import table_of
from teachers.oracle import Gaussian

SHAPE, STD = (1, 4, 4), 0.6
DIGITS_TABLE = table_of({"num_train_timesteps": 1024, "beta_schedule": "squaredcos_cap_v2", "rescale_betas_zero_snr": True})


def means() -> torch.Tensor:
    """The means of two classes and of the unconditional case."""
    return torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(5))


@dataclass(frozen=True)
class Base:
    """E[x0 | x_t] of two Gaussian classes of one width; label 2 is the unconditional case."""

    schedule: object

    def __call__(self, x_t, t, to=None, *, labels):
        return Gaussian(self.schedule, means()[labels], torch.tensor(STD))(x_t, t)


@dataclass(frozen=True)
class Student:
    """The exact map of the base under guidance along ``times``: from each of them to the next. Between them jumps are interpolated.

    Guidance of Gaussians of one width is the Gaussian with the guided mean. The first time stands for pure noise, also if it is below.
    """

    schedule: object
    times: tuple[float, ...]
    guidance: float

    def unit(self, t):
        return prior_std(self.schedule, torch.tensor(self.schedule.t_max)) / prior_std(self.schedule, t)

    def __call__(self, x_t, t, to=None, *, labels):
        start, end = np.array(self.times[:-1])[::-1], np.array(self.times[1:])[::-1]
        s = torch.tensor(np.interp(float(t), start, end), dtype=t.dtype).clamp(max=float(t) * (1 - 1e-6))
        mean = means()[2] + self.guidance * (means()[labels] - means()[2])
        x, at = (x_t, t) if float(t) < start[-1] else (x_t * self.unit(t), torch.full_like(t, self.schedule.t_max))
        moved = Gaussian(self.schedule, mean, torch.tensor(STD)).flow(x, at, s)
        return explain(self.schedule, x_t.double(), moved.double(), t, s).to(x_t)


def shifted(steps, shift):
    t = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    return shift * t / (1 + (shift - 1) * t)


STUDENTS = {  # name -> schedule, times, shift, guidance
    "one step": (Cosine(), [1.0, 0.0], 1.0, 1.0),
    "one step, guidance 3": (DIGITS_TABLE, [1.0, 0.0], 1.0, 3.0),
    "two steps, guidance 1.5": (Cosine(), [1.0, 0.5, 0.0], 1.0, 1.5),
    "four trailing entries of a table": (DIGITS_TABLE, [1.0, 0.75, 0.5, 0.25, 0.0], 1.0, 1.0),
    "eight, guidance 7.5": (DIGITS_TABLE, torch.linspace(1, 0, 9), 1.0, 7.5),
    "four leading entries": (DIGITS_TABLE, [(768 + 2) / 1024, (512 + 2) / 1024, (256 + 2) / 1024, 2 / 1024, 0.0], 1.0, 1.0),
    "flow, four steps, shift 3": (Flow(), shifted(4, 3.0), 3.0, 1.0),
    "flow, two steps, shift 5, guidance 2": (Flow(), shifted(2, 5.0), 5.0, 2.0),
    "flow, eight steps": (Flow(), shifted(8, 1.0), 1.0, 4.0),
    "Karras' levels": (EDM(), GRIDS["karras"](EDM(), 6), 1.0, 1.0),
}


def pair(schedule, times, guidance):
    """The student without its passport, and its base."""
    base = Teacher(Base(schedule), SHAPE, classes=2, null=2, record={"source": "base"})
    return replace(base, denoiser=Student(schedule, tuple(map(float, times)), guidance)), base


def config(**options):
    return audit.Config(model="student", teacher="base", samples=16, base_steps=32, **options)


@pytest.mark.parametrize("name", STUDENTS)
def test_students_without_their_passports_get_them_back(name):
    schedule, times, shift, guidance = STUDENTS[name]
    model, base = pair(schedule, times, guidance)
    ranked = audit.search(model, base, config())
    found = audit.passport_of(model, base, ranked, "base")
    n = len(times) - 1
    assert found.steps == (n,) and found.guidance == (
        {"rule": "none"} if guidance == 1 else {"rule": "distilled", "scale": guidance}
    )
    stated = passport.sigmas_of(schedule, torch.as_tensor(times, dtype=torch.float64))
    assert torch.allclose(torch.tensor(found.sigmas[str(n)], dtype=torch.float64), stated, atol=1e-6)
    assert found.shift == (shift if isinstance(schedule, Flow) and n > 1 else 1.0 if isinstance(schedule, Flow) else None)
    assert ranked[0][0] < 0.02 and found.found["next"]["distance"] > 1.2 * ranked[0][0]
    assert found.teacher == {"source": "base", "sha256": base.fingerprint}
