"""Copies to an accelerator for which the host does not wait.

Times, and with them all coefficients of a schedule, are numbers per sample. They are computed on the CPU and sent where they multiply
images. A GPU then runs no schedule arithmetic, for which each of its launches would cost more than the numbers do.
"""

from __future__ import annotations

import torch
from torch import Tensor


def send(values: Tensor, device: torch.device | str) -> Tensor:
    """Return ``values`` on ``device``. A copy from the CPU to a GPU goes through pinned memory and does not block.

    Inside of `torch.func` transforms there is no pinned memory; the driver then stages the few numbers itself.
    """
    device = torch.device(device)
    if device.type != "cuda" or values.device.type != "cpu":
        return values.to(device)
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor(values)
    pinned = values if wrapped else values.contiguous().pin_memory()  # pinning fails on rows that share memory
    return pinned.to(device, non_blocking=True)
