"""The training loop of every method: a generator, so that logging, saving and evaluating stay visible in the recipe."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from distill.checkpoint import Resumable, gather_state, restore_state, whole
from distill.denoiser import Denoiser
from distill.rng import Rng, seed_of


class Method(Protocol):
    """loss = method(student, x0, rng=rng, progress=done, **cond): unreduced, [B]; progress runs from 0 to 1.

    A method whose attribute ``averaged`` is true is also given ``average``, the EMA of the student.
    """

    def __call__(self, student: Denoiser, x0: Tensor, *, rng: Rng, progress: float, **cond: Any) -> Tensor: ...


@dataclass(frozen=True)
class Shares:
    """How a batch is cut over processes and, where it does not fit at once, over accumulation steps.

    Raises ValueError where ``batch_size`` cannot be cut into equal shares of at most ``microbatch`` samples.
    """

    batch_size: int
    world: int = 1
    rank: int = 0
    microbatch: int | None = None

    def __post_init__(self):
        if self.batch_size < 1 or self.batch_size % (self.world * self.accumulate):
            raise ValueError(
                f"a batch of {self.batch_size} cannot be cut into equal shares for {self.world} processes"
                f" of {self.accumulate} microbatches each: choose a multiple of {self.world * self.accumulate}"
            )

    @property
    def accumulate(self) -> int:
        return 1 if self.microbatch is None else math.ceil(self.batch_size / (self.world * self.microbatch))

    def rows(self, turn: int) -> slice:
        """The rows of the batch that this process takes in its ``turn``-th microbatch."""
        size = self.batch_size // (self.world * self.accumulate)
        start = (turn * self.world + self.rank) * size
        return slice(start, start + size)


@dataclass(frozen=True)
class Optimization:
    """What is optimised and for how long, in images. The learning rate falls linearly to 0 after ``constant`` of the run."""

    images: int
    batch_size: int = 128
    microbatch: int | None = None
    lr: float = 1e-3
    constant: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    warmup_images: int = 0
    clip_norm: float = 1.0
    ema_halflife_images: float | None = None

    @property
    def steps(self) -> int:
        return max(1, round(self.images / self.batch_size))

    def lr_at(self, step: int) -> float:
        """The rate of step 0, 1, ..., steps - 1."""
        decay = min(1.0, (1 - step / self.steps) / (1 - self.constant)) if self.constant < 1 else 1.0
        warmup = min(1.0, (step + 1) * self.batch_size / self.warmup_images) if self.warmup_images else 1.0
        return self.lr * decay * warmup


@dataclass(frozen=True)
class State:
    """Where training stands after ``step`` steps. ``loss`` is this process's and stays on the device until it is asked for.
    ``ema`` is the averaged student, or the student itself where no EMA is kept."""

    step: int
    images: int
    loss: Tensor
    grad_norm: Tensor
    lr: float
    student: Denoiser
    ema: Denoiser


Batches = Callable[[int], Iterable[tuple[Tensor, dict[str, Tensor]]]]


def train(
    method: Method,
    student: Denoiser,
    batches: Batches,
    accelerator: Accelerator,
    optimization: Optimization,
    *,
    seed: int,
    phase: str,
    resumable: Resumable | None = None,
    save_every_images: int | None = None,
) -> Iterator[State]:
    """Trains ``student.net`` in place and yields after every step; the one step is

        loss = mean(method(student, x0)); clip the reduced gradient; Adam; EMA with beta = 2^(-batch / halflife)

    ``batches(step)`` iterates over (x0, cond) microbatches from that step on, the rows of `Shares` in turn. Every draw is a
    function of (seed, phase, step, sample): with ``resumable`` a killed run continues to the same bits on the CPU.
    Raises FloatingPointError at the first step whose gradient is not finite (in half precision the scaler skips those).
    """
    o = optimization
    shares = Shares(o.batch_size, accelerator.num_processes, accelerator.process_index, o.microbatch)
    generator = torch.Generator(accelerator.device)
    adam = torch.optim.AdamW(student.net.parameters(), lr=o.lr, betas=o.betas, weight_decay=o.weight_decay)
    average = copy.deepcopy(student.net).requires_grad_(False) if o.ema_halflife_images else None
    net, optimizer = accelerator.prepare(student.net, adam)
    module = accelerator.unwrap_model(net)
    student = dataclasses.replace(student, net=net)
    if average is not None:
        average = average.to(accelerator.device)  # whole in every process, also where FSDP2 shards the student
    ema = dataclasses.replace(student, net=average if average is not None else module)
    extra = {"average": ema} if getattr(method, "averaged", False) and average is not None else {}
    identity = f"{seed}/{phase}/{dataclasses.asdict(o)}"

    first = 0
    if resumable is not None and (found := resumable.latest(identity)) is not None:
        first, tensors = found
        restore_state(tensors, module, optimizer.optimizer, average)

    net.train()
    if average is not None:
        average.train(getattr(method, "averaged", False))  # as a target it drops the units that the student drops
    stream = iter(batches(first))
    for step in range(first, o.steps):
        torch.manual_seed(seed_of(seed, phase, step, "dropout", accelerator.process_index))
        for group in optimizer.param_groups:
            group["lr"] = o.lr_at(step)
        total = torch.zeros((), device=accelerator.device)
        for turn in range(shares.accumulate):
            x0, cond = next(stream)
            rng = Rng(generator.manual_seed(seed_of(seed, phase, step)), o.batch_size, shares.rows(turn))
            with _synchronising(accelerator, net, turn == shares.accumulate - 1):
                loss = method(student, x0, rng=rng, progress=step / o.steps, **extra, **cond).mean() / shares.accumulate
                accelerator.backward(loss)
            total += loss.detach()
        grad_norm = accelerator.clip_grad_norm_(net.parameters(), o.clip_norm)
        if accelerator.scaler is None and not torch.isfinite(grad_norm):
            raise FloatingPointError(f"the gradient of step {step} of phase {phase} (seed {seed}) is not finite")
        optimizer.step()
        optimizer.zero_grad()
        if average is not None and o.ema_halflife_images:
            _average(average, module, 0.5 ** (o.batch_size / o.ema_halflife_images))
        done = step + 1
        if resumable is not None and save_every_images and _crossed(done, o.batch_size, save_every_images) and done < o.steps:
            tensors = gather_state(module, optimizer.optimizer, average)
            if accelerator.is_main_process:
                resumable.save(done, tensors, identity)
        yield State(done, done * o.batch_size, total, grad_norm, o.lr_at(step), student, ema)


def _synchronising(accelerator: Accelerator, net: nn.Module, last: bool):
    return torch.enable_grad() if last else accelerator.no_sync(net)


def _crossed(done: int, batch_size: int, every: int) -> bool:
    return done * batch_size // every > (done - 1) * batch_size // every


@torch.no_grad()
def _average(average: nn.Module, module: nn.Module, beta: float) -> None:
    torch._foreach_lerp_(list(average.parameters()), [whole(p.detach()) for p in module.parameters()], 1 - beta)
    for old, new in zip(average.buffers(), module.buffers(), strict=True):
        old.copy_(whole(new))
