"""Analog bits (2208.04202): tokens as vectors of +-1, so that categories are data of an ordinary denoiser, distill.denoiser.

E[x0 | x_t] of a bit is 2 P(bit = 1 | x_t) - 1, and its sign is the likelier value. `from_bits` rounds so.
"""

from __future__ import annotations

import torch
from torch import Tensor


def to_bits(tokens: Tensor, bits: int) -> Tensor:
    """Return the binary digits of tokens [...], integers in 0..2^bits-1, as float32 [..., bits] in {-1, 1}, the highest first."""
    places = torch.arange(bits - 1, -1, -1, device=tokens.device)
    return (tokens.long().unsqueeze(-1) >> places & 1).float() * 2 - 1


def from_bits(values: Tensor) -> Tensor:
    """Return the tokens, int64 [...], of bits [..., bits] rounded to their signs; 0 and NaN count as -1."""
    places = torch.arange(values.shape[-1] - 1, -1, -1, device=values.device)
    return ((values > 0).long() << places).sum(-1)


def posterior_mean(x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Return E[b | x_t] = tanh(alpha x_t / sigma^2) of bits b that are +-1 with equal probability, x_t = alpha b + sigma eps.

    ``alpha``, ``sigma``: broadcast with x_t. It is the best denoiser of uniform independent bits.
    """
    return torch.tanh(alpha * x_t / sigma.square())


def pixels_to_bits(images: Tensor, bits: int) -> Tensor:
    """Return images [B, C, H, W] in [-1, 1] as float32 [B, C bits, H, W] in {-1, 1}, of the nearest of 2^bits equidistant levels."""
    levels = 2**bits - 1
    tokens = ((images.float() + 1) / 2 * levels).round().clamp(0, levels).long()
    return to_bits(tokens, bits).movedim(-1, 2).flatten(1, 2)


def pixels_to_tokens(values: Tensor, bits: int) -> Tensor:
    """Return the tokens [B, C, H, W] of the result of `pixels_to_bits` [B, C bits, H, W], which may be noisy."""
    return from_bits(values.unflatten(1, (-1, bits)).movedim(2, -1))


def to_pixels(tokens: Tensor, levels: int) -> Tensor:
    """Return tokens 0..levels-1 as float32 in [-1, 1], equidistant. The inverse of the rounding of `pixels_to_bits`."""
    return tokens.float() / (levels - 1) * 2 - 1
