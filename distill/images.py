"""Between uint8 images and the floats that pixel-space denoisers work on."""

from __future__ import annotations

import torch
from torch import Tensor

from distill.device import send


def from_uint8(images: Tensor, device: torch.device | str = "cpu") -> Tensor:
    """Return uint8 images [B, C, H, W], possibly memory-mapped, as float32 in [-1, 1] on ``device``."""
    return send(images.contiguous(), device).float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """Return images in [-1, 1] as uint8: round((x + 1) 127.5), clamped to 0..255. The project rounds nowhere else."""
    return (images + 1).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8)
