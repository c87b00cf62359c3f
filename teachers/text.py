"""Text-to-image pipelines: a list of prompts, encoded once by the pipeline itself, makes a class-conditional teacher of P classes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

UNUSED = ("safety_checker", "feature_extractor", "image_encoder")  # parts of a pipeline that are never loaded
BATCH = 16  # prompts encoded at once
Encoder = Callable[[Any, list[str]], dict[str, tuple[Tensor, Tensor]]]  # pipeline, prompts -> name -> rows [P, ...] and of none


def _stable_diffusion(pipeline: Any, prompts: list[str]) -> dict[str, tuple[Tensor, Tensor]]:
    return {"text": pipeline.encode_prompt(prompts, torch.device("cpu"), 1, True)}


def _pixart(pipeline: Any, prompts: list[str]) -> dict[str, tuple[Tensor, Tensor]]:
    text, mask, null, null_mask = pipeline.encode_prompt(prompts, device=torch.device("cpu"))
    return {"text": (text, null), "mask": (mask, null_mask)}


def _pooled(pipeline: Any, prompts: list[str]) -> dict[str, tuple[Tensor, Tensor]]:
    text, null, pooled, null_pooled = pipeline.encode_prompt(prompts, None, None, device=torch.device("cpu"))
    return {"text": (text, null), "pooled": (pooled, null_pooled)}


def _xl(pipeline: Any, prompts: list[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """With the micro-conditioning of whole images: original size, no crop, target size."""
    text, null, pooled, null_pooled = pipeline.encode_prompt(prompts, device=torch.device("cpu"))
    size = pipeline.unet.config.sample_size
    height, width = (pipeline.vae_scale_factor * s for s in ((size, size) if isinstance(size, int) else size))
    ids = torch.tensor([height, width, 0, 0, height, width], dtype=torch.float32).repeat(len(prompts), 1)
    return {"text": (text, null), "pooled": (pooled, null_pooled), "time_ids": (ids, ids)}


ENCODERS: dict[str, Encoder] = {
    "StableDiffusionPipeline": _stable_diffusion,
    "StableDiffusionXLPipeline": _xl,
    "StableDiffusion3Pipeline": _pooled,
    "PixArtSigmaPipeline": _pixart,
    "PixArtAlphaPipeline": _pixart,
}


def read_prompts(path: str) -> list[str]:
    """The lines of a text file that are not empty. ValueError where there are none."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"prompts={path}: not a text file that can be read ({type(error).__name__})") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"prompts={path}: the file is empty; one prompt a line is accepted")
    return prompts


@torch.no_grad()
def table_of(name: str, folder: Path, parts: dict[str, Any], prompts: list[str]) -> dict[str, Tensor]:
    """What the network is told for each prompt, {name: [P + 1, ...]}; the last row is what the pipeline itself tells it for none.

    ``parts``: the components that are loaded already. ValueError where an encoder is missing.
    """
    import diffusers

    try:
        import transformers  # noqa: F401
    except ImportError:
        raise ValueError(f"{folder}: text pipelines need the package transformers: pip install transformers") from None
    cls: Any = getattr(diffusers, name)
    absent = {k: None for k in UNUSED if k in inspect.signature(cls.__init__).parameters}
    try:
        options = {"trust_remote_code": False, "use_safetensors": True, **parts, **absent}
        pipeline = cls.from_pretrained(folder, local_files_only=True, **options)
    except Exception as error:  # the libraries raise many kinds; all mean that a text encoder cannot be had
        raise ValueError(f"{folder}: a text encoder or tokenizer cannot be read ({first_line(error)})") from None
    rows = [ENCODERS[name](pipeline, prompts[i : i + BATCH]) for i in range(0, len(prompts), BATCH)]
    return {key: torch.cat([*(part[key][0] for part in rows), rows[0][key][1][:1]]) for key in rows[0]}


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
