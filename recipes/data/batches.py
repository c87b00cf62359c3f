"""Training batches of a set: drawn on the CPU as a function of (seed, phase, step), and made there or on the GPU."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from math import prod
from typing import Protocol

import torch
from torch import Tensor

from distill.device import send
from distill.rng import Rng, seed_of
from distill.schedule import per_sample
from distill.train import Batches, BatchSplit
from recipes.data.ahead import Batch, ahead
from recipes.data.buckets import Buckets
from recipes.data.stream import Stream
from teachers.conditions import sized

Made = Generator[Batch, None, None]
RESIDENT = 0.1  # sets up to this part of a GPU's free memory are kept there


class Samples(Protocol):
    """What batches are drawn from: `recipes.data.sets.Data`."""

    @property
    def images(self) -> Tensor | Buckets: ...
    @property
    def labels(self) -> Tensor | None: ...
    @property
    def flip(self) -> bool: ...
    @property
    def stream(self) -> Stream | None: ...
    def pixels(self, shape: tuple[int, ...]) -> tuple[int, int] | None: ...
    def scaled(self, images: Tensor, device: torch.device | str) -> Tensor: ...


def batches(
    data: Samples,
    split: BatchSplit,
    seed: int,
    phase: str,
    device: torch.device,
    condition: Callable[[Tensor | None], dict[str, Tensor]],
    null: int | None = None,
    null_probability: float = 0.0,
) -> Batches:
    """Return the function of `Data.batches`.

    A small set is copied to the GPU once, and batches are indexed there. Those of other sets are gathered and mirrored by a thread, up to
    three ahead, and sent as uint8. For a training on the CPU they are made when they are due: there a thread would only take the
    cores of the step.
    """
    several = data.images if isinstance(data.images, Buckets) else None
    parts: list = [data.images] if several is None else several.parts  # of one shape each
    starts = [0] if several is None else several.starts
    small = data.stream is None and _is_small(data.images, device)
    resident = [part.contiguous().to(device) for part in parts] if small else None

    def draws(step: int) -> Iterator[tuple[int, Tensor, Tensor | None, Tensor | None, Tensor | None]]:
        """Yield part, index [b] in it, labels [b], images [b, ...] of a stream, and which are mirrored [b], of each microbatch."""
        generator = torch.Generator()
        streamed = None if data.stream is None else data.stream.microbatches(split, seed, phase, step)
        while True:
            part = 0 if several is None else several.draw(seed, phase, step)
            for turn in range(split.accumulate):
                rng = Rng(generator.manual_seed(seed_of(seed, phase, step, "data")), split.batch_size, split.rows(turn))
                index = rng.integers(len(parts[part]))  # a stream draws it too, which keeps its dropout and flips reproducible
                images, labels = (
                    (None, None if data.labels is None else data.labels[starts[part] + index])
                    if streamed is None
                    else next(streamed)
                )
                if labels is not None and null is not None and null_probability:
                    labels = torch.where(rng.uniform() < null_probability, null, labels)
                yield part, index, labels, images, rng.uniform() < 0.5 if data.flip else None
            step += 1

    def on_cpu(step: int) -> Made:
        for part, index, labels, images, mirrored in draws(step):
            images = take(parts[part], index) if images is None else images
            if mirrored is not None:
                rows = mirrored.nonzero()[:, 0]
                images.index_copy_(0, rows, images.index_select(0, rows).flip(-1))
            yield images, labels

    def on_gpu(step: int, kept: list[Tensor]) -> Made:
        for part, index, labels, _, mirrored in draws(step):
            images = kept[part].index_select(0, send(index, device))
            if mirrored is not None:
                images = torch.where(per_sample(send(mirrored, device), images), images.flip(-1), images)
            yield images, labels

    def microbatches(step: int) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        if resident is not None:
            made = on_gpu(step, resident)
        else:
            room = max(prod(part.shape[1:]) for part in parts)
            made = on_cpu(step) if device.type == "cpu" else ahead(on_cpu(step), room=room)
        with closing(made):  # ends the thread
            for images, labels in made:
                # on the CPU, where the rows of a table are
                known, size = condition(labels), data.pixels(images.shape)
                known = known if size is None else sized(known, *size)
                cond = {name: rows if rows is None else send(rows, device) for name, rows in known.items()}
                yield data.scaled(images, device), cond

    return microbatches


def take(images: Tensor, index: Tensor) -> Tensor:
    """Return the rows ``index`` [b] of images [N, ...], contiguous. Each row is copied in the order in which it is in memory."""
    if (
        isinstance(images, Tensor) and images.ndim == 4 and (stored := images.permute(0, 2, 3, 1)).is_contiguous()
    ):  # of an .npz file
        return stored.index_select(0, index).permute(0, 3, 1, 2).contiguous()
    return images.index_select(0, index)


def _is_small(images: Tensor | Buckets, device: torch.device) -> bool:
    return device.type == "cuda" and images.nbytes <= RESIDENT * torch.cuda.mem_get_info(device)[0]
