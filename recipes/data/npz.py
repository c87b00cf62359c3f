"""Read .npz files of images. Uncompressed images are mapped into memory, so that the file may be larger than the memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from distill import npz
from recipes.data.decode import check_label

ACCEPTED = "accepted are images uint8 [N, H, W, C], labels of integers [N] and captions [N]"


def read_npz(path: Path) -> tuple[Tensor, Tensor | None, list[str] | None]:
    """Return images uint8 [N, C, H, W], labels [N] and captions [N] of a file with images uint8 [N, H, W, C].

    Labels and captions are optional. Raises ValueError in one line for other contents.
    """
    try:
        found = npz.read(path, ("images", "labels", "captions"))
    except ValueError as error:
        raise ValueError(f"{error}; {ACCEPTED}") from None
    if "images" not in found:
        raise ValueError(f"{path}: holds no images; {ACCEPTED}")
    images, labels, captions = found["images"], found.get("labels"), found.get("captions")
    if images.dtype != np.uint8 or images.ndim != 4 or not images.size:
        raise ValueError(f"{path}: images are {images.dtype} {images.shape}; {ACCEPTED}")
    for name, array, kinds in (("labels", labels, "iu"), ("captions", captions, "U")):
        if array is not None and (array.shape != images.shape[:1] or array.dtype.kind not in kinds):
            raise ValueError(f"{path}: {len(images)} images, but {name} of {array.dtype} and shape {array.shape}; {ACCEPTED}")
    if labels is not None:
        check_label(path, int(labels.min()))
        check_label(path, int(labels.max()))
    return (
        torch.from_numpy(images).permute(0, 3, 1, 2),
        None if labels is None else torch.from_numpy(labels.astype(np.int64)),
        None if captions is None else captions.tolist(),
    )
