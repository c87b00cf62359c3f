"""Read shards of the WebDataset layout: tar files of samples.

The files of a sample share their path up to the first dot of the file name: 000.jpg with 000.cls (the class as a number), 000.txt
(the caption) or 000.json ({"label": 3, "caption": "..."}). Nothing is unpacked to disk. Other files are skipped.
"""

from __future__ import annotations

import glob
import json
import re
import tarfile
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import numpy as np

from recipes.data.decode import SUFFIXES, Record, Source

PATTERN = "a path of .tar files with {000..127}, {a,b} or * in it"


def expand(pattern: str) -> list[str]:
    """Expand the braces of a pattern: "a{00..02}" to a00, a01, a02, "{x,y}" to x, y. Several braces multiply."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        return [pattern]
    if span := re.fullmatch(r"(\d+)\.\.(\d+)", match[1]):
        first, last = span.groups()
        inner = [str(i).zfill(len(first)) for i in range(int(first), int(last) + 1)]
    else:
        inner = match[1].split(",")
    return [tail for text in inner for tail in expand(pattern[: match.start()] + text + pattern[match.end() :])]


def shards_source(pattern: str, classes: int | None) -> Source:
    """Return shards as a source; each process of a stream reads its own shards. Raises ValueError if one is missing."""
    shards = [path for text in expand(pattern) for path in (sorted(glob.glob(text)) if "*" in text else [text])]
    missing = [path for path in shards if not Path(path).is_file()]
    if not shards or missing:
        which = f"there is no file {missing[0]}" if missing else "no file matches"
        raise ValueError(f"wds:{pattern}: {which}; accepted is {PATTERN}")

    def records(seed: int | None, rank: int, world: int) -> Iterator[Record]:
        order = shards if seed is None else [shards[i] for i in np.random.default_rng(seed).permutation(len(shards))]
        for shard in order[rank::world]:
            yield from samples(shard)

    return Source(Path(pattern).stem, records, classes=classes)


def samples(shard: str) -> Iterator[Record]:
    """Yield the images of one tar file, in order. Raises ValueError for a damaged file, and for a malformed label or caption."""
    try:
        with tarfile.open(shard, "r|*") as archive:
            members = (m for m in archive if m.isfile())
            for key, group in groupby(members, key=lambda m: _split(m.name)[0]):
                parts = {_split(m.name)[1]: file.read() for m in group if (file := archive.extractfile(m)) is not None}
                if (record := _record(f"{shard}/{key}", parts)) is not None:
                    yield record
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ValueError(f"{shard}: not a whole tar file ({error}); accepted is {PATTERN}") from None


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
        facts = json.loads(parts.get("json", b"{}"))
        label = int(parts["cls"]) if "cls" in parts else facts.get("label", facts.get("cls"))
        caption = parts["txt"].decode().strip() if "txt" in parts else facts.get("caption", facts.get("text"))
        if not isinstance(label, int | None) or not isinstance(caption, str | None):
            raise ValueError(f"label {label!r}, caption {caption!r}")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{where}: {error}; accepted are .cls with a number, .txt, .json with label and caption") from None
    return Record(where, image, label, caption)
