"""Copies to an accelerator for which the host does not wait, and the layout of convolutions on a CPU.

Times, and with them all coefficients of a schedule, are numbers per sample. They are computed on the CPU and sent where they multiply
images. A GPU then runs no schedule arithmetic, for which each of its launches would cost more than the numbers do.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


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


def lay_out(net: nn.Module, device: torch.device, sharded: bool = False) -> nn.Module:
    """Store the weights of 2-d convolutions channels last on a CPU, where this is faster, else contiguous. In place; return the network.

    Values and names stay, and files hold contiguous tensors. ``sharded``: the network will be sharded by FSDP2, which accepts contiguous
    weights alone.
    """
    form = torch.channels_last if device.type == "cpu" and not sharded else torch.contiguous_format
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data = module.weight.data.to(memory_format=form)  # `contiguous` keeps the strides of 1x1 kernels
    return net
