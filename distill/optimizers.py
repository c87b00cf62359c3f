"""The optimizers of training: AdamW (1711.05101) in float32, or with moments of 8 bits (Dettmers et al. 2110.02861) by bitsandbytes."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable

import torch
from torch import Tensor


def check_installed(name: str) -> None:
    """Raise ValueError where the package of an optimizer is missing. ``name``: one of `distill.names.OPTIMIZERS`."""
    if name == "adamw8bit" and importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(
            "--optimizer adamw8bit needs the package bitsandbytes: pip install 'fewstep[adam8bit]'; accepted without it is adamw"
        )


def optimizer_of(
    name: str, weights: Iterable[Tensor], *, lr: float, betas: tuple[float, float], weight_decay: float
) -> torch.optim.Optimizer:
    """Return the optimizer of this name over ``weights``. Raises ValueError as `check_installed` does."""
    check_installed(name)
    if name == "adamw":
        return torch.optim.AdamW(weights, lr=lr, betas=betas, weight_decay=weight_decay, fused=True)
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit(weights, lr=lr, betas=betas, weight_decay=weight_decay)
