"""The embedded data set, scikit-learn's 1797 grey 8x8 digits. The teacher trained on them is beside this file."""

from __future__ import annotations

import torch
from torch import Tensor


def digits() -> tuple[Tensor, Tensor]:
    """Return all 1797 images as uint8 [N, 1, 8, 8] (0..16 scaled to 0..255) and their labels, int64 [N]."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.images / 16 * 255).round().to(torch.uint8)
    return images[:, None], torch.tensor(data.target)
