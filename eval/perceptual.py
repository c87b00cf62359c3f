"""LPIPS (Zhang et al. 1801.03924) as a training distance, from the ``lpips`` package."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn


class Lpips(nn.Module):
    """Evaluate LPIPS with VGG features: two images [B, 3, H, W] in [-1, 1] -> [B]. Images are resized to 224x224 (2303.01469).

    ``weights``: False for random features, which need no file. Raises ValueError without the package, for images without three
    channels, and if the weights cannot be downloaded.
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
            raise ValueError("--distance lpips needs the lpips package: pip install -e '.[lpips]'") from None
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torchvision warns about the way lpips calls it
                self.inner: Any = lpips.LPIPS(net="vgg", pnet_rand=not weights, verbose=False)
        except OSError as error:
            raise ValueError(f"--distance lpips: cannot download the VGG weights ({error}); is there a network?") from None
        self.inner.requires_grad_(False).eval()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x, y = (nn.functional.interpolate(z.float(), self.size, mode="bilinear", antialias=True) for z in (x, y))
        with torch.autocast(x.device.type, enabled=False):
            return self.inner.to(x.device)(x, y).flatten()
