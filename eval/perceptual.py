"""LPIPS (Zhang et al. 2018) as a training distance, from the ``lpips`` package: a perceptual distance of colour images."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn


class Lpips(nn.Module):
    """LPIPS with VGG features, [B, 3, H, W] in [-1, 1] -> [B], at 224x224 as in the consistency papers.

    ``weights``: False for random features, which need no file. ValueError without the package, for images that are not of
    three channels, or where the weights cannot be had.
    """

    size = 224

    def __init__(self, channels: int, weights: bool = True):
        super().__init__()
        if channels != 3:
            raise ValueError(
                f"--distance lpips is defined for 3 channels, these images have {channels}: accepted are l2, pseudo_huber"
            )
        try:
            import lpips
        except ImportError:
            raise ValueError("--distance lpips needs the lpips package: pip install 'fewstep[lpips]'") from None
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of torchvision, about how lpips calls it
                self.inner: Any = lpips.LPIPS(net="vgg", pnet_rand=not weights, verbose=False)
        except OSError as error:
            raise ValueError(f"--distance lpips: the VGG weights cannot be had ({error}); is there a network?") from None
        self.inner.requires_grad_(False).eval()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x, y = (nn.functional.interpolate(z.float(), self.size, mode="bilinear", antialias=True) for z in (x, y))
        with torch.autocast(x.device.type, enabled=False):
            return self.inner.to(x.device)(x, y).flatten()
