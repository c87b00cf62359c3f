"""A second network that a method trains beside the student, such as the fake score of distribution matching.

A method with the attribute ``second`` is called with ``second``, the network as it is now, and has

    second_loss(second, student, x0, *, rng, progress, **cond) -> loss of each sample [B], with gradient for the second network

Before each step of the student the second network takes `Second.period` steps of its own, on the batch of that step.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

from distill.denoiser import Denoiser
from distill.device import lay_out
from distill.resume import gather_state, restore_state
from distill.rng import Rng, seed_of
from distill.zero import is_zero

Rows = tuple[Tensor, dict[str, Tensor], slice]  # x0 [b, ...], its conditions, and its rows of the batch: a microbatch


@dataclass(frozen=True)
class Second:
    """Say how the second network begins and is trained. ``period``: its steps per step of the student.

    ``lr`` falls linearly to 0 over the run, as that of the student does. At a constant rate the noise of this network's updates stays
    in the student's gradient to the end.
    """

    begin: Denoiser
    lr: float = 1e-3
    period: int = 5
    betas: tuple[float, float] = (0.0, 0.999)
    clip_norm: float = 1.0


class SecondTrainer:
    """Train the second network of a method: with its own optimizer, reduced over processes, saved and restored with the student."""

    def __init__(self, method: Any, accelerator: Accelerator):
        if is_zero(accelerator):
            raise ValueError(
                "DeepSpeed shards one network, and this method trains two: choose configs/ddp.yaml or configs/fsdp2.yaml"
            )
        self.method, self.accelerator, self.of = method, accelerator, method.second
        net = copy.deepcopy(self.of.begin.net).requires_grad_(True).train()
        lay_out(net, accelerator.device, accelerator.distributed_type == DistributedType.FSDP)
        adam = torch.optim.AdamW(net.parameters(), lr=self.of.lr, betas=self.of.betas, weight_decay=0.0, fused=True)
        self.net, self.optimizer = accelerator.prepare(net, adam)
        self.module = accelerator.unwrap_model(self.net)

    @property
    def denoiser(self) -> Denoiser:
        """The network without wrappers, for the student's loss."""
        return dataclasses.replace(self.of.begin, net=self.module)

    def steps(self, student: Denoiser, parts: list[Rows], draws: tuple[Any, ...], batch: int, progress: float) -> None:
        """Take `Second.period` steps. ``student``: without wrappers. ``draws``: what the random numbers are a function of."""
        a, wrapped = self.accelerator, dataclasses.replace(self.of.begin, net=self.net)
        for group in self.optimizer.param_groups:
            group["lr"] = self.of.lr * (1 - progress)
        for turn in range(self.of.period):
            self.optimizer.zero_grad()
            for k, (x0, cond, rows) in enumerate(parts):
                rng = Rng.seeded(seed_of(*draws, "second", turn), a.device, batch, rows)
                with nullcontext() if k == len(parts) - 1 else a.no_sync(self.net):
                    loss = self.method.second_loss(wrapped, student, x0, rng=rng, progress=progress, **cond).mean()
                    a.backward(loss / len(parts))
            a.clip_grad_norm_(self.net.parameters(), self.of.clip_norm)
            self.optimizer.step()
        self.optimizer.zero_grad()

    def state(self) -> dict[str, Tensor]:
        """Return weights and optimizer state. A collective call if weights are sharded."""
        tensors = gather_state(self.module, self.optimizer.optimizer, None)
        return {f"second.{name}": value for name, value in tensors.items()}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Load the result of `state`."""
        own = {name.removeprefix("second."): value for name, value in tensors.items() if name.startswith("second.")}
        restore_state(own, self.module, self.optimizer.optimizer, None)


@contextmanager
def without_gradient(net: nn.Module) -> Iterator[None]:
    """Let no gradient reach the weights; it still passes through the network to its input."""
    trained = [p for p in net.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
