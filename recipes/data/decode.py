"""Decode images to uint8 [N, C, S, S], in worker processes. No torch here, so that a worker starts in a fraction of a second.

Every source is treated alike: crop the largest centred square, then resize it to S with Lanczos. Smaller images are refused, never
enlarged.
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

from eval.progress import progress

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
MAX_UNREADABLE = 0.01  # part of a set's images
MAX_WARNINGS = 20
PROCESSES_FROM = 4096  # images; fewer are decoded in threads, which start faster
# a spawned interpreter would import the whole recipe again; a worker uses only Pillow and numpy, as DataLoader's workers do
START_METHOD = "fork" if sys.platform == "linux" else "spawn"
BLOCK = 4096  # encoded images in memory at a time


@dataclass(frozen=True)
class Record:
    """Hold one encoded image: a path or its bytes. ``where``: the image's name in messages."""

    where: str
    image: Path | bytes
    label: int | None = None
    caption: str | None = None


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
class ImageFormat:
    """Hold the format of decoded images: side length, and mode "L" or "RGB"."""

    size: int
    mode: str


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
    """Return the format of the first readable image, with side ``size`` if given.

    Raises ValueError for a set without readable images, and for images of more than 8 bits per channel.
    """
    some = list(islice(source.records(None, 0, 1), 100))
    if not some:
        raise ValueError(f"{source.name}: holds no images; accepted are {', '.join(sorted(SUFFIXES))}")
    first = next((image for record in some if (image := _open(record)) is not None), None)
    if first is None:
        raise ValueError(f"{source.name}: none of the first {len(some)} images can be read")
    return ImageFormat(size or min(first.size), "L" if first.mode in ("1", "L") else "RGB")


def read_all(source: Source, form: ImageFormat, most: int | None = None) -> Decoded:
    """Decode a set, or its first ``most`` images.

    Raises ValueError for an image smaller than the format, and if more than 1 % of the images are unreadable.
    """
    images, records = [], []
    for _, kept in decode_blocks(source, form, BLOCK, most):
        images.append(np.stack([image for _, image in kept]))
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
    source: Source, form: ImageFormat, block: int, most: int | None = None, rank: int = 0, world: int = 1
) -> Iterator[tuple[int, list[tuple[Record, np.ndarray]]]]:
    """Pass over a set once, in order, with a progress bar.

    Yields (number, readable images) of each block of ``block`` records that belongs to process ``rank``: every ``world``-th block.
    Raises ValueError as `read_all` does.
    """
    unreadable, records = UnreadableImages(source.name), islice(source.records(None, 0, 1), most)
    total = most if source.count is None else min(source.count, most or source.count)
    blocks = iter(lambda: list(islice(records, block)), [])
    bar = progress(show=_is_main(), total=total, desc=f"reading {source.name}", unit="img", leave=False)
    first = next(blocks, [])
    with workers(total or len(first)) as pool, bar:
        for number, some in enumerate(chain([first] if first else [], blocks)):
            if number % world == rank:
                kept = unreadable.drop(some, decode(pool, some, form))
                if kept:
                    yield number, kept
            bar.update(len(some))
    if unreadable.bad > MAX_WARNINGS:
        _warn(f"{source.name}: {unreadable.bad} of {unreadable.seen} images cannot be read and are left out")
    unreadable.check()


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
    from eval.machine import cores

    count = max(1, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    pool: Executor
    if count > 1 and images >= PROCESSES_FROM:
        pool = ProcessPoolExecutor(count, multiprocessing.get_context(START_METHOD))
    else:
        pool = ThreadPoolExecutor(count, "decode")
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def decode(pool: Executor, records: list[Record], form: ImageFormat) -> list[np.ndarray | None]:
    """Return each image as uint8 [C, S, S], or None if it is unreadable. Raises ValueError if one is smaller than the format."""
    return list(pool.map(partial(_decode, form=form), records, chunksize=32))


def _open(record: Record) -> Image.Image | None:
    try:
        image = Image.open(io.BytesIO(record.image) if isinstance(record.image, bytes) else record.image)
        image.load()
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError, EOFError, struct.error):
        return None
    if image.mode[0] in "IF":
        raise ValueError(f"{record.where}: pixels of mode {image.mode}; accepted are 8 bits per channel")
    return image


def _decode(record: Record, form: ImageFormat) -> np.ndarray | None:
    image, size = _open(record), form.size
    if image is None:
        return None
    side = min(image.size)
    if side < size:
        raise ValueError(
            f"{record.where}: {image.width}x{image.height} is smaller than {size}x{size}; "
            "accepted are larger images, or a smaller size=..."
        )
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.convert(form.mode).crop((left, top, left + side, top + side))
    if side != size:
        square = square.resize((size, size), Image.Resampling.LANCZOS)
    pixels = np.asarray(square)
    return pixels[None] if form.mode == "L" else pixels.transpose(2, 0, 1).copy()


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _warn(text: str) -> None:
    if _is_main():
        print(f"warning: {text}", file=sys.stderr)
