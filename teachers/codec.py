"""Between images and the latents a latent model works on: an autoencoder, in float32 whatever else runs in half precision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Codec:
    """Latents are (z - ``shift``) ``scale`` of a diffusers autoencoder's z: unit variance, which the diffusion model was made on."""

    vae: Any  # AutoencoderKL, VQModel, AutoencoderTiny, ...
    scale: float = 1.0
    shift: float = 0.0

    def decode(self, latents: Tensor) -> Tensor:
        """Images [B, C, H, W] in [-1, 1]."""
        with torch.inference_mode(), torch.autocast(latents.device.type, enabled=False):
            return self.vae.decode(latents.float() / self.scale + self.shift).sample

    def encode(self, images: Tensor) -> Tensor:
        """Latents of images in [-1, 1]; the mean, where the encoder gives a distribution."""
        with torch.inference_mode(), torch.autocast(images.device.type, enabled=False):
            out = self.vae.encode(images.float())
        z = out.latent_dist.mean if hasattr(out, "latent_dist") else out.latents
        return (z - self.shift) * self.scale

    def to(self, device: torch.device) -> Codec:
        self.vae.to(device)
        return self
