"""An ensemble of experts (a base model and a refiner, say): several denoisers, each for its own range of noise levels, as one.

``experts:A|B|C,logsnr=-2,2`` uses A where the log-SNR is below -2, B up to 2, and C above.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from distill.denoiser import DenoiserLike, on_schedule
from distill.schedule import Schedule
from teachers.teacher import Teacher

ACCEPTED = "experts:SPEC|SPEC|...,logsnr=NUMBER,NUMBER,... with increasing numbers, one between each two experts"


@dataclass(frozen=True)
class Experts:
    """Evaluate E[x0 | x_t] with the expert of each sample's log-SNR: ``experts[i]`` up to ``logsnr[i]``, the last above them all.

    x_t and t are those of ``schedule``. Raises ValueError unless the numbers increase and are one fewer than the experts.
    """

    schedule: Schedule
    experts: tuple[DenoiserLike, ...]
    logsnr: tuple[float, ...]

    def __post_init__(self):
        if len(self.logsnr) != len(self.experts) - 1 or not all(
            a < b for a, b in pairwise((-math.inf, *self.logsnr, math.inf))
        ):
            raise ValueError(f"{len(self.experts)} experts with bounds {self.logsnr}: accepted is {ACCEPTED}")

    def __call__(self, x_t: Tensor, t: Tensor, to: Tensor | None = None, **cond: Any) -> Tensor:
        t = t.expand(x_t.shape[0])
        bounds = torch.tensor(self.logsnr, dtype=torch.float64, device=t.device)
        which = torch.bucketize(self.schedule.logsnr(t.double()), bounds)
        inputs = cond if to is None else {"to": to, **cond}
        out = torch.empty_like(x_t)
        for i, expert in enumerate(self.experts):
            rows = (which == i).nonzero()[:, 0]
            if len(rows):
                own = {name: value[rows.to(value.device)] if value.dim() else value for name, value in inputs.items()}
                at = rows.to(x_t.device)
                out[at] = on_schedule(expert, self.schedule)(x_t[at], t[rows], **own)
        return out


def load(spec: str, load_one: Callable[[str], Teacher]) -> Teacher:
    """Load several models as experts. Shape, classes and schedule are those of the first.

    ``load_one``: loads one model from its spec. Raises ValueError for an incomplete spec, or if shapes or classes differ.
    """
    specs, _, bounds = spec.removeprefix("experts:").rpartition(",logsnr=")
    try:
        logsnr = tuple(map(float, bounds.split(",")))
    except ValueError:
        raise ValueError(f"{spec!r}: accepted is {ACCEPTED}") from None
    models = [load_one(one) for one in specs.split("|")]
    first = models[0]
    for one, model in zip(specs.split("|"), models, strict=True):
        if (model.shape, model.classes, model.null) != (first.shape, first.classes, first.null):
            found = f"{one}: shape {model.shape} and {model.classes} classes"
            raise ValueError(f"{found}, but the first expert has {first.shape} and {first.classes}: they must agree")
    experts = Experts(first.denoiser.schedule, tuple(model.denoiser for model in models), logsnr)
    record = {"source": spec, "experts": [model.fingerprint for model in models]}
    return Teacher(experts, first.shape, None, first.classes, first.null, record=record, codec=first.codec)
