"""Z-Image: lists of [C, 1, H, W] and of texts, time from 0 (noise) to 1 (data), and the negative velocity.

Its pipeline's ``guidance_scale`` is ours less 1: 0 is none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from teachers.networks.adapters import Adapter
from teachers.networks.records.record import Encoded, Record, by_sigmas, default, device, padded


class ZImage(Adapter):
    """Call a ZImageTransformer2DModel with ``text`` [B, L, D] and its ``mask`` [B, L]."""

    def forward(self, x: Tensor, t: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        texts = [row[:length] for row, length in zip(text, mask.sum(1).tolist(), strict=True)]
        return -torch.stack(self.net(list(x.unsqueeze(2)), (1000 - t) / 1000, texts, return_dict=False)[0]).squeeze(2)


def encode(pipeline: Any, prompts: list[str]) -> Encoded:
    length = default(pipeline, "max_sequence_length")
    rows, _ = pipeline.encode_prompt([*prompts, ""], device(pipeline), False, max_sequence_length=length)
    text, mask = padded(rows, length)
    return {"text": (text[:-1], text[-1:]), "mask": (mask[:-1], mask[-1:])}


RECORD = Record(ZImage, {"ZImagePipeline": encode}, side=128, unguided=0.0, grid=by_sigmas)
