"""Self-conditioning: a denoiser that also takes its previous estimate of x0 (Analog Bits 2208.04202; RIN 2212.11972).

    x0_hat(i) = D(x(i), t(i), previous=x0_hat(i-1))          x0_hat(-1) = 0

The state of a sampler is then the pair (x, previous estimate). `carrying` keeps it, for every sampler, in one call per step. In a
training step the student is called once more, without gradient, and `first_estimate` is fed on a random half of the samples. The teacher
of that step, and both ends of a pair, begin with the same state as the student.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from distill.denoiser import DenoiserLike
from distill.rng import Rng
from distill.schedule import Schedule, per_sample

T = TypeVar("T")
INNER = ("denoiser", "inner", "net", "module")  # where denoisers, adapters and launchers hold what they wrap


def self_conditioned(part: Any) -> bool:
    """Return whether the network in a denoiser takes ``previous``, the estimate [B, ...] of the step before. Of experts, all must."""
    if getattr(part, "self_conditioned", False):
        return True
    if hasattr(part, "experts"):
        return all(map(self_conditioned, part.experts))
    name = next((name for name in INNER if hasattr(part, name)), None)
    return name is not None and self_conditioned(getattr(part, name))


@dataclass
class Carrying:
    """Call a self-conditioned denoiser with its estimate of the last call, and keep the new one. One value serves one batch.

    ``previous``: the estimate [B, ...] that the first call gets; None stands for zeros.
    """

    denoiser: DenoiserLike
    previous: Tensor | None = None

    @property
    def schedule(self) -> Schedule:
        return self.denoiser.schedule

    def __call__(self, x_t: Tensor, t: Tensor, to: Tensor | None = None, **cond: Any) -> Tensor:
        state = {} if self.previous is None else {"previous": self.previous}
        self.previous = self.denoiser(x_t, t, to=to, **state, **cond)
        return self.previous


def carrying(denoiser: DenoiserLike, previous: Tensor | None = None) -> DenoiserLike:
    """Return the denoiser with a fresh state that begins with ``previous``; unchanged if its network is not self-conditioned."""
    return Carrying(denoiser, previous) if self_conditioned(denoiser) else denoiser


def carrying_target(target: T, previous: Tensor | None = None) -> T:
    """Return a target (`distill.target`) whose teacher is `carrying`; unchanged without a teacher."""
    if not self_conditioned(getattr(target, "teacher", None)):
        return target
    return replace(target, teacher=carrying(target.teacher, previous))  # type: ignore[attr-defined, type-var]


def first_estimate(student: DenoiserLike, x_t: Tensor, t: Tensor, rng: Rng, **cond: Any) -> Tensor | None:
    """Return the previous estimate of a training step, [B, ...]: student(x_t, t) without gradient on a random half, zeros elsewhere.

    None for a network that is not self-conditioned, without a call or a draw.
    """
    if not self_conditioned(student):
        return None
    with torch.no_grad():
        estimate = student(x_t, t, **cond)
    return torch.where(per_sample(rng.uniform() < 0.5, x_t), estimate, torch.zeros_like(estimate))
