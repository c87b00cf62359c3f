"""Images by index: image i of a seed is the same whatever the batch, the device's neighbours or the number of processes.

Indices 0..n-1 are cut into fixed chunks; process r of W takes chunks r, r + W, ... Every index has its own CPU generator,
from which its starting noise, then its label, then the noise of each stochastic step are drawn in that order.
"""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from distill.denoiser import DenoiserLike
from distill.rng import seed_of
from distill.schedule import Schedule, prior_std
from distill.solver import named, stochastic

LABEL_RULE = "uniform over the classes, drawn from the generator of the index after its noise"


def chunks(images: int, size: int, rank: int = 0, world: int = 1) -> list[range]:
    """The chunks that process ``rank`` of ``world`` takes; together they cover 0..images-1.

    All are whole: the last one may run past the end, and what it makes there is dropped. A smaller batch would be other
    arithmetic, and its last digits would hang on the number of images and of threads.
    """
    return [range(start, start + size) for start in range(0, images, size)][rank::world]


@dataclass
class Start:
    """What ``indices`` start from: noise [n, ...] of deviation 1, labels [n] or None, and a generator an index."""

    noise: Tensor
    labels: Tensor | None
    generators: list[torch.Generator]

    def fresh(self, x: Tensor) -> Tensor:
        """The next standard normal noise like x, each row from its own generator."""
        rows = [torch.randn(x.shape[1:], generator=generator) for generator in self.generators]
        return torch.stack(rows).to(x)


def start(indices: range | list[int], shape: tuple[int, ...], classes: int | None, seed: int) -> Start:
    generators = [torch.Generator().manual_seed(seed_of("image", seed, index)) for index in indices]
    noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
    if classes is None:
        return Start(noise, None, generators)
    labels = torch.cat([torch.randint(classes, (1,), generator=generator) for generator in generators])
    return Start(noise, labels, generators)


def generate(
    denoiser: DenoiserLike,
    sampler: str,
    times: Tensor,
    begin: Start,
    condition: Callable[[Tensor | None], dict],
    device: torch.device,
) -> Tensor:
    """Samples [n, ...] in [-1, 1] from where ``begin`` stands; x starts as `prior_std` times its noise."""
    x = prior_std(denoiser.schedule, times[0]) * begin.noise.to(device)
    cond = condition(None if begin.labels is None else begin.labels.to(device))
    extra = {"noise": begin.fresh} if stochastic(sampler) else {}
    with torch.inference_mode():
        return named(sampler)(denoiser, x, times, **extra, **cond)


@dataclass(frozen=True)
class Counted:
    """A denoiser that counts its calls, in samples; ``count`` is a list of one number that grows."""

    inner: DenoiserLike
    count: list[int]

    @property
    def schedule(self) -> Schedule:
        return self.inner.schedule

    def __call__(self, x_t: Tensor, t: Tensor, **cond: Any) -> Tensor:
        self.count[0] += x_t.shape[0]
        return self.inner(x_t, t, **cond)


def counted(denoiser: DenoiserLike, count: list[int]) -> DenoiserLike:
    """The denoiser with its innermost network counted, so that guidance counts both of its calls."""
    if hasattr(denoiser, "denoiser"):
        return replace(denoiser, denoiser=counted(denoiser.denoiser, count))  # type: ignore[type-var]
    return Counted(denoiser, count)


def from_uint8(images: Tensor, device: torch.device | str = "cpu") -> Tensor:
    """float32 in [-1, 1] of uint8 images, which may be mapped from a file."""
    return images.contiguous().to(device).float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """round((x + 1) 127.5) of images in [-1, 1], clamped to 0..255; the one rounding of this project."""
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def synchronise(device: torch.device) -> float:
    """The clock after all work queued on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def peak_memory_gb(device: torch.device) -> float:
    """The most memory this process has had so far: on the GPU where there is one, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def cores() -> int:
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
