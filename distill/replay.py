"""A training step as a function of its seed, and files from which it is taken again, one loss per sample."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill import files
from distill.denoiser import Denoiser
from distill.rng import Rng, seed_of

Part = tuple[Tensor, dict[str, Tensor]]  # x0 [b, ...] and its conditions: a microbatch


@dataclass(frozen=True)
class Step:
    """Hold what a training step is a function of, beside weights and batch. ``rows``: [ranks][turns] of (start, stop)."""

    seed: int
    phase: str
    step: int
    progress: float
    batch_size: int
    rows: list[list[tuple[int, int]]]

    def losses(
        self, method: Any, student: Denoiser, parts: Iterable[Part], rank: int, **extra: Any
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (loss [b] with gradient, noise level [b]) of each microbatch of a process, with the draws of the training step."""
        seen: list[Tensor] = []
        watched = student
        if isinstance(student, Denoiser):  # others, of categories, have no noise level
            known = {f.name: getattr(student, f.name) for f in dataclasses.fields(Denoiser)}
            watched = _Watched(**known, seen=seen)
        torch.manual_seed(seed_of(self.seed, self.phase, self.step, "dropout", rank))
        for (x0, cond), (start, stop) in zip(parts, self.rows[rank], strict=True):
            rng = Rng.seeded(seed_of(self.seed, self.phase, self.step), x0.device, self.batch_size, slice(start, stop))
            seen.clear()
            loss = method(watched, x0, rng=rng, progress=self.progress, **extra, **cond)
            level = student.schedule.level(seen[0].detach()) if seen else loss.detach() * torch.nan
            yield loss, level.float().expand(len(x0))


@dataclass(frozen=True)
class _Watched(Denoiser):
    """A student that remembers the times of its calls with gradient."""

    seen: list[Tensor] = field(default_factory=list)

    def __call__(self, x_t: Tensor, t: Tensor, to: Tensor | None = None, **cond: Any) -> Tensor:
        if torch.is_grad_enabled():
            self.seen.append(t)
        return super().__call__(x_t, t, to=to, **cond)


@dataclass(frozen=True)
class SavedStep:
    """A step in a file: batch, weights before it, and what it is a function of."""

    path: Path
    tensors: dict[str, Tensor]  # x0, cond.*, net.*, average.*, second.*
    step: Step
    finding: str

    def save(self) -> None:
        files.save(self.path, self.tensors, {"finding": self.finding, "bad_step": dataclasses.asdict(self.step)})

    @classmethod
    def load(cls, path: Path | str) -> SavedStep:
        """Read a file. Raises ValueError for any other file."""
        tensors, facts = files.load(path)
        if "bad_step" not in facts:
            raise ValueError(f"{path}: holds no training step; accepted are the files diverged-*.safetensors of a run")
        return cls(Path(path), tensors, Step(**facts["bad_step"]), facts["finding"])

    def replay(self, method: Any, student: Denoiser) -> tuple[Tensor, Tensor]:
        """Take the step again in this process, on the device of ``student.net``. Return loss [B] and noise level [B].

        The weights are loaded into ``student.net``. Raises ValueError where they do not fit.
        """
        device = next(student.net.parameters()).device
        files.load_weights(student.net, self._under("net."), str(self.path))
        student.net.train()
        extra = {}
        if average := self._under("average."):
            twin = copy.deepcopy(student.net).requires_grad_(False)
            files.load_weights(twin, average, str(self.path))
            extra["average"] = dataclasses.replace(student, net=twin)
        if second := self._under("second."):
            begin = method.second.begin
            twin = copy.deepcopy(begin.net).to(device)
            files.load_weights(twin, second, str(self.path))
            extra["second"] = dataclasses.replace(begin, net=twin)
        found: dict[int, tuple[Tensor, Tensor]] = {}
        for rank, turns in enumerate(self.step.rows):
            parts = [self._part(slice(*row), device) for row in turns]
            results = self.step.losses(method, student, parts, rank, **extra)
            found |= {row[0]: (loss.detach(), level) for row, (loss, level) in zip(turns, results, strict=True)}
        losses, levels = zip(*(found[start] for start in sorted(found)), strict=True)
        return torch.cat(losses).cpu(), torch.cat(levels).cpu()

    def _under(self, prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in self.tensors.items() if k.startswith(prefix)}

    def _part(self, rows: slice, device: torch.device) -> Part:
        cond = {k: v[rows].to(device) for k, v in self._under("cond.").items()}
        return self.tensors["x0"][rows].to(device), cond
