"""Read shards of the WebDataset layout: tar files of samples.

The files of a sample share their path up to the first dot of the file name: 000.jpg with 000.cls (the class as a number), 000.txt
(the caption) or 000.json ({"label": 3, "caption": "..."}). Nothing is unpacked to disk. Other files are skipped.
"""

from __future__ import annotations

import bz2
import glob
import gzip
import lzma
import math
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby, product
from pathlib import Path
from typing import IO, Any

import numpy as np

from distill.reading import first_line, json_object, regular
from recipes.data.decode import SUFFIXES, Record, Source

PATTERN = "a path of .tar files with {000..127}, {a,b} or * in it"
MAX_SHARDS, MAX_MEMBER = 100_000, 2**27  # files of a pattern; bytes of a file in a shard
UNPACK: dict[bytes, Callable[[Any], Any]] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}


def expand(pattern: str) -> list[str]:
    """Expand the braces of a pattern: "a{00..02}" to a00, a01, a02, "{x,y}" to x, y. Several braces multiply.

    Raises ValueError for more than `MAX_SHARDS` names.
    """
    parts = [_alternatives(text) if i % 2 else [text] for i, text in enumerate(re.split(r"\{([^{}]*)\}", pattern))]
    if (count := math.prod(map(len, parts))) > MAX_SHARDS:
        raise ValueError(f"wds:{pattern}: names {count:.0e} files; accepted are up to {MAX_SHARDS:,}")
    return ["".join(name) for name in product(*parts)]


def _alternatives(braces: str) -> Sequence[str]:
    """Return the texts that the content of a pair of braces stands for. Raises ValueError for more than `MAX_SHARDS`."""
    span = re.fullmatch(r"([0-9]{1,20})\.\.([0-9]{1,20})", braces)
    if span is None:
        return braces.split(",")
    first, last = map(int, span.groups())
    if last - first >= MAX_SHARDS:
        raise ValueError(f"wds: {{{braces}}} names {last - first + 1:,} files; accepted are up to {MAX_SHARDS:,}")
    return [str(i).zfill(len(span[1])) for i in range(first, last + 1)]


def shards_source(pattern: str, classes: int | None) -> Source:
    """Return shards as a source; each process of a stream reads its own shards. Raises ValueError if one is missing."""
    shards = [path for text in expand(pattern) for path in (sorted(glob.glob(text)) if "*" in text else [text])]
    if not shards:
        raise ValueError(f"wds:{pattern}: no file matches; accepted is {PATTERN}")
    for path in shards:
        try:
            regular(path, "tar file")
        except ValueError as error:
            raise ValueError(f"wds: {error}; accepted is {PATTERN}") from None

    def records(seed: int | None, rank: int, world: int) -> Iterator[Record]:
        order = shards if seed is None else [shards[i] for i in np.random.default_rng(seed).permutation(len(shards))]
        for shard in order[rank::world]:
            yield from samples(shard)

    return Source(Path(pattern).stem, records, classes=classes)


def samples(shard: str) -> Iterator[Record]:
    """Yield the images of one tar file, in order. Raises ValueError for a damaged file, and for a malformed label or caption."""
    try:
        with _opened(shard) as file, tarfile.open(fileobj=file, mode="r|") as archive:
            members = (_checked(shard, m) for m in archive if m.isfile())
            for key, group in groupby(members, key=lambda m: _split(m.name)[0]):
                parts = {_split(m.name)[1]: part.read() for m in group if (part := archive.extractfile(m)) is not None}
                if (record := _record(f"{shard}/{key}", parts)) is not None:
                    yield record
    except (
        tarfile.TarError,
        EOFError,
        OSError,
        LookupError,
        OverflowError,
        RuntimeError,
        MemoryError,
        zlib.error,
        lzma.LZMAError,
    ) as error:
        raise ValueError(f"{shard}: not a whole tar file ({first_line(error)}); accepted is {PATTERN}") from None


class _Unpacked:
    """Read a compressed file up to a hundred times its own size, which no set of images reaches."""

    def __init__(self, raw: IO[bytes], unpacked: IO[bytes]):
        self.raw, self.unpacked, self.made = raw, unpacked, 0

    def read(self, size: int) -> bytes:
        part = self.unpacked.read(size)
        self.made += len(part)
        if self.made > MAX_MEMBER and self.made > 100 * self.raw.tell():
            raise tarfile.ReadError(f"unpacks to more than 100 times its {self.raw.tell():,} bytes")
        return part


@contextmanager
def _opened(shard: str) -> Iterator[Any]:
    """Yield the bytes of a shard, unpacked if it is compressed."""
    with open(regular(shard, "tar file"), "rb") as raw:
        head = raw.read(6)
        raw.seek(0)
        unpack = next((unpack for magic, unpack in UNPACK.items() if head.startswith(magic)), None)
        if unpack is None:
            yield raw
            return
        with unpack(raw) as unpacked:
            yield _Unpacked(raw, unpacked)


def _checked(shard: str, member: tarfile.TarInfo) -> tarfile.TarInfo:
    """Return a member. Raises ValueError if it is sparse or large: its bytes are held in memory."""
    if member.issparse() or member.size > MAX_MEMBER:
        kind = "sparse" if member.issparse() else "a file"
        raise ValueError(
            f"{shard}/{member.name}: {kind}, of {member.size:,} bytes; accepted are whole files up to {MAX_MEMBER:,}"
        )
    return member


def _split(name: str) -> tuple[str, str]:
    """Return key and extension: ("a/0", "seg.png") of "a/0.seg.png"."""
    folder, slash, last = name.rpartition("/")
    stem, _, extension = last.partition(".")
    return folder + slash + stem, extension.lower()


def _record(where: str, parts: dict[str, bytes]) -> Record | None:
    image = next((content for extension, content in parts.items() if f".{extension}" in SUFFIXES), None)
    if image is None:
        return None
    try:
        facts = json_object(parts.get("json", b"{}").decode(), "the .json")
        label = int(parts["cls"]) if "cls" in parts else facts.get("label", facts.get("cls"))
        caption = parts["txt"].decode().strip() if "txt" in parts else facts.get("caption", facts.get("text"))
        if isinstance(label, bool) or not isinstance(label, int | None) or not isinstance(caption, str | None):
            raise ValueError(f"label {label!r}, caption {caption!r}")
    except ValueError as error:
        raise ValueError(
            f"{where}: {first_line(error)}; accepted are .cls with a number, .txt, .json with label and caption"
        ) from None
    return Record(where, image, label, caption)
