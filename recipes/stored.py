"""Sets that need no decoding: .npz files, mapped into memory where they are not compressed, and folders of latents."""

from __future__ import annotations

import json
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from distill import checkpoint
from teachers.codec import Codec

LATENTS = "fewstep-latents/1"


def read_npz(path: Path) -> tuple[Tensor, Tensor | None, list[str] | None]:
    """images uint8 [N, C, H, W], labels [N], captions. A stored member stays in the file, a compressed one is read whole.
    ValueError in one line for anything but images uint8 [N, H, W, C] and, where there are any, labels and captions [N]."""
    accepted = "accepted are images uint8 [N, H, W, C], labels of integers [N] and captions [N]"
    try:
        with np.load(path, allow_pickle=False) as file:
            images = _mapped(path, "images.npy")
            images = file["images"] if images is None else images
            labels, captions = (file[key] if key in file.files else None for key in ("labels", "captions"))
    except (OSError, KeyError, ValueError, AttributeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path}: {error}; {accepted}") from None
    if images.dtype != np.uint8 or images.ndim != 4 or not images.size:
        raise ValueError(f"{path}: images are {images.dtype} {images.shape}; {accepted}")
    for name, array, kinds in (("labels", labels, "iu"), ("captions", captions, "U")):
        if array is not None and (array.shape != images.shape[:1] or array.dtype.kind not in kinds):
            raise ValueError(f"{path}: {len(images)} images but {name} of {array.dtype} and shape {array.shape}; {accepted}")
    if labels is not None and labels.min() < 0:
        raise ValueError(f"{path}: label {labels.min()}: accepted are 0 and more")
    return (
        torch.from_numpy(images).permute(0, 3, 1, 2),
        None if labels is None else torch.from_numpy(labels.astype(np.int64)),
        None if captions is None else captions.tolist(),
    )


def _mapped(path: Path, member: str) -> np.ndarray | None:
    """An array of a zip file, in place; None where it is compressed or not in C order. Writes stay in memory."""
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        info = archive.getinfo(member)
        if info.compress_type != zipfile.ZIP_STORED:
            return None
        file.seek(
            info.header_offset + 26
        )  # a local header: 30 bytes, whose last four are two lengths, a name and an extra field
        lengths = file.read(4)
        file.seek(int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little"), 1)
        version = np.lib.format.read_magic(file)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
        if read is None:
            return None
        shape, fortran, dtype = read(file)
        if fortran or dtype.hasobject or 0 in shape:
            return None
        return np.memmap(path, dtype, "c", file.tell(), shape)


def is_latents(folder: Path) -> bool:
    index = folder / "index.json"
    return index.is_file() and LATENTS in index.read_text(errors="replace")


def read_latents(folder: Path) -> tuple[Tensor, Tensor | None, list[str] | None, dict]:
    """Latents [N, ...], labels, captions and the index of a folder that recipes/latents.py wrote. ValueError where a shard does not
    agree with the index."""
    try:
        index = json.loads((folder / "index.json").read_text())
        count, shape, shards = int(index["count"]), tuple(index["shape"]), index["shards"]
        latents = torch.empty(count, *shape, dtype={"float16": torch.float16, "float32": torch.float32}[index["dtype"]])
        sizes = {name: int(n) for name, n in shards.items()}
        missing = {"model", "scale", "shift", "codec_sha256"} - index.keys()
        if missing:
            raise KeyError(*missing)
    except (json.JSONDecodeError, KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{folder / 'index.json'}: no index of latents ({error}): recipes/latents.py writes them") from None
    labels: list[Tensor] = []
    captions: list[str] = []
    start = 0
    for name, n in sizes.items():
        tensors, description = checkpoint.load(folder / Path(name).name)
        part = tensors.get("latents")
        if part is None or part.shape != (n, *shape) or part.dtype != latents.dtype or start + n > count:
            found = "none" if part is None else f"{part.dtype} {tuple(part.shape)}"
            raise ValueError(f"{folder / name}: latents are {found}, the index has {latents.dtype} {(n, *shape)}")
        latents[start : start + n] = part
        labels += [tensors["labels"].long()] if "labels" in tensors else []
        captions += description.get("captions") or []
        start += n
    if start != count or sum(map(len, labels)) not in (0, count) or len(captions) not in (0, count):
        raise ValueError(f"{folder}: {start} latents, {sum(map(len, labels))} labels: the index has {count} of each")
    return latents, torch.cat(labels) if labels else None, captions or None, index


def codec_sha256(codec: Codec) -> str:
    """sha256 of an autoencoder's weights: latents of one are noise to another."""
    return checkpoint.weights_sha256({name: value.float() for name, value in codec.network.state_dict().items()})
