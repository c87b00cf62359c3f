"""CLIP of a local folder: the distance of two sets of images, and how well images fit their texts.

    CMMD = 1000 |mean k(x, .) - mean k(y, .)|^2,  k(x, y) = exp(-|x - y|^2 / 200)      (Jayasumana et al. 2401.09603)
    CLIP score = 100 max(cos(image, text), 0)                                          (Hessel et al. 2104.08718)

Both are of features of unit length. ``--features clip:FOLDER`` takes them for FID too, and adds CMMD and CLIP score to the report. The
folder is one that transformers reads with `CLIPModel.from_pretrained`; nothing is downloaded. The CMMD of the paper is that of
openai/clip-vit-large-patch14-336.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, normalize

SIGMA, SCALE = 10.0, 1000.0  # of the paper
ROWS = 1_024  # of a kernel in memory
CAPTIONS = 64  # in a batch of the text encoder


class Clip(nn.Module):
    """Evaluate uint8 images [B, 3, H, W] -> features of unit length [B, D]. `texts` does the same for captions."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: Any, tokenizer: Any, mean: list[float], std: list[float]):
        super().__init__()
        self.model, self.tokenizer = model, tokenizer
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])
        self.encoded: dict[str, Tensor] = {}  # features of the captions of `numbers`, which every cell shares

    @classmethod
    def load(cls, folder: str | Path) -> Clip:
        """Load a folder of transformers with safetensors. Raises ValueError where it holds no CLIP, and without transformers."""
        try:
            from transformers import AutoTokenizer, CLIPModel
        except ImportError:
            raise ValueError("CLIP needs the package transformers: pip install transformers") from None
        try:
            model: Any = CLIPModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"{folder}: no CLIP of transformers ({str(error).splitlines()[0]:.120})") from None
        from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

        return cls(model.eval().requires_grad_(False), tokenizer, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)

    def pixels(self, images: Tensor) -> Tensor:
        """Return what the image encoder takes: the shorter side resized to its size (bicubic), the middle cut out, normalised."""
        side = self.model.config.vision_config.image_size
        height, width = images.shape[2:]
        size = [round(side * n / min(height, width)) for n in (height, width)]
        x = interpolate(images.float(), size, mode="bicubic", antialias=True).round().clamp(0, 255) / 255
        top, left = ((n - side) // 2 for n in size)
        return (x[:, :, top : top + side, left : left + side] - self.mean) / self.std

    def forward(self, images: Tensor) -> Tensor:
        vision = self.model.vision_model(pixel_values=self.pixels(images)).pooler_output
        return normalize(self.model.visual_projection(vision), dim=1)

    @torch.inference_mode()
    def texts(self, captions: list[str]) -> Tensor:
        """Return features of captions [B, D]; what is beyond the tokenizer's length is cut off."""
        tokens = self.tokenizer(captions, padding=True, truncation=True, return_tensors="pt").to(self.mean.device)
        text = self.model.text_model(**tokens).pooler_output
        return normalize(self.model.text_projection(text), dim=1)

    def numbers(self, images: Tensor, real: Tensor | None, captions: list[str]) -> dict[str, float]:
        """Return ``cmmd`` of features [N, D] to those of real images [M, D], and ``clip_score``, the mean over ``captions``, one per image.

        Each of them is left out where there is nothing to compare with.
        """
        found = {} if real is None else {"cmmd": cmmd(images, real)}
        if not captions:
            return found
        new = sorted(set(captions) - self.encoded.keys())
        for i in range(0, len(new), CAPTIONS):
            part = new[i : i + CAPTIONS]
            self.encoded |= dict(zip(part, self.texts(part).float().cpu(), strict=True))
        texts = torch.stack([self.encoded[caption] for caption in captions])
        return found | {"clip_score": clip_scores(images, texts).mean().item()}


def cmmd(generated: Tensor, real: Tensor) -> float:
    """Return the CMMD of features [N, D] and [M, D], of unit length in the paper. It is the biased estimate, as there."""
    x, y = generated.double(), real.double()
    within = sum(_mean_kernel(z, z) for z in (x, y))
    return SCALE * (within - 2 * _mean_kernel(x, y))


def _mean_kernel(x: Tensor, y: Tensor) -> float:
    total = sum(torch.exp(-torch.cdist(part, y).square() / (2 * SIGMA**2)).sum() for part in x.split(ROWS))
    return float(total) / (len(x) * len(y))


def clip_scores(images: Tensor, texts: Tensor) -> Tensor:
    """Return the CLIP score of each image with its text, [N], from features of unit length [N, D]."""
    return 100 * (images * texts).sum(1).clamp(min=0)
