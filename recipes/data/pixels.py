"""Change the pixels of a whole set: make images grey, pad them, and average blocks of pixels."""

from __future__ import annotations

import torch
from torch import Tensor

LUMA = (19595, 38470, 7471)  # 2^16 times ITU-R 601's 0.299, 0.587, 0.114, as Pillow's mode L
BLOCK = 4096  # images at a time


def changed(images: Tensor, options: dict[str, str]) -> Tensor:
    """Return uint8 images [N, C, H, W] as the options of a spec say: grey, then ``pad``, then ``box``. Raises their errors."""
    images = grey(images) if "grey" in options else images
    images = padded(images, int(options["pad"])) if "pad" in options else images
    return boxed(images, int(options["box"])) if "box" in options else images


def grey(images: Tensor) -> Tensor:
    """Return uint8 [N, 3, H, W] as [N, 1, H, W], by ITU-R 601; one channel stays. Raises ValueError for other channels."""
    if images.shape[1] == 1:
        return images
    if images.shape[1] != 3:
        raise ValueError(f"grey: the images have {images.shape[1]} channels; accepted are 1 and 3")
    weights = torch.tensor(LUMA, dtype=torch.int32)[:, None, None]
    parts = [((part * weights).sum(1, keepdim=True) + 2**15 >> 16).byte() for part in images.split(BLOCK)]
    return torch.cat(parts)


def padded(images: Tensor, side: int) -> Tensor:
    """Return the images in the middle of black ones of height and width ``side``. Raises ValueError for larger images."""
    height, width = images.shape[2:]
    if max(height, width) > side:
        raise ValueError(f"pad={side}: the images are {height}x{width}; accepted are at least {max(height, width)}")
    top, left = (side - height) // 2, (side - width) // 2
    out = images.new_zeros(*images.shape[:2], side, side)
    out[:, :, top : top + height, left : left + width] = images
    return out


def boxed(images: Tensor, block: int) -> Tensor:
    """Return the mean of each block of ``block`` x ``block`` pixels, rounded. Raises ValueError where blocks do not fill the images."""
    n, channels, height, width = images.shape
    if height % block or width % block:
        raise ValueError(
            f"box={block}: the images are {height}x{width}; accepted are divisors of both sides, and pad=... before it"
        )
    blocks = images.reshape(n, channels, height // block, block, width // block, block)
    sums = [part.sum((3, 5), dtype=torch.int32) for part in blocks.split(BLOCK)]
    return ((torch.cat(sums) + block * block // 2) // (block * block)).byte()
