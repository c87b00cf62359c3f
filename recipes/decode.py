"""Encoded images into uint8 [N, C, S, S], in worker processes. No torch here: a worker starts in a fraction of a second.

The rule for every source: the largest centred square, then Lanczos down to S. Images smaller than S are refused, never enlarged.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import struct
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
MOST_CORRUPT = 0.01  # part of a set's images that may be unreadable
PROCESSES_FROM = 4096  # images; fewer are decoded in threads, which need no start
# a fresh interpreter would import the whole of the recipe again; a worker touches Pillow and numpy alone, as DataLoader's do
HOW = "fork" if sys.platform == "linux" else "spawn"
BLOCK = 4096  # encoded images held at once


@dataclass(frozen=True)
class Record:
    """One image still encoded: a file or its bytes. ``where`` is what a message calls it."""

    where: str
    image: Path | bytes
    label: int | None = None
    caption: str | None = None


@dataclass(frozen=True)
class Source:
    """Records of a set: ``records(seed, rank, world)`` is one pass over the part of process ``rank``, in order where seed is None
    and shuffled as far as that is cheap otherwise. ``count`` and ``classes`` are None where they are not known beforehand."""

    name: str
    records: Callable[[int | None, int, int], Iterator[Record]]
    count: int | None = None
    classes: int | None = None


@dataclass(frozen=True)
class Form:
    """What images are decoded to: their side and "L" or "RGB"."""

    size: int
    mode: str


@dataclass(frozen=True)
class Decoded:
    """uint8 [N, C, S, S] and, of those kept, labels [N] and captions where all have them."""

    images: np.ndarray
    labels: list[int] | None
    captions: list[str] | None


class Corrupt:
    """Counts unreadable images, reports the first 20. ValueError once they are more than 1 % of those seen."""

    def __init__(self, name: str):
        self.name, self.seen, self.bad, self.first = name, 0, 0, ""

    def note(self, records: list[Record], pixels: list[np.ndarray | None]) -> list[tuple[Record, np.ndarray]]:
        """The readable ones."""
        self.seen += len(records)
        kept = []
        for record, image in zip(records, pixels, strict=True):
            if image is not None:
                kept.append((record, image))
                continue
            self.bad, self.first = self.bad + 1, self.first or record.where
            if self.bad <= 20:
                _warn(f"{record.where} cannot be read and is left out")
        return kept

    def check(self) -> None:
        if self.bad > MOST_CORRUPT * self.seen:
            raise ValueError(f"{self.name}: {self.bad} of {self.seen} images cannot be read, the first is {self.first}")


def form_of(source: Source, size: int | None) -> Form:
    """Side (of the first readable image where not given) and mode. ValueError for an empty set and pixels of more than 8 bits."""
    some = list(islice(source.records(None, 0, 1), 100))
    if not some:
        raise ValueError(f"{source.name}: holds no images; accepted are {', '.join(sorted(SUFFIXES))}")
    first = next((image for record in some if (image := _open(record)) is not None), None)
    if first is None:
        raise ValueError(f"{source.name}: none of its first images can be read")
    return Form(size or min(first.size), "L" if first.mode in ("1", "L") else "RGB")


def read_all(source: Source, form: Form, most: int | None = None) -> Decoded:
    """All images of a set, or its first ``most``. ValueError for one smaller than asked for, and for more than 1 % unreadable."""
    images, records = [], []
    for _, kept in walk(source, form, BLOCK, most):
        images.append(np.stack([image for _, image in kept]))
        records += [replace(record, image=b"") for record, _ in kept]
    if not images:
        raise ValueError(f"{source.name}: holds no images that can be read")
    labels = [record.label for record in records if record.label is not None]
    captions = [record.caption for record in records if record.caption is not None]
    return Decoded(
        np.concatenate(images),
        labels if len(labels) == len(records) else None,
        captions if len(captions) == len(records) else None,
    )


def walk(
    source: Source, form: Form, block: int, most: int | None = None, rank: int = 0, world: int = 1
) -> Iterator[tuple[int, list[tuple[Record, np.ndarray]]]]:
    """One pass in order, with a bar: number and readable images of every ``world``-th block of records, from ``rank`` on. ValueErrors
    as `read_all`."""
    from tqdm import tqdm

    corrupt, records = Corrupt(source.name), islice(source.records(None, 0, 1), most)
    total = most if source.count is None else min(source.count, most or source.count)
    blocks = iter(lambda: list(islice(records, block)), [])
    bar = tqdm(total=total, desc=f"reading {source.name}", unit="img", leave=False, disable=None)
    first = next(blocks, [])
    with workers(total or len(first)) as pool, bar:
        for number, some in enumerate(chain([first] if first else [], blocks)):
            if number % world == rank:
                kept = corrupt.note(some, decode(pool, some, form))
                if kept:
                    yield number, kept
            bar.update(len(some))
    if corrupt.bad > 20:
        _warn(f"{source.name}: {corrupt.bad} of {corrupt.seen} images cannot be read and are left out")
    corrupt.check()


def shuffled(records: Iterable[Record], buffer: int, draw: np.random.Generator) -> Iterator[Record]:
    """One pass, each record once, through a buffer from which a random one is taken each time."""
    held: list[Record] = []
    for record in records:
        if len(held) < buffer:
            held.append(record)
            continue
        i = int(draw.integers(buffer))
        held[i], taken = record, held[i]
        yield taken
    yield from (held[i] for i in draw.permutation(len(held)))


@contextmanager
def workers(images: int) -> Iterator[Executor]:
    """Processes for many images, threads for few; this process's part of the cores."""
    from eval.generate import cores

    each = max(1, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    many = each > 1 and images >= PROCESSES_FROM
    pool: Executor = ProcessPoolExecutor(each, multiprocessing.get_context(HOW)) if many else ThreadPoolExecutor(each, "decode")
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def decode(pool: Executor, records: list[Record], form: Form) -> list[np.ndarray | None]:
    """uint8 [C, S, S] of each, None where it is no image. ValueError for one that is smaller than asked for."""
    return list(pool.map(partial(_decode, form=form), records, chunksize=32))


def _open(record: Record) -> Image.Image | None:
    try:
        image = Image.open(io.BytesIO(record.image) if isinstance(record.image, bytes) else record.image)
        image.load()
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError, EOFError, struct.error):
        return None
    if image.mode[0] in "IF":
        raise ValueError(f"{record.where}: pixels of mode {image.mode}: accepted are 8 bits a channel")
    return image


def _decode(record: Record, form: Form) -> np.ndarray | None:
    image, size = _open(record), form.size
    if image is None:
        return None
    side = min(image.size)
    if side < size:
        raise ValueError(f"{record.where}: {image.width}x{image.height} is smaller than the {size}x{size} asked for")
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.convert(form.mode).crop((left, top, left + side, top + side))
    if side != size:
        square = square.resize((size, size), Image.Resampling.LANCZOS)
    pixels = np.asarray(square)
    return pixels[None] if form.mode == "L" else pixels.transpose(2, 0, 1).copy()


def _warn(text: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(f"warning: {text}", file=sys.stderr)
