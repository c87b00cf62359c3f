"""The autoencoder of a latent model, which maps between images and latents. It always runs in float32."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from distill.bits import pixels_to_bits, pixels_to_tokens, to_pixels
from teachers.hollow import is_hollow
from teachers.hub import component, fetch

Numbers = float | list[float]  # for all channels, or for each
SCALE_KEYS = {"AutoencoderDC": "encoder_block_out_channels", "AutoencoderKLQwenImage": "dim_mult"}  # one entry per resolution

# how an autoencoder decodes: a batch at once, one image after the other, or also tile by tile, whose edges are blended
DECODING: dict[str, tuple[str, ...]] = {"plain": (), "sliced": ("use_slicing",), "tiled": ("use_slicing", "use_tiling")}


@dataclass(frozen=True)
class Codec:
    """Map between images and latents. Latents are (z - ``shift``) ``scale`` of a diffusers autoencoder's z, near unit variance.

    Both are one number, or one per channel. The z of an AutoencoderKLFlux2 has squares of 2x2 as channels, as its networks see it.
    ``vae``: the autoencoder (AutoencoderKL, VQModel, AutoencoderTiny, ...); None to load it from ``source`` when it is first used.
    ``source``: where it is, {"folder" (or hub id), "part", "class"}, and "variant" where its weights have one; or {"bits": n} for
    images as bits (`Bits`). A model's file holds this and not the autoencoder. ``how``: a value of `DECODING`.
    """

    vae: Any = None
    scale: Numbers = 1.0
    shift: Numbers = 0.0
    source: dict = field(default_factory=dict)
    how: str = "plain"

    @cached_property
    def network(self) -> Any:
        """The autoencoder. A file that names one on the hub causes no download. Raises ValueError if it is not at its source."""
        if self.vae is not None:
            return self.vae
        if "bits" in self.source:
            return Bits(self.source["bits"])
        where, variant = self.source["folder"], self.source.get("variant")
        folder = fetch(where, variant, download=False)
        vae = component(folder, self.source["part"], self.source["class"], where, variant)
        return vae.eval().requires_grad_(False)

    def decoding(self, how: str) -> Codec:
        """Return the codec that decodes by ``how``, with the same autoencoder; itself if it does so already.

        Raises ValueError for an autoencoder that does not support it.
        """
        if how == self.how:
            return self
        if not all(hasattr(self.network, part) for part in DECODING[how]):
            raise ValueError(f"--decode {how}: an autoencoder of class {type(self.network).__name__} accepts plain alone")
        return replace(self, vae=self.network, how=how)

    def decode(self, latents: Tensor) -> Tensor:
        """Return images [B, C, H, W] in [-1, 1]."""
        network = self._on(latents)
        for part in DECODING["tiled"]:
            if hasattr(network, part):
                setattr(network, part, part in DECODING[self.how])
        with torch.inference_mode(), _full_precision(latents):
            z = latents.float()
            z = z / _shaped(self.scale, z) + _shaped(self.shift, z)
            if _has_frames(network):
                return network.decode(z.unsqueeze(2)).sample[:, :, 0]
            return network.decode(pixel_shuffle(z, 2) if _is_patched(network) else z).sample

    def encode(self, images: Tensor) -> Tensor:
        """Return the latents of images in [-1, 1]; the mean if the encoder returns a distribution."""
        with torch.inference_mode(), _full_precision(images):
            vae = self._on(images)
            out = vae.encode(images.float().unsqueeze(2) if _has_frames(vae) else images.float())
        z = out.latent_dist.mean if hasattr(out, "latent_dist") else out.latent if hasattr(out, "latent") else out.latents
        z = z[:, :, 0] if _has_frames(vae) else pixel_unshuffle(z, 2) if _is_patched(vae) else z
        return (z - _shaped(self.shift, z)) * _shaped(self.scale, z)

    def to(self, device: torch.device) -> Codec:
        """Move the autoencoder, if it is loaded, and return self."""
        if "network" in self.__dict__ and isinstance(self.network, torch.nn.Module):
            self.network.to(device)
        return self

    def describe(self) -> dict:
        """Return the codec as JSON data. `from_description` is the inverse."""
        return {"scale": self.scale, "shift": self.shift, **self.source}

    @classmethod
    def from_description(cls, description: dict, beside: Path) -> Codec:
        """Build a codec from the result of `describe`. ``beside``: the folder of the model's file; "./" paths are relative to it.

        Raises ValueError if the autoencoder's folder is gone. A hub id is only looked up when the autoencoder is first used.
        """
        if "bits" in description:
            return cls.of_bits(description["bits"])
        source = {k: str(description[k]) for k in ("folder", "part", "class", "variant") if description.get(k) is not None}
        scale, shift = (_numbers(description[k]) for k in ("scale", "shift"))
        (scales, shifts) = (value if isinstance(value, list) else [value] for value in (scale, shift))
        fits = all(map(math.isfinite, (*scales, *shifts))) and all(scales)
        if not fits or not source["class"].startswith(("Autoencoder", "VQModel")):
            raise ValueError(f"no autoencoder of latents: scale {scale}, shift {shift}, class {source['class']}")
        if source["folder"].startswith("./"):
            source["folder"] = str((beside / source["folder"]).resolve())
        folder = Path(source["folder"])
        if folder.is_absolute() and not (folder / source["part"]).is_dir():
            raise ValueError(f"{folder}: there is no {source['part']} in it any more, the autoencoder of this model's latents")
        return cls(None, scale, shift, source)

    @classmethod
    def of_bits(cls, bits: int) -> Codec:
        """Return the codec of images of 2^``bits`` levels as bits. Raises ValueError unless ``bits`` is 1 to 8."""
        if type(bits) is not int or not 1 <= bits <= 8:
            raise ValueError(f"bits are {str(bits)[:40]!r}; accepted are 1 to 8")
        return cls(source={"bits": bits})

    def _on(self, x: Tensor) -> Any:
        return self.network.to(x.device) if isinstance(self.network, torch.nn.Module) else self.network


@dataclass
class Decoded:
    """Hold what an autoencoder returns, under the names of diffusers."""

    sample: Tensor

    @property
    def latents(self) -> Tensor:
        return self.sample


class Bits(nn.Module):
    """Decode the bits of images, channels near +-1, to the levels that their signs mean (`distill.bits`)."""

    def __init__(self, bits: int):
        super().__init__()
        self.bits = bits
        self.register_buffer("count", torch.tensor(bits))  # of the sha256 of models

    def encode(self, images: Tensor) -> Decoded:
        return Decoded(pixels_to_bits(images, self.bits))

    def decode(self, values: Tensor) -> Decoded:
        return Decoded(to_pixels(pixels_to_tokens(values, self.bits), 2**self.bits))


def statistics(vae: Any) -> tuple[Numbers, Numbers]:
    """Return scale and shift of a diffusers autoencoder, as its pipelines have them.

    They are the batch norm's of Flux 2, the mean and deviation per channel of Qwen-Image, or two numbers.
    """
    config = vae.config
    scale, shift = config.get("scaling_factor") or 1.0, config.get("shift_factor") or 0.0
    if _is_patched(vae) and not is_hollow(vae):
        deviation = (vae.bn.running_var.double() + config["batch_norm_eps"]).sqrt()
        return (1 / deviation).tolist(), vae.bn.running_mean.double().tolist()
    if config.get("latents_mean") is not None:
        return [scale / deviation for deviation in config["latents_std"]], [*map(float, config["latents_mean"])]
    return scale, shift


def latent_channels(vae: Any) -> int:
    """Return the channels of the latents of a diffusers autoencoder."""
    channels = vae.config["z_dim" if _has_frames(vae) else "latent_channels"]
    return 4 * channels if _is_patched(vae) else channels


def downsampling(vae: Any) -> int:
    """Return by how much smaller than the image the latents of a diffusers autoencoder are along each side."""
    resolutions = len(vae.config[SCALE_KEYS.get(type(vae).__name__, "block_out_channels")])
    return 2 ** (resolutions if _is_patched(vae) else resolutions - 1)


def _full_precision(x: Tensor) -> torch.autocast:
    """Return a context without autocast on the device of x; the meta device has none."""
    return torch.autocast("cpu" if x.device.type == "meta" else x.device.type, enabled=False)


def _has_frames(vae: Any) -> bool:
    """Return whether an autoencoder of videos encodes images as [B, C, 1, H, W]."""
    return type(vae).__name__ == "AutoencoderKLQwenImage"


def _is_patched(vae: Any) -> bool:
    """Return whether networks see squares of 2x2 of an autoencoder's latents as channels, normalised by its batch norm."""
    return type(vae).__name__ == "AutoencoderKLFlux2"


def _numbers(value: Any) -> Numbers:
    return [*map(float, value)] if isinstance(value, list) else float(value)


def _shaped(value: Numbers, x: Tensor) -> Tensor | float:
    """Return a value of `Numbers` in a form to be combined with x [B, C, H, W]."""
    return x.new_tensor(value).view(-1, 1, 1) if isinstance(value, list) else value
