"""Copies to an accelerator for which the host does not wait, and the layout of convolutions on a CPU.

Times, and with them all coefficients of a schedule, are numbers per sample. They are computed on the CPU and sent where they multiply
images. A GPU then runs no schedule arithmetic, for which each of its launches would cost more than the numbers do.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

WIDE = 128  # input channels from which channels last pays (figures in EXPERIMENTS.md)


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
    """Store the weights of 2-d convolutions channels last where this is faster, else contiguous. In place; return the network.

    It is faster for wide networks on a CPU: those with a convolution of at least `WIDE` input channels. Values stay, and files hold
    contiguous tensors. ``sharded``: FSDP2 will shard the network; it accepts contiguous weights alone.
    """
    convolutions = [module for module in net.modules() if isinstance(module, nn.Conv2d)]
    wide = any(convolution.weight.shape[1] >= WIDE for convolution in convolutions)
    form = torch.channels_last if wide and device.type == "cpu" and not sharded else torch.contiguous_format
    for convolution in convolutions:  # `contiguous` would keep the strides of 1x1 kernels, which then ask for contiguous images
        convolution.weight.data = convolution.weight.data.to(memory_format=form)
    return net
