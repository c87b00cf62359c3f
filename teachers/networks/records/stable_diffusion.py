"""Stable Diffusion 1, 2 and XL."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from teachers.networks.adapters import Adapter
from teachers.networks.records.record import Encoded, Record, device, pixels


class TextUNet(Adapter):
    """Call a UNet2DConditionModel with ``text`` [B, L, D], and for SDXL with ``pooled`` [B, E] and ``time_ids`` [B, 6].

    A network with ``time_cond_proj_dim`` also takes the scale ``guidance`` [B], as latent consistency models do (2310.04378).
    """

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        text: Tensor,
        pooled: Tensor | None = None,
        time_ids: Tensor | None = None,
        guidance: Tensor | None = None,
    ) -> Tensor:
        added = None if pooled is None else {"text_embeds": pooled, "time_ids": time_ids}
        scale = self._embedded(guidance, x)
        output = self.net(
            x, t, timestep_cond=scale, encoder_hidden_states=text, added_cond_kwargs=added, return_dict=False
        )  # fmt: skip
        return output[0][:, : x.shape[1]]

    def _embedded(self, guidance: Tensor | None, x: Tensor) -> Tensor | None:
        """Return diffusers' embedding of the scale, whose scales count from 0: sin and cos of 1000 (w - 1)."""
        config: Any = self.net.config
        width = config.get("time_cond_proj_dim")
        if (width is None) != (guidance is None):
            raise ValueError(f"this network {'needs' if guidance is None else 'does not accept'} a guidance scale")
        if guidance is None or width is None:
            return None
        from diffusers.models.embeddings import get_timestep_embedding

        return get_timestep_embedding(1000 * (guidance - 1), width, downscale_freq_shift=1).to(x.dtype)


def encode(pipeline: Any, prompts: list[str]) -> Encoded:
    return {"text": pipeline.encode_prompt(prompts, device(pipeline), 1, True)}


def encode_xl(pipeline: Any, prompts: list[str]) -> Encoded:
    """Add SDXL's size conditioning (2307.01952) of uncropped images: original size, crop (0, 0), target size."""
    text, null, pooled, null_pooled = pipeline.encode_prompt(prompts, device=device(pipeline))
    size = pixels(pipeline, pipeline.unet)
    ids = torch.cat([size, torch.zeros(2), size]).repeat(len(prompts), 1)
    return {"text": (text, null), "pooled": (pooled, null_pooled), "time_ids": (ids, ids)}


RECORD = Record(TextUNet, {"StableDiffusionPipeline": encode, "StableDiffusionXLPipeline": encode_xl})
