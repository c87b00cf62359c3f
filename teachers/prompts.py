"""Text-to-image pipelines as class-conditional models: each prompt is a class, encoded once by the pipeline itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.reading import read_text
from teachers.hub import assemble, first_line

BATCH = 16  # prompts per call of the text encoders
Encoded = dict[str, tuple[Tensor, Tensor]]  # condition -> embeddings [P, ...] of the prompts, and of the empty prompt


def _stable_diffusion(pipeline: Any, prompts: list[str]) -> Encoded:
    return {"text": pipeline.encode_prompt(prompts, torch.device("cpu"), 1, True)}


def _pixart(pipeline: Any, prompts: list[str]) -> Encoded:
    """Add the size conditioning of PixArt-alpha's 1024 model (2310.00426): resolution in pixels, and height over width."""
    text, mask, null, null_mask = pipeline.encode_prompt(prompts, device=torch.device("cpu"))
    out = {"text": (text, null), "mask": (mask, null_mask)}
    if pipeline.transformer.use_additional_conditions:
        resolution = _pixels(pipeline, pipeline.transformer).repeat(len(prompts), 1)
        ratio = resolution[:, :1] / resolution[:, 1:]
        out |= {"resolution": (resolution, resolution), "aspect_ratio": (ratio, ratio)}
    return out


def _pooled(pipeline: Any, prompts: list[str]) -> Encoded:
    text, null, pooled, null_pooled = pipeline.encode_prompt(prompts, None, None, device=torch.device("cpu"))
    return {"text": (text, null), "pooled": (pooled, null_pooled)}


def _xl(pipeline: Any, prompts: list[str]) -> Encoded:
    """Add SDXL's size conditioning (2307.01952) of uncropped images: original size, crop (0, 0), target size."""
    text, null, pooled, null_pooled = pipeline.encode_prompt(prompts, device=torch.device("cpu"))
    size = _pixels(pipeline, pipeline.unet)
    ids = torch.cat([size, torch.zeros(2), size]).repeat(len(prompts), 1)
    return {"text": (text, null), "pooled": (pooled, null_pooled), "time_ids": (ids, ids)}


def _pixels(pipeline: Any, net: Any) -> Tensor:
    """Return the height and the width of the images, float32 [2]."""
    size = net.config.sample_size
    return pipeline.vae_scale_factor * torch.tensor([size, size] if isinstance(size, int) else size, dtype=torch.float32)


ENCODERS: dict[str, Callable[[Any, list[str]], Encoded]] = {
    "StableDiffusionPipeline": _stable_diffusion,
    "StableDiffusionXLPipeline": _xl,
    "StableDiffusion3Pipeline": _pooled,
    "PixArtSigmaPipeline": _pixart,
    "PixArtAlphaPipeline": _pixart,
}


def read_prompts(path: str) -> list[str]:
    """Return the lines of a text file that are not empty. Raises ValueError if there are none."""
    try:
        lines = read_text(path).splitlines()
    except (OSError, ValueError) as error:
        raise ValueError(f"prompts={path}: not a readable text file ({error})") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"prompts={path}: the file is empty; accepted is one prompt per line")
    return prompts


@torch.no_grad()
def embed(name: str, folder: Path, parts: dict[str, Any], prompts: list[str], variant: str | None = None) -> dict[str, Tensor]:
    """Return the conditions of each prompt, {condition: [P + 1, ...]}; the last row is the pipeline's empty prompt.

    ``name``: the pipeline's class. ``parts``: its components that are loaded already. ``variant``: of the encoders' weights.
    Raises ValueError if an encoder is missing.
    """
    import diffusers

    try:
        import transformers  # noqa: F401
    except ImportError:
        raise ValueError(f"{folder}: text pipelines need the package transformers: pip install transformers") from None
    try:
        pipeline = assemble(getattr(diffusers, name), folder, parts, variant)
    except Exception as error:  # the libraries raise many types; all mean that an encoder cannot be loaded
        raise ValueError(f"{folder}: a text encoder or tokenizer cannot be read ({first_line(error)})") from None
    rows = [ENCODERS[name](pipeline, prompts[i : i + BATCH]) for i in range(0, len(prompts), BATCH)]
    return {key: torch.cat([*(part[key][0] for part in rows), rows[0][key][1][:1]]) for key in rows[0]}
