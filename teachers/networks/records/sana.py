"""Sana: latents of a deep-compression autoencoder, 32 times smaller than the image."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from teachers.networks.adapters import Adapter
from teachers.networks.records.record import Encoded, Record, default, device


class Sana(Adapter):
    """Call a SanaTransformer2DModel with ``text`` [B, L, D] and its ``mask`` [B, L]."""

    def forward(self, x: Tensor, t: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        cond = {"encoder_hidden_states": text, "encoder_attention_mask": mask}
        config: Any = self.net.config
        return self.net(x, timestep=t * config["timestep_scale"], return_dict=False, **cond)[0][:, : x.shape[1]]


def encode(pipeline: Any, prompts: list[str]) -> Encoded:
    """Put the pipeline's instruction before each prompt, as its call does; the empty prompt has none."""
    instruction = default(pipeline, "complex_human_instruction")
    text, mask, null, null_mask = pipeline.encode_prompt(
        prompts, device=device(pipeline), complex_human_instruction=instruction
    )
    return {"text": (text, null), "mask": (mask, null_mask)}


RECORD = Record(Sana, {"SanaPipeline": encode})
