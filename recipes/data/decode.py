"""Decode images to uint8 [N, C, S, S], in worker processes. No torch here, so that a worker starts in a fraction of a second.

Every source is treated alike: crop the largest centred square, then resize it to S with Lanczos. Smaller images are refused, never
enlarged.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, count, islice
from pathlib import Path

import numpy as np

from eval.progress import progress
from recipes.data.image_file import GREY, header_of, pixels_of
from recipes.data.image_file import ImageFormat as ImageFormat
from recipes.data.image_file import Record as Record
from recipes.data.spec import MAX_CLASSES

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
MAX_UNREADABLE = 0.01  # part of a set's images
MAX_WARNINGS = 20
PROCESSES_FROM = 4096  # images; fewer are decoded in threads, which start faster
# a spawned interpreter would import the whole recipe again; a worker uses only Pillow and numpy, as DataLoader's workers do
START_METHOD = "fork" if sys.platform == "linux" else "spawn"
BLOCK = 4096  # encoded images in memory at a time
MAX_SIDE = 1024  # of images whose size the user does not name
PEEKED = 200  # images whose headers decide the format of the set, in order and at random each


@dataclass(frozen=True)
class Source:
    """Hold a set of encoded images.

    ``records(seed, rank, world)``: one pass over the part of process ``rank``, in order if ``seed`` is None, else shuffled as far as
    that is cheap. ``count``, ``classes``: None if they are not known beforehand.
    """

    name: str
    records: Callable[[int | None, int, int], Iterator[Record]]
    count: int | None = None
    classes: int | None = None


@dataclass(frozen=True)
class Decoded:
    """Hold uint8 images [N, C, S, S]. ``labels`` [N], ``captions`` [N]: None unless all images have one."""

    images: np.ndarray
    labels: list[int] | None
    captions: list[str] | None


class UnreadableImages:
    """Count the unreadable images of a set and warn about the first 20."""

    def __init__(self, name: str):
        self.name, self.seen, self.bad, self.first = name, 0, 0, ""

    def drop(self, records: list[Record], pixels: list[np.ndarray | None]) -> list[tuple[Record, np.ndarray]]:
        """Return the readable images with their records."""
        self.seen += len(records)
        kept = []
        for record, image in zip(records, pixels, strict=True):
            if image is not None:
                kept.append((record, image))
                continue
            self.bad, self.first = self.bad + 1, self.first or record.where
            if self.bad <= MAX_WARNINGS:
                _warn(f"{record.where} cannot be read and is left out")
        return kept

    def check(self) -> None:
        """Raise ValueError if more than 1 % of the images seen so far are unreadable."""
        if self.bad > MAX_UNREADABLE * self.seen:
            raise ValueError(
                f"{self.name}: {self.bad} of {self.seen} images cannot be read, the first is {self.first}; "
                f"accepted are at most {MAX_UNREADABLE:.0%}"
            )


def format_of(source: Source, size: int | None) -> ImageFormat:
    """Return the format of a set: side ``size`` or the first image's, and grey if some hundred images in order and at random are.

    Warns of transparency. Raises ValueError for a set without readable images, for images of more than 8 bits per channel, and for a
    set that would not fit in memory.
    """
    some = list(islice(source.records(None, 0, 1), PEEKED))
    if not some:
        raise ValueError(f"{source.name}: holds no images; accepted are {', '.join(sorted(SUFFIXES))}")
    some += islice(source.records(0, 0, 1), PEEKED) if len(some) == PEEKED else ()
    seen = [header for record in some if (header := header_of(record)) is not None]
    if not seen:
        raise ValueError(f"{source.name}: none of the first {len(some)} images can be read")
    side = seen[0].size
    if size is None and side > MAX_SIDE:
        raise ValueError(f"{source.name}: images of side {side}; accepted are sides up to {MAX_SIDE}, and any with size=...")
    if any(header.transparent for header in seen):
        _warn(f"{source.name}: transparent images are put on white")
    return ImageFormat(size or side, "L" if all(header.mode in GREY for header in seen) else "RGB")


def read_all(source: Source, form: ImageFormat, most: int | None = None) -> Decoded:
    """Decode a set, or its first ``most`` images.

    Raises ValueError for an image smaller than the format, and if more than 1 % of the images are unreadable.
    """
    from eval.machine import memory  # imports torch

    images, records, most_bytes = [], [], memory() // 2  # they are copied once
    for _, kept in decode_blocks(source, form, BLOCK, most):
        images.append(np.stack([image for _, image in kept]))
        if sum(part.nbytes for part in images) > most_bytes:
            raise ValueError(
                f"{source.name}: more than the {most_bytes / 1e9:.1f} GB of images that fit in memory; accepted are a smaller size=... and"
                " stream=..."
            )
        records += [replace(record, image=b"") for record, _ in kept]
    if not images:
        raise ValueError(f"{source.name}: none of its images can be read")
    labels = [record.label for record in records if record.label is not None]
    captions = [record.caption for record in records if record.caption is not None]
    return Decoded(
        np.concatenate(images),
        labels if len(labels) == len(records) else None,
        captions if len(captions) == len(records) else None,
    )


def decode_blocks(
    source: Source,
    form: ImageFormat,
    block: int,
    most: int | None = None,
    rank: int = 0,
    world: int = 1,
    piece: int | None = None,
) -> Iterator[tuple[int, list[tuple[Record, np.ndarray]]]]:
    """Pass over a set once, in order, with a progress bar.

    Yields (number, readable images) of each block of ``block`` records that belongs to process ``rank``: every ``world``-th block. With
    ``piece`` it yields a block in pieces of so many records, so that only those are decoded at a time.
    Raises ValueError as `read_all` does.
    """
    unreadable, records, size = UnreadableImages(source.name), islice(source.records(None, 0, 1), most), piece or block
    total = most if source.count is None else min(source.count, most or source.count)
    pieces = _pieces(records, block, size)
    bar = progress(show=_is_main(), total=total, desc=f"reading {source.name}", unit="img", leave=False)
    first = next(pieces, (0, []))
    with workers(total or (block if len(first[1]) == size else len(first[1]))) as pool, bar:
        for number, some in chain([first] if first[1] else [], pieces):
            if number % world == rank and (kept := unreadable.drop(some, decode(pool, some, form))):
                yield number, kept
            bar.update(len(some))
    if unreadable.bad > MAX_WARNINGS:
        _warn(f"{source.name}: {unreadable.bad} of {unreadable.seen} images cannot be read and are left out")
    unreadable.check()


def _pieces(records: Iterator[Record], block: int, size: int) -> Iterator[tuple[int, list[Record]]]:
    """Yield (number of the block, at most ``size`` records), each block of ``block`` records in several pieces."""
    for number in count():
        for start in range(0, block, size):
            if not (some := list(islice(records, min(size, block - start)))):
                return
            yield number, some


def shuffled(records: Iterable[Record], buffer: int, draw: np.random.Generator) -> Iterator[Record]:
    """Pass over the records once, in the random order of a shuffle buffer of ``buffer`` records."""
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
    """Yield a pool on this process's part of the cores: worker processes for many images, threads for few."""
    from eval.machine import cores  # imports torch

    share = max(1, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    pool: Executor
    if share > 1 and images >= PROCESSES_FROM:
        pool = ProcessPoolExecutor(share, multiprocessing.get_context(START_METHOD))
    else:
        pool = ThreadPoolExecutor(share, "decode")
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def decode(pool: Executor, records: list[Record], form: ImageFormat) -> list[np.ndarray | None]:
    """Return each image as uint8 [C, S, S], or None if it is unreadable. Raises ValueError if one is smaller than the format."""
    return list(pool.map(partial(pixels_of, form=form), records, chunksize=min(32, math.ceil(len(records) / 16))))


def check_label(where: Path | str, label: int, classes: int | None = None) -> None:
    """Raise ValueError for a label that is none of ``classes``, or of the most that are accepted."""
    if not 0 <= label < (classes or MAX_CLASSES):
        accepted = (
            f"0 and more, up to {MAX_CLASSES - 1:,}" if classes is None else f"0 to {classes - 1}, classes=N sets their number"
        )
        raise ValueError(f"{where}: label {label}; accepted are {accepted}")


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _warn(text: str) -> None:
    if _is_main():
        print(f"warning: {text}", file=sys.stderr)
