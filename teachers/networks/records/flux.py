"""FLUX.1 (dev, schnell) and Chroma: squares of 2x2 latents are tokens, and time goes from 0 to 1."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from teachers.networks.adapters import Adapter
from teachers.networks.records.record import Encoded, Record, by_sigmas, device


def pack(x: Tensor) -> Tensor:
    """Return latents [B, C, H, W] as tokens [B, HW / 4, 4 C]."""
    return nn.functional.pixel_unshuffle(x, 2).flatten(2).transpose(1, 2)


def unpack(tokens: Tensor, x: Tensor) -> Tensor:
    """Return tokens [B, HW / 4, 4 C] in the shape of the latents x [B, C, H, W]."""
    height, width = x.shape[2:]
    return nn.functional.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (height // 2, width // 2)), 2)


def positions(height: int, width: int, like: Tensor) -> Tensor:
    """Return rows (0, y, x) of a grid of tokens, [height width, 3]."""
    return torch.cartesian_prod(torch.arange(1), torch.arange(height), torch.arange(width)).to(like)


class Flux(Adapter):
    """Call a FluxTransformer2DModel with ``text`` [B, L, D] and ``pooled`` [B, E]. ``guidance``: the embedded scale, if there is one."""

    def __init__(self, net: nn.Module, guidance: float | None = None):
        super().__init__(net)
        self.guidance = guidance

    def forward(self, x: Tensor, t: Tensor, text: Tensor, pooled: Tensor) -> Tensor:
        scale = None if self.guidance is None else torch.full_like(t, self.guidance)
        return self._tokens(x, t, text, pooled_projections=pooled, guidance=scale)

    def _tokens(self, x: Tensor, t: Tensor, text: Tensor, **options: Any) -> Tensor:
        ids = {"txt_ids": text.new_zeros(text.shape[1], 3), "img_ids": positions(x.shape[2] // 2, x.shape[3] // 2, x)}
        output = self.net(pack(x), encoder_hidden_states=text, timestep=t / 1000, return_dict=False, **ids, **options)[0]
        return unpack(output, x)


class Chroma(Flux):
    """Call a ChromaTransformer2DModel with ``text`` [B, L, D] and its ``mask`` [B, L]."""

    def forward(self, x: Tensor, t: Tensor, text: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        image = mask.new_ones(len(x), x.shape[2] * x.shape[3] // 4)
        return self._tokens(x, t, text, attention_mask=torch.cat([mask, image], 1))


def encode(pipeline: Any, prompts: list[str]) -> Encoded:
    text, pooled, _ = pipeline.encode_prompt([*prompts, ""], None, device=device(pipeline))
    return {"text": (text[:-1], text[-1:]), "pooled": (pooled[:-1], pooled[-1:])}


def encode_chroma(pipeline: Any, prompts: list[str]) -> Encoded:
    text, _, mask, null, _, null_mask = pipeline.encode_prompt(prompts, device=device(pipeline))
    return {"text": (text, null), "mask": (mask, null_mask)}


RECORD = Record(Flux, {"FluxPipeline": encode}, packing=2, side=128, guidance=3.5, grid=by_sigmas)
CHROMA = Record(Chroma, {"ChromaPipeline": encode_chroma}, packing=2, side=128, grid=by_sigmas)
