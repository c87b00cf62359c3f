"""Divergence: notice a training step that must not be taken, name its sample, keep it for a replay, and count rollbacks.

A step is bad if its loss or gradient is not finite, or if the gradient norm is a spike: above `SPIKE` times its median over the last
`WINDOW` steps and above the norm that gradients are clipped to. The first bad step freezes training. All of this stays on the device;
only `Recorder.read` waits for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather, gather_object
from torch import Tensor, nn

from distill.denoiser import Denoiser
from distill.replay import Part, SavedStep, Step
from distill.resume import Resumable, gather_state, restore_state, whole
from distill.rng import seed_of
from distill.speed import uncompiled
from distill.zero import ZeroAdam

if TYPE_CHECKING:
    from distill.second import SecondTrainer

SPIKE = 1000.0
WINDOW = 64  # steps whose gradient norms are kept
EVERY = 16  # steps between two medians
NONE = torch.iinfo(torch.int64).max
LARGEST = torch.finfo(torch.float32).max


class Diverged(FloatingPointError):
    """Training diverged again after all rollbacks that were allowed."""


@dataclass
class Recorder:
    """Watch the steps of a phase on the device of ``norms``.

    ``clip_norm``: norm that gradients are clipped to. ``scaled``: whether a gradient scaler skips gradients that are not finite; a loss
    that is not finite is then the only divergence beside spikes. ``rollbacks``: how many are behind this state. ``skipped``: batches of
    the data that they left out.
    """

    clip_norm: float
    scaled: bool
    norms: Tensor  # of the last steps, NaN for none
    median: Tensor
    limit: Tensor  # norms above it are spikes
    frozen: Tensor  # 1 after a bad step, else 0
    lost: Tensor  # steps since the first bad one, with it
    factor: Tensor  # 1, and NaN when training is frozen
    last: int = -1  # step that was seen last
    rollbacks: int = 0
    skipped: int = 0

    @classmethod
    def on(cls, device: torch.device, clip_norm: float, scaled: bool) -> Recorder:
        norms = torch.full((WINDOW,), torch.nan, device=device)
        median, limit, frozen, lost, factor = (torch.tensor(x, device=device) for x in (torch.nan, LARGEST, 0.0, 0.0, 1.0))
        return cls(clip_norm, scaled, norms, median, limit, frozen, lost, factor)

    def stream(self, seed: int) -> int:
        """Return the seed of the random stream: ``seed``, and another one after every rollback."""
        return seed_of(seed, "rollback", self.rollbacks) if self.rollbacks else seed

    def guarded(self, loss: Tensor) -> Tensor:
        """Return the loss; NaN where it is not finite and after a bad step, so that no process takes the step. Finite losses keep
        their bits."""
        return loss * torch.add(self.factor, loss.detach(), alpha=0)  # 0 times infinity is NaN

    def see(self, step: int, loss: Tensor, norm: Tensor) -> Tensor:
        """Judge a step by its loss [] and gradient norm []. Return 1.0 if training is frozen, else 0.0, as a tensor."""
        judged = torch.where(norm.isfinite(), norm, 0) if self.scaled else norm
        good = torch.add(judged, loss, alpha=0) <= self.limit  # false for NaN
        self.frozen = torch.where(good, self.frozen, 1.0)
        self.factor = torch.where(good, self.factor, torch.nan)
        self.lost = self.lost + self.frozen
        self.norms[step % WINDOW] = norm
        if step % EVERY == EVERY - 1 and step + 1 >= WINDOW // 2:
            self.median = torch.where(self.norms.isfinite(), self.norms, torch.nan).nanmedian()
            self.limit = self._limit()
        self.last = step
        return self.frozen

    def _limit(self) -> Tensor:
        return (SPIKE * self.median).clamp(min=self.clip_norm).nan_to_num(LARGEST, LARGEST)

    def read(self) -> int | None:
        """Return the first bad step of any process, or None. Waits for the device and for all processes."""
        first = torch.where(self.lost > 0, self.last + 1 - self.lost.long(), NONE)
        found = int(gather(first.reshape(1)).min())
        return None if found == NONE else found

    def state(self) -> dict[str, Tensor]:
        """Return what a checkpoint holds of this."""
        counts = torch.tensor([self.rollbacks, self.skipped])
        return {"divergence.counts": counts, "divergence.norms": torch.cat([self.median.reshape(1), self.norms])}

    def roll_back(self, bad: int, step: int, tensors: dict[str, Tensor]) -> None:
        """Restore the state of ``step``, count a rollback, and leave out the data up to that of the ``bad`` step."""
        rollbacks, data = self.rollbacks + 1, bad + self.skipped + 1
        self.restore(tensors)
        self.rollbacks, self.skipped = rollbacks, data - step

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Load the result of `state`; checkpoints of older versions have none."""
        fresh = Recorder.on(self.norms.device, self.clip_norm, self.scaled)
        self.frozen, self.lost, self.factor = fresh.frozen, fresh.lost, fresh.factor
        self.rollbacks, self.skipped, self.norms, self.median, self.limit = 0, 0, fresh.norms, fresh.median, fresh.limit
        if "divergence.counts" in tensors:
            self.rollbacks, self.skipped = tensors["divergence.counts"].tolist()
            median, self.norms = tensors["divergence.norms"].clone().to(self.norms).split([1, WINDOW])
            self.median = median[0]
            self.limit = self._limit()


@uncompiled()  # samples are taken by themselves, in any number
def find(
    recorder: Recorder, step: Step, method: Any, student: Denoiser, parts: list[Part], rank: int, **extra: Any
) -> tuple[str, dict[str, Tensor]]:
    """Take a bad step once more, without changing anything. Return what was wrong, with its worst sample. A collective call.

    ``parts``: the microbatches of this process. The tensors are x0 and cond.* of the whole batch, in its order.
    """
    worst, table = (-1.0, 0), []
    weights = [p for p in student.net.parameters() if p.requires_grad]
    sharded = any(hasattr(weight, "device_mesh") for weight in weights)  # gradients by hand would bypass the collectives

    def gradient(low: int, high: int) -> float:
        """Return the gradient norm of rows that lie in one microbatch, inf if it is not finite."""
        (begin, (x0, cond)) = next(
            (begin, part) for (begin, end), part in zip(step.rows[rank], parts, strict=True) if low < end
        )
        rows = slice(low - begin, high - begin)
        alone = replace(step, rows=[[(low, high)]])
        ((loss, _),) = alone.losses(method, student, [(x0[rows], {k: v[rows] for k, v in cond.items()})], 0, **extra)
        norms = [g.float().norm() for g in torch.autograd.grad(loss.sum(), weights, allow_unused=True) if g is not None]
        size = float(torch.stack(norms).norm())
        return size if size < torch.inf else torch.inf  # also for NaN

    for (loss, level), (begin, _) in zip(step.losses(method, student, parts, rank, **extra), step.rows[rank], strict=True):
        worst = max(worst, _worst(loss.detach(), begin, None if sharded else gradient))
        table.append(gather(torch.stack([loss.detach().float(), level.to(loss.device)], 1)))
    _, sample = max(gather_object([worst]), key=lambda found: (found[0], -found[1]))
    tensors = {"x0": torch.cat([gather(x0.contiguous()) for x0, _ in parts])}
    for key in parts[0][1]:
        tensors[f"cond.{key}"] = torch.cat([gather(cond[key].contiguous()) for _, cond in parts])
    loss, level = torch.cat(table)[sample].tolist()
    where = f"sample {sample} at noise level {level:.3g}"
    norm, median = float(recorder.norms[step.step % WINDOW]), float(recorder.median)
    if not tensors["x0"][sample].isfinite().all():
        text = f"the data of {where} are not finite"
    elif not torch.isfinite(torch.tensor(loss)):
        text = f"the loss of {where} is {loss}"
    elif torch.isfinite(torch.tensor(norm)):
        text = f"the gradient norm is {norm:.3g}, its median {median:.3g}, most of it from {where} with loss {loss:.3g}"
    else:
        text = f"the gradient of {where} is not finite, with loss {loss:.3g}"
    return f"step {step.step} of phase {step.phase}: {text}", tensors


def _worst(loss: Tensor, begin: int, gradient: Callable[[int, int], float] | None) -> tuple[float, int]:
    """Return (badness, row) of the worst sample: a loss that is not finite, else where halving the batch by gradient norm ends."""
    if not (finite := loss.isfinite()).all():
        return torch.inf, begin + int((~finite).nonzero()[0])
    if gradient is None:
        return float(loss.max()), begin + int(loss.argmax())
    low, high, size = begin, begin + len(loss), 0.0
    while high - low > 1:
        middle = (low + high) // 2
        left, right = gradient(low, middle), gradient(middle, high)
        low, high, size = (low, middle, left) if left >= right else (middle, high, right)
    return size, low


@dataclass
class Guard:
    """Restore the last good state of a phase: its newest checkpoint, or the state that it began with.

    ``scaling``: the state of the gradient scaler at the start. ``most``: how many rollbacks are allowed.
    """

    accelerator: Accelerator
    recorder: Recorder
    optimizer: torch.optim.Optimizer | ZeroAdam
    module: nn.Module
    average: nn.Module | None
    resumable: Resumable | None
    identity: str
    most: int
    second: SecondTrainer | None = None

    def __post_init__(self):
        start = self._state() if self.most else {}
        self.initial = {name: value.detach().to("cpu", copy=True) for name, value in start.items()}
        scaler = self.accelerator.scaler
        self.scaling = None if scaler is None else scaler.state_dict()

    def _state(self) -> dict[str, Tensor]:
        own = gather_state(self.module, self.optimizer, self.average)
        return own if self.second is None else own | self.second.state()

    def _restore(self, tensors: dict[str, Tensor]) -> None:
        restore_state(tensors, self.module, self.optimizer, self.average)
        if self.second is not None:
            self.second.restore(tensors)

    def resume(self) -> int:
        """Load the newest checkpoint, if there is one, and return its step, else 0."""
        found = None if self.resumable is None else self.resumable.latest(self.identity)
        if found is None:
            return 0
        self._restore(found[1])
        self.recorder.restore(found[1])
        self.initial = {}  # the checkpoint takes its place
        return found[0]

    def checkpoint(self, step: int) -> None:
        """Write a checkpoint. A collective call."""
        assert self.resumable is not None
        tensors = self._state() | self.recorder.state()
        if self.accelerator.is_main_process:
            self.resumable.save(step, tensors, self.identity)
        self.initial = {}

    def recover(
        self, step: Step, method: Any, student: Denoiser, batches: Callable[[int], Iterable[Part]], **extra: Any
    ) -> tuple[int, str]:
        """Describe a bad step and restore the last good state. Return its step, and what happened, for people. A collective call."""
        parts = list(islice(batches(step.step + self.recorder.skipped), len(step.rows[0])))
        return self.go_back(step.step, self.describe(step, method, student, parts, **extra))

    def describe(self, step: Step, method: Any, student: Denoiser, parts: list[Part], **extra: Any) -> str:
        """Write diverged-<step>.safetensors beside the checkpoints and return what was wrong. A collective call."""
        text, tensors = find(self.recorder, step, method, student, parts, self.accelerator.process_index, **extra)
        if self.resumable is None:
            return text
        tensors |= {f"net.{name}": whole(value) for name, value in self.module.state_dict().items()}
        if self.second is not None:
            tensors |= {f"second.{name}": whole(value) for name, value in self.second.module.state_dict().items()}
        if "average" in extra and self.average is not None:
            tensors |= {f"average.{name}": whole(value) for name, value in self.average.state_dict().items()}
        path = self.resumable.folder / f"diverged-{step.step:09d}.safetensors"
        if self.accelerator.is_main_process:
            SavedStep(path, tensors, step, text).save()
        return f"{text} (--replay {path})"

    def go_back(self, bad: int, text: str) -> tuple[int, str]:
        """Restore the last good state before step ``bad``. Return its step, and what happened, for people.

        Raises `Diverged` if the rollbacks are spent.
        """
        taken = self.recorder.rollbacks
        if taken >= self.most:
            again = f" after {taken} rollback{'s' * (taken != 1)}" if taken else ""
            precise = " or --mixed-precision no" if self.accelerator.mixed_precision != "no" else ""
            raise Diverged(f"training diverged{again} at {text}; try a lower --lr, more --warmup-images{precise}")
        scaler = self.accelerator.scaler
        if scaler is not None:
            scaler.update()  # ends the scaler's own step
            scaler.load_state_dict(self.scaling)
        self.accelerator.wait_for_everyone()
        step, tensors = (self.resumable and self.resumable.latest(self.identity)) or (0, self.initial)
        self._restore(tensors)
        self.recorder.roll_back(bad, step, tensors)
        return step, f"{text}; back to step {step} with other random numbers, rollback {taken + 1} of at most {self.most}"
