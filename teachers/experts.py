"""Several denoisers, each for its own range of noise, as one: a base model and a refiner, or an ensemble of experts.

``experts:A|B|C,logsnr=-2,2`` asks A where the log-SNR is below -2, B up to 2, and C above.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distill.denoiser import DenoiserLike, ask_in
from distill.schedule import Schedule
from teachers.load import Teacher
from teachers.load import load as load_one

ACCEPTED = "experts:SPEC|SPEC|...,logsnr=NUMBER,NUMBER,... with one number, rising, between each two"


@dataclass(frozen=True)
class Experts:
    """E[x0 | x_t] by the expert of the log-SNR: ``experts[i]`` up to ``logsnr[i]``, the last above them all.

    All are asked in the x_t and t of ``schedule``. Raises ValueError where the numbers do not rise or are not one fewer.
    """

    schedule: Schedule
    experts: tuple[DenoiserLike, ...]
    logsnr: tuple[float, ...]

    def __post_init__(self):
        if len(self.logsnr) != len(self.experts) - 1 or list(self.logsnr) != sorted(set(self.logsnr)):
            raise ValueError(f"{len(self.experts)} experts with bounds {self.logsnr}: accepted is {ACCEPTED}")

    def __call__(self, x_t: Tensor, t: Tensor, **cond: Any) -> Tensor:
        t = t.expand(x_t.shape[0])
        bounds = torch.tensor(self.logsnr, dtype=torch.float64, device=t.device)
        which = torch.bucketize(self.schedule.logsnr(t.double()), bounds)
        out = torch.empty_like(x_t)
        for i, expert in enumerate(self.experts):
            rows = (which == i).nonzero()[:, 0].to(x_t.device)
            if len(rows):
                mine = {name: value[rows] if value.dim() else value for name, value in cond.items()}
                out[rows] = ask_in(expert, self.schedule)(x_t[rows], t[rows.to(t.device)], **mine)
        return out


def load(spec: str) -> Teacher:
    """A teacher of experts; shape, classes and schedule are the first one's. ValueError where the others differ from it."""
    specs, _, bounds = spec.removeprefix("experts:").rpartition(",logsnr=")
    try:
        logsnr = tuple(map(float, bounds.split(",")))
    except ValueError:
        raise ValueError(f"{spec!r}: accepted is {ACCEPTED}") from None
    models = [load_one(one) for one in specs.split("|")]
    first = models[0]
    for one, model in zip(specs.split("|"), models, strict=True):
        if (model.shape, model.classes, model.null) != (first.shape, first.classes, first.null):
            said = f"{one}: shape {model.shape} and {model.classes} classes"
            raise ValueError(f"{said}, the first expert has {first.shape} and {first.classes}: they must agree")
    experts = Experts(first.denoiser.schedule, tuple(model.denoiser for model in models), logsnr)
    record = {"source": spec, "experts": [model.fingerprint for model in models]}
    return Teacher(experts, first.shape, None, first.classes, first.null, record=record, codec=first.codec)
