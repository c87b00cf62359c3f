"""Read the idx files of MNIST and its relatives, plain or as .gz: a magic number, the sizes as big-endian integers, then bytes."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np

from distill.reading import regular

BYTES = 0x08  # the type of the elements, in the third byte
MOST = 2**30  # bytes of a set; more would not be one of these
STEMS = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte")


def read_training_set(folder: Path) -> tuple[np.ndarray, np.ndarray] | None:
    """Return training images uint8 [N, H, W] and labels uint8 [N] of a folder; None unless it has both files, plain or as .gz.

    Raises ValueError for files of other contents.
    """
    images, labels = (next((p for p in (folder / stem, folder / f"{stem}.gz") if p.exists()), None) for stem in STEMS)
    if images is None or labels is None:
        return None
    found = read_idx(images, 3), read_idx(labels, 1)
    if not found[0].size or len(found[0]) != len(found[1]):
        raise ValueError(f"{folder}: {len(found[0])} images and {len(found[1])} labels; accepted are as many, at least one")
    return found


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """Return the bytes of an idx file as uint8 of so many dimensions. Raises ValueError for any other file."""
    accepted = f"accepted is an idx file of unsigned bytes in {dimensions} dimensions, or its .gz"
    try:
        with gzip.open(regular(path)) if path.suffix == ".gz" else open(regular(path), "rb") as file:
            head = file.read(4 + 4 * dimensions)
            if head[:4] != bytes([0, 0, BYTES, dimensions]) or len(head) != 4 + 4 * dimensions:
                raise ValueError(f"{path}: not an idx file; {accepted}")
            shape = tuple(int(n) for n in np.frombuffer(head[4:], ">u4"))
            size = math.prod(shape)
            content = file.read(size + 1 if size <= MOST else 0)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: {error}; {accepted}") from None
    if len(content) != size:
        raise ValueError(f"{path}: says {shape}, which is {size:,} bytes, and holds more, fewer or too many; {accepted}")
    return np.frombuffer(bytearray(content), np.uint8).reshape(shape)
