"""The training loop of every method. It is a generator: logging, saving and evaluating stay visible in the recipe."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import reduce
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, fsdp2_prepare_model
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from distill import zero
from distill.denoiser import Denoiser
from distill.device import lay_out
from distill.divergence import WINDOW, Guard, Recorder
from distill.optimizers import optimizer_of
from distill.replay import Step
from distill.resume import Resumable, Stopped, local, whole
from distill.rng import Rng, seed_of
from distill.second import SecondTrainer

READS = 50  # how often a phase waits for a GPU to look for bad steps, beside checkpoints


class Method(Protocol):
    """Return the loss of each sample, [B], with gradient. ``progress`` runs from 0 to 1 over the run.

    A method whose attribute ``averaged`` is true also gets ``average``, the EMA of the student. One with the attribute ``second`` also
    gets ``second``, a network that is trained beside the student (`distill.second`).
    """

    def __call__(self, student: Denoiser, x0: Tensor, *, rng: Rng, progress: float, **cond: Any) -> Tensor: ...


@dataclass(frozen=True)
class BatchSplit:
    """Split a batch over processes and, where it does not fit in memory, over accumulation steps.

    Raises ValueError where ``batch_size`` cannot be split into equal parts of at most ``microbatch`` samples.
    """

    batch_size: int
    world: int = 1
    rank: int = 0
    microbatch: int | None = None

    def __post_init__(self):
        if self.batch_size < 1 or self.batch_size % (self.world * self.accumulate):
            raise ValueError(
                f"a batch of {self.batch_size} cannot be split equally over {self.world} processes"
                f" of {self.accumulate} microbatches each: choose a multiple of {self.world * self.accumulate}"
            )

    @property
    def accumulate(self) -> int:
        return 1 if self.microbatch is None else math.ceil(self.batch_size / (self.world * self.microbatch))

    def rows(self, turn: int) -> slice:
        """Return the rows of the batch that are this process's ``turn``-th microbatch."""
        size = self.batch_size // (self.world * self.accumulate)
        start = (turn * self.world + self.rank) * size
        return slice(start, start + size)

    def table(self) -> list[list[tuple[int, int]]]:
        """Return (start, stop) of `rows` for each process and turn."""
        splits = (dataclasses.replace(self, rank=rank) for rank in range(self.world))
        return [[(s.rows(turn).start, s.rows(turn).stop) for turn in range(s.accumulate)] for s in splits]


@dataclass(frozen=True)
class Optimization:
    """Hold the optimisation settings; lengths are in images.

    ``images``: asked for; whole batches are trained, `trained_images` together, at least one.
    The learning rate rises over ``warmup_images`` and falls linearly to 0 after the part ``constant`` of the run. ``clip_norm``: largest
    gradient norm. ``ema_halflife_images``: half-life of the average of the weights; None for no average.
    ``optimizer``: one of `distill.names.OPTIMIZERS`.
    """

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
    optimizer: str = "adamw"

    @property
    def steps(self) -> int:
        return max(1, round(self.images / self.batch_size))

    @property
    def trained_images(self) -> int:
        """The images that are trained: `images`, rounded to whole batches."""
        return self.steps * self.batch_size

    def lr_at(self, step: int) -> float:
        """Return the learning rate of step 0, 1, ..., steps - 1."""
        decay = min(1.0, (1 - step / self.steps) / (1 - self.constant)) if self.constant < 1 else 1.0
        warmup = min(1.0, (step + 1) * self.batch_size / self.warmup_images) if self.warmup_images else 1.0
        return self.lr * decay * warmup


@dataclass(frozen=True)
class State:
    """The state of training after ``step`` steps.

    ``loss``: of this process, a tensor on its device. ``ema``: the averaged student, or the student where no average is kept.
    ``rollback``: in the first state after a rollback, what went wrong, and how training goes on.
    """

    step: int
    images: int
    loss: Tensor
    grad_norm: Tensor
    lr: float
    student: Denoiser
    ema: Denoiser
    rollback: str | None = None


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
    rollbacks: int = 2,
    stop: Callable[[], bool] | None = None,
) -> Iterator[State]:
    """Train those weights of ``student.net`` in place that require a gradient, and yield the `State` after every step. One step is

        loss = mean(method(student, x0)); clip the reduced gradient; Adam; EMA with beta = 2^(-batch / halflife)

    ``batches(step)`` iterates over the (x0, cond) microbatches of `BatchSplit` from that step on. Every random draw is a function of
    (seed, phase, step, sample). With ``resumable`` a killed run continues, to the same bits on the CPU. It may continue on another number
    of processes: the data of a set in memory and all noise stay the same, sums round differently. Only dropout masks and the order of a
    stream (`recipes.data.stream`) depend on that number.

    ``stop`` is called after every step. If it is true on any process, all save the step and raise `Stopped`.

    A step that `distill.divergence` finds bad is not taken. Training then goes back to the last checkpoint, or to the start, at most
    ``rollbacks`` times: with other random numbers, and with the data after those of the bad step. Then, or if it is bad once more, it raises
    `Diverged`, a FloatingPointError. (In fp16 the gradient scaler skips steps of finite loss whose gradient is not finite.)
    """
    o = optimization
    split = BatchSplit(o.batch_size, accelerator.num_processes, accelerator.process_index, o.microbatch)
    # AdamW of torch can skip a step on the device; other optimizers cannot, so that the host checks each step first
    waiting = waits(accelerator.device) and o.optimizer == "adamw"  # where the host reads from the device at some steps only
    sharded = accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
    lay_out(student.net, accelerator.device, sharded)
    trained = [weight for weight in student.net.parameters() if weight.requires_grad]
    adam = optimizer_of(o.optimizer, trained, lr=o.lr, betas=o.betas, weight_decay=o.weight_decay)
    average = copy.deepcopy(student.net).requires_grad_(False) if o.ema_halflife_images else None
    if zero.is_zero(accelerator):
        net, optimizer = zero.prepare(accelerator, student.net, adam, o.clip_norm)
    else:
        net, optimizer = accelerator.prepare(student.net, adam)
    module = accelerator.unwrap_model(net)
    student = dataclasses.replace(student, net=net)
    if average is not None:
        average = _placed(average, module, accelerator)
    averaging = None if average is None else _Average(average, module)
    weights = [weight for weight in net.parameters() if weight.requires_grad]
    ema = dataclasses.replace(student, net=average if average is not None else module)
    extra = {"average": ema} if getattr(method, "averaged", False) and average is not None else {}
    how = {key: value for key, value in dataclasses.asdict(o).items() if (key, value) != ("optimizer", "adamw")}
    identity = f"{seed}/{phase}/{how}"  # that of checkpoints from before there was a choice
    recorder = Recorder.on(accelerator.device, o.clip_norm, accelerator.scaler is not None)
    second = SecondTrainer(method, accelerator) if hasattr(method, "second") else None
    if second is not None:
        extra["second"] = second.denoiser
    guard = Guard(accelerator, recorder, optimizer.optimizer, module, average, resumable, identity, rollbacks, second)
    step, rollback = guard.resume(), None

    net.train()
    if average is not None:
        average.train(getattr(method, "averaged", False))  # as a target it uses the dropout masks of the student
    stream = iter(batches(step + recorder.skipped))
    while step < o.steps:
        draws = recorder.stream(seed)
        torch.manual_seed(seed_of(draws, phase, step, "dropout", accelerator.process_index))
        for group in optimizer.param_groups:
            group["lr"] = o.lr_at(step)
        parts = [(*next(stream), split.rows(turn)) for turn in range(split.accumulate)]
        if second is not None:
            plain = dataclasses.replace(student, net=module)
            second.steps(plain, parts, (draws, phase, step), o.batch_size, step / o.steps)
        losses = []
        for turn, (x0, cond, rows) in enumerate(parts):
            rng = Rng.seeded(seed_of(draws, phase, step), accelerator.device, o.batch_size, rows)
            with _synchronising(accelerator, net, turn == split.accumulate - 1):
                loss = method(student, x0, rng=rng, progress=step / o.steps, **extra, **cond).mean()
                loss = loss / split.accumulate if split.accumulate > 1 else loss
                accelerator.backward(recorder.guarded(loss))
            losses.append(loss.detach())
        grad_norm = whole(accelerator.clip_grad_norm_(weights, o.clip_norm))
        total = reduce(torch.add, losses)
        frozen, done = recorder.see(step, total, grad_norm), step + 1
        saving = (
            resumable is not None and save_every_images and _crossed(done, o.batch_size, save_every_images) and done < o.steps
        )
        due = not waiting or saving or done % min(WINDOW, max(1, o.steps // READS)) == 0 or done == o.steps
        if due and (bad := recorder.read()) is not None:
            again = Step(draws, phase, bad, bad / o.steps, o.batch_size, split.table())
            step, rollback = guard.recover(again, method, dataclasses.replace(student, net=module), batches, **extra)
            stream = iter(batches(step + recorder.skipped))
            optimizer.zero_grad()
            continue
        if waiting and accelerator.scaler is None:
            optimizer.optimizer.found_inf = frozen  # the fused Adam then leaves weights and state alone
        optimizer.step()
        optimizer.zero_grad()
        if averaging is not None and o.ema_halflife_images:
            averaging.move(0.5 ** (o.batch_size / o.ema_halflife_images))
        step = done
        yield State(step, step * o.batch_size, total, grad_norm, o.lr_at(step - 1), student, ema, rollback)
        rollback = None
        # after the yield: what a step logs is written before its checkpoint
        stopping = stop is not None and step < o.steps and due and _on_any(accelerator, stop())
        if saving or (stopping and resumable is not None):
            guard.checkpoint(step)
        if stopping:
            raise Stopped


def waits(device: torch.device) -> bool:
    """Return whether reading a number from the device waits for its queue."""
    return device.type != "cpu"


def _synchronising(accelerator: Accelerator, net: Any, last: bool):
    if zero.is_zero(accelerator):
        net.set_gradient_accumulation_boundary(last)
    return torch.enable_grad() if last else accelerator.no_sync(net)


def _crossed(done: int, batch_size: int, every: int) -> bool:
    return done * batch_size // every > (done - 1) * batch_size // every


def _on_any(accelerator: Accelerator, here: bool) -> bool:
    """Return whether ``here`` is true on any process. One number is summed over the processes, if there are several."""
    if accelerator.num_processes == 1:
        return here
    return bool(accelerator.reduce(torch.tensor(float(here), device=accelerator.device)) > 0)


def _placed(average: nn.Module, module: nn.Module, accelerator: Accelerator) -> nn.Module:
    """Return the average where the student's module is: on its device, and sharded in the same way if FSDP2 shards it."""
    if isinstance(module, FSDPModule):
        return fsdp2_prepare_model(accelerator, average)
    return average.to(accelerator.device)


class _Average:
    """Move the average of trained weights towards them: a = beta a + (1 - beta) w. Each process does so for its own shards.

    Tensors are collected once: the walk through the modules would cost more than the sum.
    """

    def __init__(self, average: nn.Module, module: nn.Module):
        self.sharded = [part for part in average.modules() if isinstance(part, FSDPModule)]
        pairs = [(a, w) for a, w in zip(average.parameters(), module.parameters(), strict=True) if w.requires_grad]
        self.averages: list[Tensor] = [a for a, _ in pairs]
        self.weights: list[Tensor] = [w for _, w in pairs]
        self.buffers, self.sources = list(average.buffers()), list(module.buffers())

    @torch.no_grad()
    def move(self, beta: float) -> None:
        for part in self.sharded:
            part.reshard()  # a target network whose weights stay gathered after its forward pass
        averages, weights = self.averages, self.weights
        if self.sharded:
            averages, weights = list(map(local, averages)), list(map(local, weights))
        torch._foreach_lerp_(averages, weights, 1 - beta)
        if self.buffers:
            torch._foreach_copy_(self.buffers, self.sources)
