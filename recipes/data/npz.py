"""Read .npz files of images. Uncompressed images are mapped into memory, so that the file may be larger than the memory."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

ACCEPTED = "accepted are images uint8 [N, H, W, C], labels of integers [N] and captions [N]"


def read_npz(path: Path) -> tuple[Tensor, Tensor | None, list[str] | None]:
    """Return images uint8 [N, C, H, W], labels [N] and captions [N] of a file with images uint8 [N, H, W, C].

    Labels and captions are optional. Raises ValueError in one line for other contents.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            images = _mapped(path, "images.npy")
            images = file["images"] if images is None else images
            labels, captions = (file[key] if key in file.files else None for key in ("labels", "captions"))
    except (OSError, KeyError, ValueError, AttributeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path}: {error}; {ACCEPTED}") from None
    if images.dtype != np.uint8 or images.ndim != 4 or not images.size:
        raise ValueError(f"{path}: images are {images.dtype} {images.shape}; {ACCEPTED}")
    for name, array, kinds in (("labels", labels, "iu"), ("captions", captions, "U")):
        if array is not None and (array.shape != images.shape[:1] or array.dtype.kind not in kinds):
            raise ValueError(f"{path}: {len(images)} images, but {name} of {array.dtype} and shape {array.shape}; {ACCEPTED}")
    if labels is not None and labels.min() < 0:
        raise ValueError(f"{path}: label {labels.min()}; accepted are 0 and more")
    return (
        torch.from_numpy(images).permute(0, 3, 1, 2),
        None if labels is None else torch.from_numpy(labels.astype(np.int64)),
        None if captions is None else captions.tolist(),
    )


def _mapped(path: Path, member: str) -> np.ndarray | None:
    """Map an array of a zip file into memory; None if it is compressed or not in C order. Writes do not reach the file."""
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        info = archive.getinfo(member)
        if info.compress_type != zipfile.ZIP_STORED:
            return None
        # a local header has 30 bytes; the last four are the lengths of the name and of an extra field, which follow it
        file.seek(info.header_offset + 26)
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
