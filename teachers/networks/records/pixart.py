"""PixArt-alpha and PixArt-sigma."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from teachers.conditions import of_size
from teachers.networks.adapters import Adapter
from teachers.networks.records.record import Encoded, Record, device, pixels


class PixArt(Adapter):
    """Call a PixArtTransformer2DModel with ``text`` [B, L, D] and its ``mask`` [B, L].

    A network conditioned on the size of its images also takes their ``resolution`` [B, 2] in pixels and their ``aspect_ratio`` [B, 1].
    Older files lack these; the resolution is then 8 times that of the latents.
    """

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        text: Tensor,
        mask: Tensor,
        resolution: Tensor | None = None,
        aspect_ratio: Tensor | None = None,
    ) -> Tensor:
        if self.net.use_additional_conditions and resolution is None:
            height, width = x.shape[2:]
            resolution = x.new_tensor([8 * height, 8 * width]).expand(len(x), 2)
            aspect_ratio = x.new_tensor([height / width]).expand(len(x), 1)
        added = {"resolution": resolution, "aspect_ratio": aspect_ratio}
        output = self.net(
            x, encoder_hidden_states=text, timestep=t, encoder_attention_mask=mask, added_cond_kwargs=added, return_dict=False
        )[0]
        return output[:, : x.shape[1]]


def encode(pipeline: Any, prompts: list[str]) -> Encoded:
    """Add the size conditioning of PixArt-alpha's 1024 model."""
    text, mask, null, null_mask = pipeline.encode_prompt(prompts, device=device(pipeline))
    out = {"text": (text, null), "mask": (mask, null_mask)}
    if pipeline.transformer.use_additional_conditions:
        here = of_size(*pixels(pipeline, pipeline.transformer))
        rows = {name: here[name].repeat(len(prompts), 1) for name in ("resolution", "aspect_ratio")}
        out |= {name: (row, row) for name, row in rows.items()}
    return out


RECORD = Record(PixArt, {"PixArtSigmaPipeline": encode, "PixArtAlphaPipeline": encode})
