"""Images by index: image i of a seed is the same in every recipe, and for every number of processes.

Indices 0..n-1 are cut into fixed chunks; process r of W takes chunks r, r + W, ... Labels, initial noise and the noise of stochastic
steps are functions of (seed, index, draw), see `eval.philox`. They are computed on the device of the network.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from distill.denoiser import DenoiserLike
from distill.device import send
from distill.images import to_uint8
from distill.rng import seed_of
from distill.sampling import Sampling
from distill.schedule import Schedule, prior_std
from eval import philox
from teachers import Teacher

# part of the protocol's digest: another text makes finished cells of old runs unusable
LABEL_RULE = "uniform over the classes; noise and label by Philox4x32-10 of (seed, index, draw)"
LABEL_DRAW, NOISE_DRAW, SOURCE_DRAW = 0, 1, 2**32 - 1  # draws of an index; those between are the noise of stochastic steps


def chunks(images: int, size: int, rank: int = 0, world: int = 1) -> list[range]:
    """Return the chunks of indices that process ``rank`` of ``world`` takes. All processes together cover 0..images-1.

    Every chunk has ``size`` indices. The last one may go beyond ``images``; the caller drops the excess. A smaller batch could
    change the last digits.
    """
    return [range(start, start + size) for start in range(0, images, size)][rank::world]


@dataclass
class Noise:
    """Hold the random inputs of some indices: noise [n, ...] of unit variance, and labels [n] or None.

    ``index`` [n], ``key`` and ``draw``: the arguments of the last draw, see `eval.philox`.
    """

    noise: Tensor
    labels: Tensor | None
    index: Tensor
    key: int
    draw: int = NOISE_DRAW

    def fresh(self, x: Tensor) -> Tensor:
        """Return new standard normal noise of the shape, type and device of x. Each row is the next draw of its index."""
        self.draw += 1
        return _normal(send(self.index, x.device), x.shape[1:], self.draw, self.key).to(x.dtype)


def initial_noise(
    indices: range | list[int], shape: tuple[int, ...], classes: int | None, seed: int, device: torch.device | str = "cpu"
) -> Noise:
    """Draw the initial noise [n, *shape] and the labels of ``indices``, on ``device``. ``classes`` None draws no labels."""
    if isinstance(indices, range):
        index = torch.arange(indices.start, indices.stop, indices.step, device=device)
    else:
        index = send(torch.tensor(indices), device)
    key = seed_of("image", seed)
    labels = None if classes is None else philox.integers(index, classes, LABEL_DRAW, key)
    return Noise(_normal(index, shape, NOISE_DRAW, key), labels, index, key)


def start(model: Teacher, indices: range | list[int], seed: int, device: torch.device | str = "cpu") -> Noise:
    """Return the random inputs of a model's samples: noise, or what takes its place where the model has a `distill.source.Source`."""
    drawn = initial_noise(indices, model.shape, model.classes, seed, device)
    if model.source is None:
        return drawn
    rows = philox.integers(torch.tensor(list(indices)), model.source.count, SOURCE_DRAW, drawn.key)
    return replace(drawn, noise=model.source.start(rows, drawn.noise))


def _normal(index: Tensor, shape: tuple[int, ...], draw: int, key: int) -> Tensor:
    return philox.normal(index, math.prod(shape), draw, key).view(-1, *shape)


def generate(
    denoiser: DenoiserLike,
    sampling: Sampling,
    times: Tensor,
    noise: Noise,
    condition: Callable[[Tensor | None], dict],
    device: torch.device,
) -> Tensor:
    """Return samples x0 [n, ...]. The sampler starts from the initial noise times `prior_std`.

    ``condition``: labels [n] or None -> keyword arguments of the denoiser.
    """
    x = prior_std(denoiser.schedule, times[0]) * send(noise.noise, device)
    cond = condition(None if noise.labels is None else send(noise.labels, device))
    with torch.inference_mode():
        return sampling.run(denoiser, x, times, noise.fresh, **cond)


@dataclass(frozen=True)
class Batch:
    """Hold generated images: index [n] on the CPU; labels [n] or None and images [n, C, H, W] in [-1, 1] on the device."""

    index: Tensor
    labels: Tensor | None
    images: Tensor

    @property
    def pixels(self) -> Tensor:
        """The images as uint8, on the device."""
        return to_uint8(self.images)


def images(
    model: Teacher,
    sampling: Sampling,
    steps: int,
    indices: Iterable[range | list[int]],
    seed: int,
    device: torch.device,
    *,
    denoiser: DenoiserLike | None = None,
    label_of: Callable[[int], int] | None = None,
) -> Iterator[Batch]:
    """Generate the images of ``indices``, one `Batch` per range or list, without waiting for the device.

    ``denoiser`` replaces the model's own, such as one with guidance. ``label_of``: index -> label, instead of the drawn labels.
    """
    denoiser = model.denoiser if denoiser is None else denoiser
    times = sampling.times_for(denoiser.schedule, steps)
    for part in indices:
        noise = start(model, part, seed, device)
        if label_of is not None:
            noise.labels = send(torch.tensor([label_of(i) for i in part]), device)
        x0 = generate(denoiser, sampling, times, noise, model.condition, device)
        yield Batch(torch.tensor(list(part)), noise.labels, model.decode(x0))


@dataclass(frozen=True)
class Counted:
    """Evaluate a denoiser and count its calls per sample. ``count`` is a list of one number, which grows."""

    inner: DenoiserLike
    count: list[int]

    @property
    def schedule(self) -> Schedule:
        return self.inner.schedule

    def __call__(self, x_t: Tensor, t: Tensor, to: Tensor | None = None, **cond: Any) -> Tensor:
        self.count[0] += x_t.shape[0]
        return self.inner(x_t, t, to=to, **cond)


def counted(denoiser: DenoiserLike, count: list[int]) -> DenoiserLike:
    """Return the denoiser with its innermost network counted, so that guidance counts both of its calls."""
    if hasattr(denoiser, "denoiser"):
        return replace(denoiser, denoiser=counted(denoiser.denoiser, count))  # type: ignore[type-var]
    return Counted(denoiser, count)
