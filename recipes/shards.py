"""wds: shards of the WebDataset layout, tar files of samples.

The files of a sample share their path up to the first dot of its last part: 000.jpg beside 000.cls (the class as a number), 000.txt
(the caption) or 000.json ({"label": 3, "caption": "..."}). Nothing is unpacked to disk; other files are passed over.
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

from recipes.decode import SUFFIXES, Record, Source

PATTERN = "a path of .tar files with {000..127}, {a,b} or * in it"


def expand(pattern: str) -> list[str]:
    """Braces written out: "a{00..02}" is a00, a01, a02, "{x,y}" is x and y; several multiply."""
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
    """Where several processes stream, each takes its own shards. ValueError for a pattern that names no files or a missing one."""
    shards = [path for text in expand(pattern) for path in (sorted(glob.glob(text)) if "*" in text else [text])]
    missing = [path for path in shards if not Path(path).is_file()]
    if not shards or missing:
        which = f"there is no {missing[0]}" if missing else "no file is named so"
        raise ValueError(f"wds:{pattern}: {which}; accepted is {PATTERN}")

    def records(seed: int | None, rank: int, world: int) -> Iterator[Record]:
        order = shards if seed is None else [shards[i] for i in np.random.default_rng(seed).permutation(len(shards))]
        for shard in order[rank::world]:
            yield from samples(shard)

    return Source(Path(pattern).stem, records, classes=classes)


def samples(shard: str) -> Iterator[Record]:
    """The images of one tar file in its order. ValueError for a torn file, and labels or captions that are none."""
    try:
        with tarfile.open(shard, "r|*") as archive:
            files = (m for m in archive if m.isfile())
            for key, members in groupby(files, key=lambda m: _split(m.name)[0]):
                parts = {_split(m.name)[1]: file.read() for m in members if (file := archive.extractfile(m)) is not None}
                if (record := _record(f"{shard}/{key}", parts)) is not None:
                    yield record
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ValueError(f"{shard}: not a whole tar file ({error}); accepted is {PATTERN}") from None


def _split(name: str) -> tuple[str, str]:
    """Key and extension: "a/0.seg.png" -> ("a/0", "seg.png")."""
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
        raise ValueError(f"{where}: {error}: accepted are .cls with a number, .txt, .json with label and caption") from None
    return Record(where, image, label, caption)
