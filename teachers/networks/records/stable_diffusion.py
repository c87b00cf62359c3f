"""Stable Diffusion 1, 2 and XL."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from teachers.conditions import of_size
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
        """Return the scale as diffusers' pipelines embed it, who count from 0: sin and cos of 1000 (w - 1) f, f from 1 to 1/10000."""
        config: Any = self.net.config
        width = config.get("time_cond_proj_dim")
        if (width is None) != (guidance is None):
            raise ValueError(f"this network {'needs' if guidance is None else 'does not accept'} a guidance scale")
        if guidance is None:
            return None
        half = width // 2
        f = torch.exp(torch.arange(half, dtype=x.dtype, device=x.device) * -(math.log(10_000) / (half - 1)))
        angles = 1000 * (guidance - 1).to(x.dtype)[:, None] * f
        return torch.nn.functional.pad(torch.cat([angles.sin(), angles.cos()], 1), (0, width % 2))


def encode(pipeline: Any, prompts: list[str]) -> Encoded:
    return {"text": pipeline.encode_prompt(prompts, device(pipeline), 1, True)}


def encode_xl(pipeline: Any, prompts: list[str]) -> Encoded:
    """Add SDXL's size conditioning."""
    text, null, pooled, null_pooled = pipeline.encode_prompt(prompts, device=device(pipeline))
    ids = of_size(*pixels(pipeline, pipeline.unet))["time_ids"].repeat(len(prompts), 1)
    return {"text": (text, null), "pooled": (pooled, null_pooled), "time_ids": (ids, ids)}


RECORD = Record(TextUNet, {"StableDiffusionPipeline": encode, "StableDiffusionXLPipeline": encode_xl})
