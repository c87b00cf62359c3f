"""Stream training batches of sets that do not fit in memory, through a shuffle buffer of encoded images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain, count, islice

import numpy as np
import torch
from torch import Tensor

from distill.rng import seed_of
from distill.train import BatchSplit
from recipes.data.decode import ImageFormat, Record, Source, UnreadableImages, check_label, decode, shuffled, workers


@dataclass(frozen=True)
class Stream:
    """Stream a source. ``buffer``: encoded images in the shuffle buffer. ``labelled``: whether batches have labels."""

    source: Source
    form: ImageFormat
    buffer: int
    labelled: bool

    def microbatches(self, split: BatchSplit, seed: int, phase: str, step: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yield the microbatches of this process from ``step`` on, endlessly: uint8 images [b, C, S, S] and labels [b] or None.

        Each process passes over its own part of the set, and sees every image once per pass. The order is a function of (seed,
        phase, step) and the number of processes. A continued run skips what it has seen without decoding it. Another image of the
        microbatch replaces an unreadable one. Raises ValueError if more than 1 % are unreadable, and as `decode` does.
        """
        size = split.batch_size // (split.world * split.accumulate)
        unreadable, records = UnreadableImages(self.source.name), self._records(split, seed, phase)
        next(islice(records, skip := step * split.accumulate * size, skip), None)
        with workers(0) as pool:
            while True:
                some = list(islice(records, size))
                kept = unreadable.drop(some, decode(pool, some, self.form))
                if unreadable.seen >= 1000 or not kept:
                    unreadable.check()
                kept = [kept[i % len(kept)] for i in range(size)]
                labels = torch.tensor([self._label(record) for record, _ in kept]) if self.labelled else None
                yield torch.from_numpy(np.stack([pixels for _, pixels in kept])), labels

    def captioned(self, place: dict[str, int]) -> Stream:
        """Return the stream with ``place[caption]`` as labels. It raises ValueError at the first caption without a place."""

        def records(seed: int | None, rank: int, world: int) -> Iterator[Record]:
            for record in self.source.records(seed, rank, world):
                caption = (record.caption or "").strip()
                if caption not in place:
                    raise ValueError(f"{record.where}: the caption {caption!r} is none of the teacher's {len(place)} prompts")
                yield replace(record, label=place[caption])

        return replace(self, source=replace(self.source, records=records, classes=len(place)), labelled=True)

    def _records(self, split: BatchSplit, seed: int, phase: str) -> Iterator[Record]:
        def one_pass(epoch: int) -> Iterator[Record]:
            order = seed_of(seed, phase, "pass", epoch)  # equal in all processes, so that their parts do not overlap
            mine = self.source.records(order % 2**32, split.rank, split.world)
            first = next(mine, None)
            if first is None:
                raise ValueError(
                    f"{self.source.name}: fewer shards than the {split.world} processes; start fewer, or make more shards"
                )
            draw = np.random.default_rng(seed_of(seed, phase, "buffer", epoch, split.rank))
            return shuffled(chain([first], mine), self.buffer, draw)

        return chain.from_iterable(map(one_pass, count()))

    def _label(self, record: Record) -> int:
        label = -1 if record.label is None else record.label
        check_label(record.where, label, self.source.classes)
        return label
