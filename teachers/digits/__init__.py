"""The embedded data set, scikit-learn's 1797 grey 8x8 digits. The teacher trained on them is beside this file."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


def digits() -> tuple[Tensor, Tensor]:
    """Return all 1797 images as uint8 [N, 1, 8, 8] (0..16 scaled to 0..255) and their labels, int64 [N]."""
    package = find_spec("sklearn")  # importing it would take longer than some training steps
    assert package is not None and package.origin is not None
    table = torch.from_numpy(np.loadtxt(Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz", delimiter=","))
    return (table[:, :-1] / 16 * 255).round().to(torch.uint8).view(-1, 1, 8, 8), table[:, -1].long()
