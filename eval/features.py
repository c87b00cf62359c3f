"""Feature extractors by name, and references: what uint8 images become before any metric sees them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from tqdm import tqdm

from eval import fidelity
from eval.metrics import Features


@dataclass(frozen=True)
class Extractor:
    """uint8 images [B, C, H, W] -> `Features` on the CPU in float32, autocast and TF32 off."""

    name: str
    module: FeatureExtractorBase
    layers: dict[str, str]

    @classmethod
    def create(cls, name: str, weights: str | None = None) -> Extractor:
        """ValueError for an unknown name, or where the weights can be had neither from a file nor from the network."""
        if name not in fidelity.extractor_names():
            raise ValueError(f"unknown features {name!r}: accepted are {', '.join(fidelity.extractor_names())}")
        if weights is not None and not Path(weights).is_file():
            raise ValueError(f"{weights}: there is no such file of extractor weights")
        try:
            module = fidelity.create(name, weights)
        except OSError as error:
            raise ValueError(f"features {name!r} need their weights ({error}): name a file with --features-weights") from None
        return cls(name, module, fidelity.layers(name))

    def to(self, device: torch.device) -> Extractor:
        self.module.to(device)
        return self

    def __call__(self, images: Tensor) -> Features:
        if images.shape[1] == 1:
            images = images.expand(-1, 3, -1, -1)
        with fidelity.float32_exactly(), torch.inference_mode():
            out = self.module.convert_features_tuple_to_dict(self.module(images))
        out = {name: value.float().cpu() for name, value in out.items()}
        return Features(out[self.layers["fid"]], out.get(self.layers["isc"]))

    def all(self, images: Tensor, chunk: int, device: torch.device) -> Tensor:
        """Features for FID of any number of images [N, D], in whole chunks: the last is filled up, and cut again."""
        parts = []
        for part in tqdm(images.split(chunk), desc=f"{self.name} features", leave=False, disable=None):
            filled = torch.cat([part, part[-1:].expand(chunk - len(part), *part.shape[1:])])
            parts.append(self(filled.to(device)).fid[: len(part)])
        return torch.cat(parts)

    @property
    def fingerprint(self) -> str:
        """sha256 of the extractor's weights."""
        digest = hashlib.sha256()
        for name, value in sorted(self.module.state_dict().items()):
            digest.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()


def fingerprint(images: Tensor) -> str:
    """sha256 of uint8 images."""
    return hashlib.sha256(images.contiguous().numpy().tobytes()).hexdigest()
