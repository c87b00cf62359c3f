"""Stable Diffusion 1, 2 and XL."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from teachers.networks.adapters import Adapter
from teachers.networks.records.record import Encoded, Record, device, pixels


class TextUNet(Adapter):
    """Call a UNet2DConditionModel with ``text`` [B, L, D], and for SDXL with ``pooled`` [B, E] and ``time_ids`` [B, 6]."""

    def forward(
        self, x: Tensor, t: Tensor, text: Tensor, pooled: Tensor | None = None, time_ids: Tensor | None = None
    ) -> Tensor:
        added = None if pooled is None else {"text_embeds": pooled, "time_ids": time_ids}
        return self.net(x, t, encoder_hidden_states=text, added_cond_kwargs=added, return_dict=False)[0][:, : x.shape[1]]


def encode(pipeline: Any, prompts: list[str]) -> Encoded:
    return {"text": pipeline.encode_prompt(prompts, device(pipeline), 1, True)}


def encode_xl(pipeline: Any, prompts: list[str]) -> Encoded:
    """Add SDXL's size conditioning (2307.01952) of uncropped images: original size, crop (0, 0), target size."""
    text, null, pooled, null_pooled = pipeline.encode_prompt(prompts, device=device(pipeline))
    size = pixels(pipeline, pipeline.unet)
    ids = torch.cat([size, torch.zeros(2), size]).repeat(len(prompts), 1)
    return {"text": (text, null), "pooled": (pooled, null_pooled), "time_ids": (ids, ids)}


RECORD = Record(TextUNet, {"StableDiffusionPipeline": encode, "StableDiffusionXLPipeline": encode_xl})
