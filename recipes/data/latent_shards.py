"""Read the folders of latents that recipes/latents.py writes."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from distill import files, reading
from distill.reading import first_line, regular
from teachers.codec import Codec
from teachers.conditions import Rows

LATENTS, PATTERN = "fewstep-latents/1", "latents-*.safetensors"
BUCKETS = "fewstep-latent-buckets/1"  # a folder with a folder of latents for each of several shapes
IN_MEMORY = 2**28  # bytes of latents that are read and checked; more are mapped into memory
DTYPES = {"float16": torch.float16, "float32": torch.float32}


def is_latents(folder: Path) -> bool:
    """Return whether a folder has an index of latents, of one shape or of several."""
    index = folder / "index.json"
    return index.is_file() and any(format in reading.read_text(index) for format in (LATENTS, BUCKETS))


def read_latents(folder: Path) -> tuple[Tensor | Rows, Tensor | None, list[str] | None, dict]:
    """Return latents [N, ...], labels [N], captions and the index of a folder.

    Latents of more than `IN_MEMORY` bytes are mapped into memory, and their sha256 is not checked, which would read them all.
    Raises ValueError for an incomplete index, and for a shard that does not agree with it.
    """
    try:
        index = _checked_index(reading.read_json(folder / "index.json"), folder)
        dtype, size = DTYPES[index["dtype"]], index["count"] * math.prod(index["shape"])
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise ValueError(
            f"{folder / 'index.json'}: not a whole index of latents ({first_line(error)}); accepted is one that recipes/latents.py wrote"
        ) from None
    count, shape, sizes, small = index["count"], tuple(index["shape"]), index["shards"], size * dtype.itemsize <= IN_MEMORY
    latents: list[Tensor] = []
    labels: list[Tensor] = []
    captions: list[str] = []
    for name, n in sizes.items():
        tensors, description = files.load(folder / Path(name).name, check=small)
        part = tensors.get("latents")
        if part is None or part.shape != (n, *shape) or part.dtype != dtype:
            found = "none" if part is None else f"{part.dtype} {tuple(part.shape)}"
            raise ValueError(f"{folder / name}: latents are {found}, the index has {dtype} {(n, *shape)}")
        latents.append(part)
        labels += [tensors["labels"].long()] if "labels" in tensors else []
        captions += description.get("captions") or []
    if (start := sum(map(len, latents))) != count or sum(map(len, labels)) not in (0, count) or len(captions) not in (0, count):
        raise ValueError(
            f"{folder}: {start} latents, {sum(map(len, labels))} labels, {len(captions)} captions; the index has {count}"
        )
    held = torch.cat(latents) if small else Rows(latents)
    return held, torch.cat(labels) if labels else None, captions or None, index


def _checked_index(index: dict, folder: Path) -> dict:
    """Return an index with entries of the right types, whose latents are no larger than its files. Raises various errors if not."""
    sizes = {str(name): int(n) for name, n in index["shards"].items()}
    count, shape = int(index["count"]), [int(n) for n in index["shape"]]
    held = sum(regular(folder / Path(name).name).stat().st_size for name in sizes)
    if min(count, *shape) < 1 or count * math.prod(shape) * DTYPES[index["dtype"]].itemsize > max(held, 2**28):
        raise ValueError(f"{count} latents of shape {shape} do not fit the {held:,} bytes of the shards")
    names = {"model": str, "codec_sha256": str, "scale": float | int, "shift": float | int}
    optional = {"classes": int | None, "factor": int | None}
    wrong = [name for name, kind in names.items() if not isinstance(index[name], kind)]
    if wrong := wrong + [name for name, kind in optional.items() if not isinstance(index.get(name), kind)]:
        raise ValueError(f"{wrong[0]} is {index[wrong[0]]!r}")
    return index | {"shards": sizes, "count": count, "shape": shape}


def codec_sha256(codec: Codec) -> str:
    """Return the sha256 of an autoencoder's weights. Latents fit only the autoencoder that made them."""
    return files.weights_sha256({name: value.float() for name, value in codec.network.state_dict().items()})
