"""stream=N: training batches of sets that do not fit in memory, through a buffer of N images that are still encoded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain, count, islice

import numpy as np
import torch
from torch import Tensor

from distill.rng import seed_of
from distill.train import Shares
from recipes.decode import Corrupt, Form, Record, Source, decode, shuffled, workers


@dataclass(frozen=True)
class Stream:
    source: Source
    form: Form
    buffer: int
    labelled: bool

    def microbatches(self, shares: Shares, seed: int, phase: str, step: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Endless (uint8 [b, C, S, S], labels [b]) of this process, from ``step`` on.

        Each process passes over its own part of the set, every image once a pass. A function of (seed, phase, step) and the
        number of processes; a run that continues passes over what it has seen without decoding it. In the place of an unreadable
        image stands another of its microbatch. ValueError where more than 1 % are unreadable, and for what `decode` refuses.
        """
        size = shares.batch_size // (shares.world * shares.accumulate)
        corrupt, records = Corrupt(self.source.name), self._records(shares, seed, phase)
        next(islice(records, skip := step * shares.accumulate * size, skip), None)
        with workers(0) as pool:
            while True:
                some = list(islice(records, size))
                kept = corrupt.note(some, decode(pool, some, self.form))
                if corrupt.seen >= 1000 or not kept:
                    corrupt.check()
                kept = [kept[i % len(kept)] for i in range(size)]
                labels = torch.tensor([self._label(record) for record, _ in kept]) if self.labelled else None
                yield torch.from_numpy(np.stack([pixels for _, pixels in kept])), labels

    def captioned(self, place: dict[str, int]) -> Stream:
        """The same, each image labelled with the place of its caption. ValueError, as it comes by, for a caption that has none."""

        def records(seed: int | None, rank: int, world: int) -> Iterator[Record]:
            for record in self.source.records(seed, rank, world):
                caption = (record.caption or "").strip()
                if caption not in place:
                    raise ValueError(f"{record.where}: the caption {caption!r} is none of the teacher's {len(place)} prompts")
                yield replace(record, label=place[caption])

        return replace(self, source=replace(self.source, records=records, classes=len(place)), labelled=True)

    def _records(self, shares: Shares, seed: int, phase: str) -> Iterator[Record]:
        def passed(epoch: int) -> Iterator[Record]:
            number = seed_of(seed, phase, "pass", epoch)  # the same in every process, so that their parts do not overlap
            mine = self.source.records(number % 2**32, shares.rank, shares.world)
            first = next(mine, None)
            if first is None:
                raise ValueError(
                    f"{self.source.name}: fewer shards than the {shares.world} processes; start fewer, or make more"
                )
            draw = np.random.default_rng(seed_of(seed, phase, "buffer", epoch, shares.rank))
            return shuffled(chain([first], mine), self.buffer, draw)

        return chain.from_iterable(map(passed, count()))

    def _label(self, record: Record) -> int:
        classes = self.source.classes
        if record.label is None or record.label < 0 or (classes is not None and record.label >= classes):
            raise ValueError(
                f"{record.where}: label {record.label}: accepted are 0 to {(classes or 0) - 1}; classes=N says how many"
            )
        return record.label
