"""Read the folders of latents that recipes/latents.py writes."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from distill import files
from teachers.codec import Codec

LATENTS = "fewstep-latents/1"
DTYPES = {"float16": torch.float16, "float32": torch.float32}


def is_latents(folder: Path) -> bool:
    """Return whether a folder has an index of latents."""
    index = folder / "index.json"
    return index.is_file() and LATENTS in index.read_text(errors="replace")


def read_latents(folder: Path) -> tuple[Tensor, Tensor | None, list[str] | None, dict]:
    """Return latents [N, ...], labels [N], captions and the index of a folder.

    Raises ValueError for an incomplete index, and for a shard that does not agree with it.
    """
    try:
        index = json.loads((folder / "index.json").read_text())
        count, shape, shards = int(index["count"]), tuple(index["shape"]), index["shards"]
        latents = torch.empty(count, *shape, dtype=DTYPES[index["dtype"]])
        sizes = {name: int(n) for name, n in shards.items()}
        missing = {"model", "scale", "shift", "codec_sha256"} - index.keys()
        if missing:
            raise KeyError(*missing)
    except (json.JSONDecodeError, KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise ValueError(
            f"{folder / 'index.json'}: not a whole index of latents ({error}); accepted is one that recipes/latents.py wrote"
        ) from None
    labels: list[Tensor] = []
    captions: list[str] = []
    start = 0
    for name, n in sizes.items():
        tensors, description = files.load(folder / Path(name).name)
        part = tensors.get("latents")
        if part is None or part.shape != (n, *shape) or part.dtype != latents.dtype or start + n > count:
            found = "none" if part is None else f"{part.dtype} {tuple(part.shape)}"
            raise ValueError(f"{folder / name}: latents are {found}, the index has {latents.dtype} {(n, *shape)}")
        latents[start : start + n] = part
        labels += [tensors["labels"].long()] if "labels" in tensors else []
        captions += description.get("captions") or []
        start += n
    if start != count or sum(map(len, labels)) not in (0, count) or len(captions) not in (0, count):
        raise ValueError(
            f"{folder}: {start} latents, {sum(map(len, labels))} labels, {len(captions)} captions; the index has {count}"
        )
    return latents, torch.cat(labels) if labels else None, captions or None, index


def codec_sha256(codec: Codec) -> str:
    """Return the sha256 of an autoencoder's weights. Latents fit only the autoencoder that made them."""
    return files.weights_sha256({name: value.float() for name, value in codec.network.state_dict().items()})
