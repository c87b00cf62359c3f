"""Stable Diffusion 3 and 3.5."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from teachers.networks.adapters import Adapter
from teachers.networks.records.record import Encoded, Record, device


class SD3(Adapter):
    """Call an SD3Transformer2DModel with ``text`` [B, L, D] and ``pooled`` [B, E]."""

    def forward(self, x: Tensor, t: Tensor, text: Tensor, pooled: Tensor) -> Tensor:
        cond = {"encoder_hidden_states": text, "pooled_projections": pooled}
        return self.net(hidden_states=x, timestep=t, return_dict=False, **cond)[0]


def encode(pipeline: Any, prompts: list[str]) -> Encoded:
    """Encode as the pipeline does. Without T5 it appends 256 tokens of 0, which its network attends to like any other."""
    text, null, pooled, null_pooled = pipeline.encode_prompt(prompts, None, None, device=device(pipeline))
    return {"text": (text, null), "pooled": (pooled, null_pooled)}


RECORD = Record(SD3, {"StableDiffusion3Pipeline": encode})
