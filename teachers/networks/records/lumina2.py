"""Lumina-Image 2: time from 0 (noise) to 1 (data), and the negative velocity."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from teachers.networks.adapters import Adapter
from teachers.networks.records.record import Encoded, Record, by_sigmas, device, shift_of


class Lumina2(Adapter):
    """Call a Lumina2Transformer2DModel with ``text`` [B, L, D] and its ``mask`` [B, L]."""

    def forward(self, x: Tensor, t: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        cond = {"encoder_hidden_states": text, "encoder_attention_mask": mask}
        return -self.net(x, timestep=1 - t / 1000, return_dict=False, **cond)[0]

    @staticmethod
    def guided_norm(difference: Tensor) -> Tensor:
        """Return the norm along the width, which guidance keeps, [B, C, H, 1]."""
        return difference.norm(dim=-1, keepdim=True)


def encode(pipeline: Any, prompts: list[str]) -> Encoded:
    text, mask, null, null_mask = pipeline.encode_prompt(prompts, device=device(pipeline))
    return {"text": (text, null), "mask": (mask, null_mask)}


def grid(config: Any, steps: int, shape: tuple[int, ...]) -> dict:
    """Return what the pipeline does, which takes the channels of the latents for their tokens."""
    return by_sigmas(config, steps, shape) | shift_of(config, shape[0])


RECORD = Record(Lumina2, {"Lumina2Pipeline": encode}, grid=grid)
