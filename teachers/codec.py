"""Between images and the latents a latent model works on: an autoencoder, in float32 whatever else runs in half precision."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Codec:
    """Latents are (z - ``shift``) ``scale`` of a diffusers autoencoder's z: unit variance, which the diffusion model was made on.

    ``source``: where the autoencoder lies, {"folder" (or hub id), "part", "class"}. A model's file holds this and not the
    autoencoder, which is then read when it is first needed (``vae`` None).
    """

    vae: Any = None  # AutoencoderKL, VQModel, AutoencoderTiny, ...
    scale: float = 1.0
    shift: float = 0.0
    source: dict = field(default_factory=dict)

    @cached_property
    def network(self) -> Any:
        """The autoencoder. ValueError where its source is gone."""
        if self.vae is not None:
            return self.vae
        from teachers.pipeline import fetch, part_of

        where = self.source["folder"]
        vae = part_of(fetch(where), self.source["part"], self.source["class"], where)
        return vae.eval().requires_grad_(False)

    def decode(self, latents: Tensor) -> Tensor:
        """Images [B, C, H, W] in [-1, 1]."""
        with torch.inference_mode(), torch.autocast(latents.device.type, enabled=False):
            return self._on(latents).decode(latents.float() / self.scale + self.shift).sample

    def encode(self, images: Tensor) -> Tensor:
        """Latents of images in [-1, 1]; the mean, where the encoder gives a distribution."""
        with torch.inference_mode(), torch.autocast(images.device.type, enabled=False):
            out = self._on(images).encode(images.float())
        z = out.latent_dist.mean if hasattr(out, "latent_dist") else out.latents
        return (z - self.shift) * self.scale

    def to(self, device: torch.device) -> Codec:
        if self.vae is not None:
            self.vae.to(device)
        return self

    def describe(self) -> dict:
        """The codec as plain JSON data; `from_description` turns it back."""
        return {"scale": self.scale, "shift": self.shift, **self.source}

    @classmethod
    def from_description(cls, description: dict, beside: Path) -> Codec:
        """ValueError where the folder of its autoencoder is gone; one of the hub is looked for when it is first needed. A folder that
        begins with "./" lies ``beside`` the file of the model."""
        source = {k: description[k] for k in ("folder", "part", "class")}
        if source["folder"].startswith("./"):
            source["folder"] = str((beside / source["folder"]).resolve())
        folder = Path(source["folder"])
        if folder.is_absolute() and not (folder / source["part"]).is_dir():
            raise ValueError(f"{folder}: there is no {source['part']} in it any more, the autoencoder of this model's latents")
        return cls(None, description["scale"], description["shift"], source)

    def _on(self, x: Tensor) -> Any:
        return self.network.to(x.device) if isinstance(self.network, torch.nn.Module) else self.network
