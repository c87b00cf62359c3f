"""The autoencoder of a latent model, which maps between images and latents. It always runs in float32."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from teachers.hub import component, fetch


@dataclass(frozen=True)
class Codec:
    """Map between images and latents. Latents are (z - ``shift``) ``scale`` of a diffusers autoencoder's z, near unit variance.

    ``vae``: the autoencoder (AutoencoderKL, VQModel, AutoencoderTiny, ...); None to load it from ``source`` when it is first used.
    ``source``: where it is, {"folder" (or hub id), "part", "class"}, and "variant" where its weights have one. A model's file holds
    this and not the autoencoder.
    """

    vae: Any = None
    scale: float = 1.0
    shift: float = 0.0
    source: dict = field(default_factory=dict)

    @cached_property
    def network(self) -> Any:
        """The autoencoder. A file that names one on the hub causes no download. Raises ValueError if it is not at its source."""
        if self.vae is not None:
            return self.vae
        where, variant = self.source["folder"], self.source.get("variant")
        folder = fetch(where, variant, download=False)
        vae = component(folder, self.source["part"], self.source["class"], where, variant)
        return vae.eval().requires_grad_(False)

    def decode(self, latents: Tensor) -> Tensor:
        """Return images [B, C, H, W] in [-1, 1]."""
        with torch.inference_mode(), torch.autocast(latents.device.type, enabled=False):
            return self._on(latents).decode(latents.float() / self.scale + self.shift).sample

    def encode(self, images: Tensor) -> Tensor:
        """Return the latents of images in [-1, 1]; the mean if the encoder returns a distribution."""
        with torch.inference_mode(), torch.autocast(images.device.type, enabled=False):
            out = self._on(images).encode(images.float())
        z = out.latent_dist.mean if hasattr(out, "latent_dist") else out.latents
        return (z - self.shift) * self.scale

    def to(self, device: torch.device) -> Codec:
        """Move the autoencoder, if it is loaded, and return self."""
        if self.vae is not None:
            self.vae.to(device)
        return self

    def describe(self) -> dict:
        """Return the codec as JSON data. `from_description` is the inverse."""
        return {"scale": self.scale, "shift": self.shift, **self.source}

    @classmethod
    def from_description(cls, description: dict, beside: Path) -> Codec:
        """Build a codec from the result of `describe`. ``beside``: the folder of the model's file; "./" paths are relative to it.

        Raises ValueError if the autoencoder's folder is gone. A hub id is only looked up when the autoencoder is first used.
        """
        source = {k: str(description[k]) for k in ("folder", "part", "class", "variant") if description.get(k) is not None}
        scale, shift = (float(description[k]) for k in ("scale", "shift"))
        if not (math.isfinite(scale) and math.isfinite(shift) and scale) or not source["class"].startswith(
            ("Autoencoder", "VQModel")
        ):
            raise ValueError(f"no autoencoder of latents: scale {scale:g}, shift {shift:g}, class {source['class']}")
        if source["folder"].startswith("./"):
            source["folder"] = str((beside / source["folder"]).resolve())
        folder = Path(source["folder"])
        if folder.is_absolute() and not (folder / source["part"]).is_dir():
            raise ValueError(f"{folder}: there is no {source['part']} in it any more, the autoencoder of this model's latents")
        return cls(None, scale, shift, source)

    def _on(self, x: Tensor) -> Any:
        return self.network.to(x.device) if isinstance(self.network, torch.nn.Module) else self.network
