"""Continuous-time consistency (sCM, Lu & Song 2024): the limit of `Consistency` as s goes to t, by a tangent instead of a pair.

Written on TrigFlow with unit data, x = cos(a) x0 + sin(a) z, where v = (cos(a) x - f(x, a)) / sin(a); any student is asked there
through `Rescheduled`. On a consistency function df/da along the path is 0; the loss pulls v against

    g = cos(a) df/da = -cos^2(a) (v - dx/da) - r cos(a) sin(a) (x + dv/da),        r rises from 0 to 1 first

normalised to g / (|g| + c). The tangent is taken of the bare network, without gradient; one ordinary forward of the wrapped one
follows, so that gradients are reduced over processes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from distill.consistency import same_dropout
from distill.denoiser import Denoiser, DenoiserLike, ask_in, to_output
from distill.rng import Rng
from distill.schedule import Trig, add_noise, expand
from distill.target import Target

TRIG = Trig(sigma_data=1.0)


@dataclass(frozen=True)
class ContinuousConsistency:
    """sCD with a teacher's target, sCT with the datum.

    ``mean``, ``deviation``: of ln tan(a), the log noise level. ``warmup``: part of the run over which r rises. ``jvp``: "exact"
    (forward mode) or "finite" (central differences over ``step``, for operators that have no forward rule).
    """

    target: Target
    mean: float = -1.0
    deviation: float = 1.4
    warmup: float = 0.25
    c: float = 0.1
    jvp: str = "exact"
    step: float = 2e-4

    def __call__(self, student: DenoiserLike, x0: Tensor, *, rng: Rng, progress: float, **cond: Any) -> Tensor:
        a = torch.atan(torch.exp(self.mean + self.deviation * rng.normal(x0.flatten(1)[:, 0].float()))).to(x0.device)
        cos, sin = (expand(z, x0) for z in (torch.cos(a), torch.sin(a)))
        x = add_noise(TRIG, x0, rng.normal(x0), a)
        r = 1.0 if self.warmup == 0 else min(1.0, progress / self.warmup)
        with torch.no_grad():
            x0_hat = self.target(TRIG, x, a, x0, **cond)
            dx = rate(x, x0_hat, a)
            with same_dropout(x0.device):
                v, dv = tangent(velocity(bare(student), cond), x, a, dx, self.jvp, self.step)
            g = -cos * cos * (v - dx) - r * cos * sin * (x + dv)
            size = g.flatten(1).square().mean(1).sqrt()
            g = g / expand(size + self.c, g)
        return (velocity(student, cond)(x, a) - (v + g)).square().flatten(1).mean(1)


def velocity(student: DenoiserLike, cond: dict) -> Callable[[Tensor, Tensor], Tensor]:
    """(x, a) -> v, the rate at which x goes to what the student answers."""
    inner = ask_in(student, TRIG)
    return lambda x, a: rate(x, inner(x, a, **cond), a)


def rate(x: Tensor, x0: Tensor, a: Tensor) -> Tensor:
    """dx/da = cos(a) eps - sin(a) x0 of the path through x that ends at x0: v, on TrigFlow."""
    return to_output("v", TRIG, x, x0, a)


def bare(student: DenoiserLike) -> DenoiserLike:
    """The student around the network that DDP wraps: forward mode cannot pass through the wrapper. Others as they are."""
    if not isinstance(student, Denoiser):
        return student
    return dataclasses.replace(student, net=getattr(student.net, "module", student.net))


def tangent(
    function: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    a: Tensor,
    dx: Tensor,
    mode: str = "exact",
    h: float = 2e-4,
    end: float = TRIG.t_max,
) -> tuple[Tensor, Tensor]:
    """function(x, a) and its derivative along (dx, 1): "exact", or "finite" over steps of ``h``, which averages over what turns
    faster (the fastest time embeddings turn by a tenth of a radian in 2e-4). ValueError, naming the operator, where one has no
    forward-mode rule."""
    if mode == "finite":
        to_ends = torch.minimum(a, end - a) / 2  # times lie between 0 and ``end``
        by = to_ends.clamp(max=h)
        step = expand(by, x) * dx
        with torch.no_grad():
            ahead, behind = function(x + step, a + by), function(x - step, a - by)
            return function(x, a), (ahead - behind) / expand(2 * by, x)
    try:
        with sdpa_kernel(SDPBackend.MATH):  # the only attention kernel with a forward-mode rule
            value, derivative = torch.func.jvp(function, (x, a), (dx, torch.ones_like(a)))[:2]
            return value, derivative
    except (NotImplementedError, RuntimeError) as error:
        said = str(error).splitlines()
        line = next((part for part in said if "forward" in part.lower() or "functorch" in part.lower()), None)
        if line is None:
            raise
        raise ValueError(f"this network has no exact tangent ({line.strip()}): use --jvp finite") from None
