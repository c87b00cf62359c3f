"""Sets of several shapes: images that `recipes/latents.py --sizes` encodes, and its folders of latents, one for each shape."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from math import prod
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor

from distill import reading
from distill.reading import regular
from distill.rng import Rng, seed_of
from recipes.data.decode import PEEKED, ImageFormat, Source, check_label, decode_blocks, format_of
from recipes.data.latent_shards import BUCKETS, read_latents
from teachers.conditions import Rows

SIZE = re.compile(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})")


class Buckets:
    """Hold samples of several shapes, [n, ...] in each of ``parts``. Rows are counted through the parts, in order.

    What needs samples of one shape raises ValueError.
    """

    def __init__(self, parts: Sequence[Tensor | Rows]):
        self.parts = list(parts)
        self.starts = list(accumulate(map(len, self.parts), initial=0))
        self.nbytes = sum(part.nbytes for part in self.parts)

    def __len__(self) -> int:
        return self.starts[-1]

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """The shape of one sample of each part."""
        return [tuple(part.shape[1:]) for part in self.parts]

    @property
    def shape(self) -> NoReturn:
        """None: raises ValueError."""
        self._refuse()

    def _refuse(self) -> NoReturn:
        shapes = ", ".join("x".join(map(str, shape)) for shape in self.shapes)
        raise ValueError(f"the data have samples of shapes {shapes}: accepted here is one, such as a sub-folder of the latents")

    def __getitem__(self, index: object) -> NoReturn:
        self._refuse()

    def is_floating_point(self) -> bool:
        """Return whether the samples are floats."""
        return self.parts[0].is_floating_point()

    def rows(self, shape: tuple[int, ...] | None = None) -> slice:
        """Return the rows of the part of this shape; without one, or where none has it, of the part of largest samples."""
        at = (
            self.shapes.index(shape)
            if shape in self.shapes
            else max(range(len(self.parts)), key=lambda i: prod(self.shapes[i]))
        )
        return slice(self.starts[at], self.starts[at + 1])

    def draw(self, *seed: int | str) -> int:
        """Return the part of a training step, by its number of samples: a function of ``seed``, the same in all processes."""
        row = int(Rng.seeded(seed_of(*seed, "bucket"), torch.device("cpu"), 1).integers(len(self)))
        return next(i for i, stop in enumerate(self.starts[1:]) if row < stop)


def read_buckets(folder: Path) -> tuple[Buckets, Tensor | None, list[str] | None, dict]:
    """Return latents, labels [N] and captions of a folder of several shapes, and the index of its first part, as `read_latents` does.

    Raises ValueError for an incomplete index, and for parts that do not agree.
    """
    path = folder / "index.json"
    with reading.malformed(path):
        names = [Path(name).name for name in reading.read_json(path)["buckets"]]
        if not names:
            raise ValueError("it names no sub-folder")
    found = [read_latents(folder / name) for name in names]
    latents, labels, captions, indices = zip(*found, strict=True)
    first = indices[0]
    same = ("codec_sha256", "scale", "shift", "dtype", "factor")
    for name, index in zip(names, indices, strict=True):
        if wrong := [key for key in same if index.get(key) != first.get(key)]:
            raise ValueError(f"{folder}: {name} has {wrong[0]} {index.get(wrong[0])!r}, {names[0]} {first.get(wrong[0])!r}")
    whole = None if any(some is None for some in labels) else torch.cat(labels)
    texts = None if any(some is None for some in captions) else [text for some in captions for text in some]
    return Buckets(latents), whole, texts, first


def is_bucket(folder: Path) -> bool:
    """Return whether a folder of latents is one of several."""
    index = folder.absolute().parent / "index.json"
    return index.is_file() and BUCKETS in reading.read_text(index)


def sizes_of(texts: Sequence[str]) -> tuple[tuple[int, int], ...]:
    """Return the (height, width) of texts such as 64x64, each once. Raises ValueError for any other text."""
    matches = [SIZE.fullmatch(text) for text in texts]
    for text, match in zip(texts, matches, strict=True):
        if match is None:
            raise ValueError(f"--sizes {text}: accepted are HEIGHTxWIDTH in pixels, such as 64x64 48x80 80x48")
    return tuple(dict.fromkeys((int(match[1]), int(match[2])) for match in matches if match))


@dataclass(frozen=True)
class SeveralSizes:
    """Images of a source, each cut and resized to the one of several sizes that is nearest to its aspect ratio.

    They are decoded while they are read. ``labelled``, ``captioned``: whether the first images have labels and captions.
    """

    source: Source
    form: ImageFormat
    labelled: bool
    captioned: bool
    sha256: str  # of the first images

    @classmethod
    def of(cls, source: Source, sizes: tuple[tuple[int, int], ...]) -> SeveralSizes:
        """Look at the first images of a source. Raises ValueError as `format_of` does."""
        form = ImageFormat(0, format_of(source, 1).mode, sizes)
        digest, some = hashlib.sha256(), list(islice(source.records(None, 0, 1), PEEKED))
        for record in some:
            digest.update(record.image if isinstance(record.image, bytes) else regular(record.image).read_bytes())
        labelled, captioned = (all(getattr(record, name) is not None for record in some) for name in ("label", "caption"))
        return cls(source, form, labelled, captioned, digest.hexdigest())

    @property
    def name(self) -> str:
        """The name of the source."""
        return self.source.name

    @property
    def classes(self) -> int | None:
        """The number of classes, where it is known before all labels are read."""
        return self.source.classes if self.labelled else None

    def walk(
        self, block: int, most: int | None = None, rank: int = 0, world: int = 1, piece: int | None = None
    ) -> Iterator[tuple[int, Tensor, Tensor | None, list[str] | None]]:
        """Pass over the images once, in order, as `Data.walk` does, with one part of each size that a block, or a piece of it, has.

        Raises ValueError for an image without label where the first images have one, and for a wrong label.
        """
        for number, kept in decode_blocks(self.source, self.form, block, most, rank, world, piece):
            for size in self.form.sizes:
                part = [(record, pixels) for record, pixels in kept if pixels.shape[1:] == size]
                if not part:
                    continue
                labels, records = None, [record for record, _ in part]
                if self.labelled:
                    for record in records:
                        check_label(record.where, -1 if record.label is None else record.label, self.source.classes)
                    labels = torch.tensor([record.label for record in records])
                captions = [record.caption or "" for record in records] if self.captioned else None
                yield number, torch.from_numpy(np.stack([pixels for _, pixels in part])), labels, captions
