"""Training steps beside `peer_loop`, the same algorithm in plain PyTorch, and the difference of both losses on the same draws."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import peer_loop
from benchmarks.networks import Network
from benchmarks.training import built, steps
from benchmarks.turns import Clock, Ratio, in_turn
from distill.rng import Rng
from distill.schedule import Table

STUDENT_STEPS = 4


@dataclass(frozen=True, kw_only=True)
class Given(Rng):
    """Draws that were made before: ``noise`` [B, ...] and ``index`` [B]."""

    noise: Tensor
    index: Tensor

    def normal(self, like: Tensor | None = None) -> Tensor:
        return self.noise

    def integers(self, high: int) -> Tensor:
        assert high == STUDENT_STEPS
        return self.index


def difference(network: Network) -> float:
    """Return the relative difference of the losses of this project and of the peer, on the same batch and draws."""
    model, size = network.model, min(network.batch, 64)
    _, method = built("progressive", model, network.data)
    assert isinstance(model.denoiser.schedule, Table) and network.data.labels is not None
    x0, labels = network.data.x0(slice(size)), network.data.labels[:size]
    generator = torch.Generator().manual_seed(0)
    noise, index = torch.randn(x0.shape, generator=generator), torch.randint(STUDENT_STEPS, (size,), generator=generator)
    net: Any = copy.deepcopy(model.parametric.net).train()
    net.unet.conv_out.bias.data += 0.1  # a student that differs from its teacher
    trained = type(model.parametric)(net, model.denoiser.schedule, "v", "index")
    with torch.no_grad():
        rng = Given(generator, size, noise=noise, index=index)
        ours = method(trained, x0, rng=rng, progress=0.0, **model.condition(labels)).mean()
        table, teacher = torch.tensor(model.denoiser.schedule.alphas_cumprod), model.parametric.net
        theirs = peer_loop.loss_of(teacher.unet, net.unet, table, x0, labels, noise, index, STUDENT_STEPS)  # type: ignore[arg-type]
    return float((ours - theirs).abs() / theirs)


def rows(title: str, network: Network, turns: int, clock: Clock, device: torch.device) -> Iterator[Ratio]:
    """Yield our training step by the peer's, with torch's default Adam and with its fused one."""
    apart = difference(network)
    for fused in (False, True):
        model = network.model.to(device)
        student, method = built("progressive", model, network.data)
        net: Any = model.student().net.to(device)
        teacher: Any = model.parametric.net
        table = torch.tensor(model.denoiser.schedule.alphas_cumprod)  # type: ignore[attr-defined]
        losses = peer_loop.training(
            teacher.unet, net.unet, table, network.data.images, network.data.labels, network.batch, STUDENT_STEPS, fused=fused
        )
        name = f"{title} progressive by peer_loop{' with fused Adam' if fused else ''}"
        step = steps(method, student, network, device)
        yield in_turn(name, step, partial(next, losses), turns, clock, 1.0, apart)
