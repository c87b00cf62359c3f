"""Pixels as features, a second space in which small images are compared: it depends on no trained network."""

from __future__ import annotations

from torch import Tensor, nn


class Pixels(nn.Module):
    """Return uint8 images [B, C, H, W] as numbers in [-1, 1], [B, C H W]. The Frechet distance then compares mean and covariance."""

    def forward(self, images: Tensor) -> Tensor:
        return images.float().flatten(1) / 127.5 - 1
