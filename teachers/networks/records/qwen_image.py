"""Qwen-Image: squares of 2x2 latents are tokens, and time goes from 0 to 1."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.functional import pixel_unshuffle

from teachers.networks.adapters import Adapter
from teachers.networks.records.flux import pack, unpack
from teachers.networks.records.record import Encoded, Record, by_sigmas, default, device, padded


class QwenImage(Adapter):
    """Call a QwenImageTransformer2DModel with ``text`` [B, L, D] and its ``mask`` [B, L]. Padding common to the batch is cut off."""

    def forward(self, x: Tensor, t: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        longest = int(mask.sum(1).max())
        cond = {"encoder_hidden_states": text[:, :longest], "encoder_hidden_states_mask": mask[:, :longest]}
        shapes = [[(1, x.shape[2] // 2, x.shape[3] // 2)]] * len(x)
        return unpack(self.net(pack(x), timestep=t / 1000, img_shapes=shapes, return_dict=False, **cond)[0], x)

    @staticmethod
    def guided_norm(difference: Tensor) -> Tensor:
        """Return the norm of each token, which guidance keeps, [B, 1, H, W]."""
        norms = pixel_unshuffle(difference, 2).norm(dim=1, keepdim=True)
        return norms.repeat_interleave(2, 2).repeat_interleave(2, 3)


def encode(pipeline: Any, prompts: list[str]) -> Encoded:
    length = default(pipeline, "max_sequence_length")
    rows = [pipeline.encode_prompt(prompt, device(pipeline), max_sequence_length=length)[0][0] for prompt in [*prompts, ""]]
    text, mask = padded(rows, length)
    return {"text": (text[:-1], text[-1:]), "mask": (mask[:-1], mask[-1:])}


RECORD = Record(QwenImage, {"QwenImagePipeline": encode}, packing=2, side=128, grid=by_sigmas)
