"""Continuous-time consistency (sCM, Lu & Song 2410.11081): the limit of `Consistency` for s -> t, with a tangent instead of a pair.

The formulas are on TrigFlow with unit data: x = cos(a) x0 + sin(a) z and v = (cos(a) x - f(x, a)) / sin(a). Students on any other
schedule are evaluated through `on_schedule`. Along the path df/da of a consistency function is 0. The loss moves v against

    g = cos(a) df/da = -cos^2(a) (v - dx/da) - r cos(a) sin(a) (x + dv/da)

normalised to g / (|g| + c). r rises from 0 to 1 at the start of the run. The tangent is computed on the unwrapped network, in float32
and without gradient. One ordinary forward pass through DDP follows, so that gradients are reduced over processes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from distill.consistency import same_dropout
from distill.denoiser import Denoiser, DenoiserLike, on_schedule, to_output
from distill.rng import Rng
from distill.schedule import Trig, add_noise, expand, expand_all
from distill.speed import uncompiled
from distill.target import Target

TRIG = Trig(sigma_data=1.0)
NO_ROOM = 1e-5  # so near to the end of the time axis differences are backward


@dataclass(frozen=True)
class ContinuousConsistency:
    """Return the sCM loss |v - sg(v + g)|^2 per pixel, [B]: sCD if ``target`` is a teacher's, sCT if it is the data sample.

    ``mean``, ``deviation``: of ln tan(a), the log noise level. ``warmup``: part of the run over which r rises to 1.
    ``jvp``: "exact" (forward mode) or "finite" (central differences over ``step``, for operators without a forward-mode rule).
    """

    target: Target
    mean: float = -1.0
    deviation: float = 1.4
    warmup: float = 0.25
    c: float = 0.1
    jvp: str = "exact"
    step: float = 2e-4

    def __call__(self, student: DenoiserLike, x0: Tensor, *, rng: Rng, progress: float, **cond: Any) -> Tensor:
        a = torch.atan(torch.exp(self.mean + self.deviation * rng.normal()))
        cos, sin = expand_all((torch.cos(a), torch.sin(a)), x0)
        x = add_noise(TRIG, x0, rng.normal(x0), a)
        r = 1.0 if self.warmup == 0 else min(1.0, progress / self.warmup)
        with torch.no_grad():
            x0_hat = self.target(TRIG, x, a, x0, **cond)
            dx = rate(x, x0_hat, a)
            with same_dropout(x0.device):
                v, dv = tangent(velocity(unwrapped(student), cond), x, a, dx, self.jvp, self.step)
            g = -cos * cos * (v - dx) - r * cos * sin * (x + dv)
            size = g.flatten(1).square().mean(1).sqrt()
            g = g / expand(size + self.c, g)
        return (velocity(student, cond)(x, a) - (v + g)).square().flatten(1).mean(1)


def velocity(student: DenoiserLike, cond: dict) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the function (x, a) -> v, the rate of change of x towards the student's x0."""
    inner = on_schedule(student, TRIG)
    return lambda x, a: rate(x, inner(x, a, **cond), a)


def rate(x: Tensor, x0: Tensor, a: Tensor) -> Tensor:
    """Return dx/da = cos(a) eps - sin(a) x0 of the path through x that ends at x0. It is the v prediction on TrigFlow."""
    return to_output("v", TRIG, x, x0, a)


def unwrapped(student: DenoiserLike) -> DenoiserLike:
    """Return the student without DDP and without autocast, for derivatives along the path; other denoisers unchanged.

    Forward-mode differentiation passes neither. Tangents are in float32, as in 2410.11081: a difference of bf16 outputs is rounding
    error.
    """
    if not isinstance(student, Denoiser):
        return student
    return dataclasses.replace(student, net=_without_autocast(getattr(student.net, "module", student.net)))


def _without_autocast(net: nn.Module) -> Any:
    """Return the network without the autocast that accelerate puts around the forward of an instance; hooks and shards stay."""
    if "_original_forward" not in vars(net):
        return net

    def call(*args: Any, **kwargs: Any) -> Tensor:
        prepared, net.forward = net.forward, net._original_forward  # type: ignore[assignment]
        try:
            return net(*args, **kwargs)
        finally:
            net.forward = prepared

    return call


@contextmanager
def forward_mode() -> Iterator[None]:
    """Use only kernels with a forward-mode rule: no compiled ones, math attention, and before torch 2.14 GroupNorm of contiguous
    inputs."""

    def contiguous(module: nn.Module, inputs: tuple) -> tuple | None:
        return tuple(x.contiguous() for x in inputs) if isinstance(module, nn.GroupNorm) else None

    with ExitStack() as stack:
        stack.enter_context(uncompiled())
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if torch.__version__ < (2, 14):  # type: ignore[operator]
            stack.callback(nn.modules.module.register_module_forward_pre_hook(contiguous).remove)  # type: ignore[arg-type]
        yield


def tangent(
    function: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    a: Tensor,
    dx: Tensor,
    mode: str = "exact",
    h: float = 2e-4,
    end: float = TRIG.t_max,
) -> tuple[Tensor, Tensor]:
    """Return function(x, a) and its derivative along (dx, 1).

    ``mode``: "exact" uses forward mode. "finite" uses central differences over ``h``, shorter near the ends 0 and ``end`` of the time
    axis and backward at ``end`` itself; they average over everything that oscillates faster than h. (The fastest time embeddings turn by
    0.1 rad in 2e-4.)

    Raises ValueError that names the operator if one has no forward-mode rule.
    """
    if mode == "finite":
        to_ends, last = torch.minimum(a, end - a) / 2, end - a < NO_ROOM
        back = torch.where(last, h, to_ends.clamp(max=h))
        by = torch.where(last, 0.0, back)
        with torch.no_grad():
            with same_dropout(x.device):
                ahead = function(x + expand(by, x) * dx, a + by)
            with same_dropout(x.device):
                behind = function(x - expand(back, x) * dx, a - back)
            return function(x, a), (ahead - behind) / expand(by + back, x)
    try:
        with forward_mode():
            value, derivative = torch.func.jvp(function, (x, a), (dx, torch.ones_like(a)))[:2]
            return value, derivative
    except (NotImplementedError, RuntimeError) as error:
        lines = str(error).splitlines()
        line = next((part for part in lines if "forward" in part.lower() or "functorch" in part.lower()), None)
        if line is None:
            raise
        raise ValueError(f"this network has no exact tangent ({line.strip()}): use --jvp finite") from None
