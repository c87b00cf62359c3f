"""Train a diffusers autoencoder with the loop of every other method: reconstruction and KL of the latents (2112.10752, section 3.1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distill.denoiser import Denoiser
from distill.distance import l2
from distill.rng import Rng
from distill.schedule import Flow


class Autoencoding(nn.Module):
    """Call an AutoencoderKL as one module, (x [B, C, H, W], t, noise) -> (reconstruction, KL [B]); without noise the reconstruction."""

    def __init__(self, vae: Any):
        super().__init__()
        self.vae = vae

    def forward(self, x: Tensor, t: Tensor | None = None, noise: Tensor | None = None) -> Any:
        posterior = self.vae.encode(x).latent_dist
        if noise is None:
            return self.vae.decode(posterior.mean).sample
        latents = posterior.mean + posterior.std * noise.reshape(posterior.mean.shape)
        return self.vae.decode(latents).sample, posterior.kl()


@dataclass(frozen=True)
class Autoencoder:
    """Return |decode(z) - x|^2 per pixel + ``kl`` KL(z | N(0, 1)), [B], with z drawn from the encoder. x has no noise and t no meaning.

    ``latents``: numbers in the latents of one sample.
    """

    latents: int
    kl: float = 1e-5

    def __call__(self, student: Denoiser, x0: Tensor, *, rng: Rng, progress: float, **cond: Any) -> Tensor:
        noise = rng.normal(x0.new_empty(len(x0), self.latents))
        made, kl = student.net(x0, None, noise)
        return l2(made, x0) + self.kl * kl


def as_student(vae: Any) -> Denoiser:
    """Return an autoencoder in the form that `distill.train.train` takes."""
    return Denoiser(Autoencoding(vae), Flow(), "x0")


@torch.no_grad()
def set_scale(vae: Any, images: Tensor) -> None:
    """Set ``scaling_factor`` so that the mean latents of images [N, C, H, W] in [-1, 1] have standard deviation 1."""
    latents = torch.cat([vae.encode(part).latent_dist.mean for part in images.split(256)])
    vae.register_to_config(scaling_factor=1 / float(latents.std()))
