"""Open one encoded image, check it, and make its pixels uint8. No torch here: see `recipes.data.decode`."""

from __future__ import annotations

import io
import math
import struct
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from distill.reading import regular

MAX_PIXELS = 2**26  # of an image that is opened
# what Pillow raises for damaged, foreign and hostile images
UNREADABLE = (
    UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError, EOFError, struct.error, TypeError, LookupError,
    AssertionError, OverflowError, RuntimeError, MemoryError, zlib.error,
)  # fmt: skip
GREY = {"1", "L", "LA"}
warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # MAX_PIXELS is lower


@dataclass(frozen=True)
class Record:
    """Hold one encoded image: a path or its bytes. ``where``: the image's name in messages."""

    where: str
    image: Path | bytes
    label: int | None = None
    caption: str | None = None


@dataclass(frozen=True)
class ImageFormat:
    """Hold the format of decoded images: side length, and mode "L" or "RGB".

    ``sizes``: (height, width) of each shape of a set of several shapes, whose ``size`` has no meaning.
    """

    size: int
    mode: str
    sizes: tuple[tuple[int, int], ...] = ()

    def size_for(self, height: int, width: int) -> tuple[int, int]:
        """Return the (height, width) that an image of these sides gets: that of the nearest aspect ratio, by its logarithm.

        Of equal ratios it is the largest that the image covers, or the smallest where it covers none.
        """

        def distance(size: tuple[int, int]) -> tuple[float, bool, int]:
            off = abs(math.log(size[0] / size[1]) - math.log(height / width))
            covered = size[0] <= height and size[1] <= width
            return off, not covered, -math.prod(size) if covered else math.prod(size)

        return min(self.sizes, key=distance) if self.sizes else (self.size, self.size)


@dataclass(frozen=True)
class Header:
    """Hold what an image's header says: the shorter side, Pillow's mode, and whether pixels may be transparent."""

    size: int
    mode: str
    transparent: bool


def _opened(record: Record) -> Image.Image:
    image = Image.open(io.BytesIO(record.image) if isinstance(record.image, bytes) else regular(record.image))
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"more than {MAX_PIXELS:,} pixels")
    return image


def header_of(record: Record) -> Header | None:
    """Return the header of an image without decoding it, or None if it cannot be read."""
    try:
        with _opened(record) as image:
            return Header(min(image.size), image.mode, image.has_transparency_data)
    except UNREADABLE:
        return None


def _open(record: Record) -> Image.Image | None:
    """Return an image, or None if it cannot be read. Raises ValueError for more than 8 bits per channel."""
    try:
        image = _opened(record)
        image.load()
    except UNREADABLE:
        return None
    if image.mode[0] in "IF":
        raise ValueError(f"{record.where}: pixels of mode {image.mode}; accepted are 8 bits per channel")
    return image


def pixels_of(record: Record, form: ImageFormat) -> np.ndarray | None:
    """Return an image as uint8 [C, S, S], or [C, H, W] of one of several shapes, or None if it cannot be read.

    The largest centred rectangle of the format's aspect ratio is cut out and resized.
    Raises ValueError for an image that is smaller than the format, or has colours where the format is grey.
    """
    image = _open(record)
    if image is None:
        return None
    height, width = form.size_for(image.height, image.width)
    scale = min(image.width / width, image.height / height)
    if scale < 1:
        smaller = "a smaller one in --sizes" if form.sizes else "a smaller size=..."
        raise ValueError(
            f"{record.where}: {image.width}x{image.height} is smaller than {width}x{height}; "
            f"accepted are larger images, or {smaller}"
        )
    if form.mode == "L" and image.mode not in GREY:
        raise ValueError(
            f"{record.where}: a colour image in a set whose first images are grey; accepted are images of one kind"
        )
    across, down = round(width * scale), round(height * scale)
    left, top = (image.width - across) // 2, (image.height - down) // 2
    try:
        part = _flat(image.crop((left, top, left + across, top + down)), form.mode)
    except UNREADABLE:
        return None
    if part.size != (width, height):
        part = part.resize((width, height), Image.Resampling.LANCZOS)
    pixels = np.asarray(part)
    return pixels[None] if form.mode == "L" else pixels.transpose(2, 0, 1).copy()


def _flat(image: Image.Image, mode: str) -> Image.Image:
    """Return the image in a mode of the format, on white where it is transparent."""
    if not image.has_transparency_data:
        return image.convert(mode)
    layer = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert(mode)
