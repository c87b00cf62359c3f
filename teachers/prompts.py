"""Text-to-image pipelines as class-conditional models: each prompt is a class, encoded once by the pipeline itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.reading import read_text
from teachers.hub import assemble, first_line, stock
from teachers.networks.records import ENCODERS as ENCODERS

BATCH = 16  # prompts per call of the text encoders


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
    try:
        import transformers  # noqa: F401
    except ImportError:
        raise ValueError(f"{folder}: text pipelines need the package transformers: pip install transformers") from None
    cls = stock(name)
    try:
        pipeline = assemble(cls, folder, parts, variant)
    except Exception as error:  # the libraries raise many types; all mean that an encoder cannot be loaded
        raise ValueError(f"{folder}: a text encoder or tokenizer cannot be read ({first_line(error)})") from None
    rows = [ENCODERS[name](pipeline, prompts[i : i + BATCH]) for i in range(0, len(prompts), BATCH)]
    return {key: torch.cat([*(part[key][0] for part in rows), rows[0][key][1][:1]]) for key in rows[0]}
