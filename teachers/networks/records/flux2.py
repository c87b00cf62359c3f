"""FLUX.2 (dev, klein): one latent is a token, time goes from 0 to 1, positions have four axes."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from teachers.networks.adapters import Adapter
from teachers.networks.records.record import Encoded, Record, by_sigmas, device


class Flux2(Adapter):
    """Call a Flux2Transformer2DModel with ``text`` [B, L, D]. ``guidance``: the embedded scale, if there is one."""

    def __init__(self, net: nn.Module, guidance: float | None = None):
        super().__init__(net)
        self.guidance = guidance

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        one, (height, width) = torch.arange(1), map(torch.arange, x.shape[2:])
        ids = {
            "txt_ids": torch.cartesian_prod(one, one, one, torch.arange(text.shape[1])).to(x.device),
            "img_ids": torch.cartesian_prod(one, height, width, one).to(x.device),
        }
        scale = None if self.guidance is None else torch.full_like(t, self.guidance)
        tokens = x.flatten(2).transpose(1, 2)
        options = {"timestep": t / 1000, "guidance": scale, "return_dict": False}
        output = self.net(tokens, encoder_hidden_states=text, **ids, **options)[0]
        return output.transpose(1, 2).unflatten(2, x.shape[2:])


def encode(pipeline: Any, prompts: list[str]) -> Encoded:
    text, _ = pipeline.encode_prompt([*prompts, ""], device(pipeline))
    return {"text": (text[:-1], text[-1:])}


def grid(config: Any, steps: int, shape: tuple[int, ...]) -> dict:
    """Return levels with the shift that diffusers has for this number of tokens and steps."""
    from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

    return by_sigmas(config, steps, shape) | {"mu": compute_empirical_mu(math.prod(shape[1:]), steps)}


RECORD = Record(Flux2, {"Flux2Pipeline": encode, "Flux2KleinPipeline": encode}, side=64, guidance=4.0, grid=grid)
