"""The class `Record`: what differs between the classes of diffusers networks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Encoded = dict[str, tuple[Tensor, Tensor]]  # condition -> rows [P, ...] of the prompts, and of the empty prompt [1 or P, ...]
Encode = Callable[[Any, list[str]], Encoded]  # of a pipeline and its prompts


def shift_of(config: Any, tokens: int) -> dict[str, float]:
    """Return the shift of a number of tokens, linear between those of the base and the largest number: {} without dynamic shift."""
    if not config.get("use_dynamic_shifting"):
        return {}
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    base, most = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    return {"mu": base + (most - base) * (tokens - low) / (high - low)}


def by_count(config: Any, steps: int, shape: tuple[int, ...]) -> dict:
    """Return the step count alone, and the shift of tokens of 2x2 latents."""
    return {"num_inference_steps": steps, **shift_of(config, math.prod(shape[1:]) // 4)}


def by_sigmas(config: Any, steps: int, shape: tuple[int, ...]) -> dict:
    """Return the noise levels 1, 1 - 1/N, ..., 1/N, and the shift of tokens of 2x2 latents."""
    levels = torch.linspace(1, 1 / steps, steps, dtype=torch.float64).tolist()
    return {"sigmas": levels, **shift_of(config, math.prod(shape[1:]) // 4)}


@dataclass(frozen=True)
class Record:
    """Describe one class of diffusers network.

    ``call``: an `Adapter`, one network call in the loop of the pipeline. Its forward(x [B, C, H, W], t [B], **cond) takes latents and
    the scheduler's timestep, and returns what the pipeline passes to ``scheduler.step``: packing, reversed times and signs are inside.
    ``encoders``: {class of a pipeline: function that encodes its prompts}; {} for a network conditioned on labels. All prompts of a
    pipeline have rows of one shape. ``packing``: latents of ``in_channels / packing^2`` channels are given to the network as squares of
    this side. ``side``: of the latents, for a class whose configuration has no ``sample_size``. ``guidance``: the pipeline's default of
    a guidance scale that is embedded; None for two calls. ``unguided``: the ``guidance_scale`` of the pipeline that means none.
    ``grid``: what the pipeline passes to ``scheduler.set_timesteps``, of the scheduler's configuration, steps and shape of one sample.
    """

    call: Callable[..., nn.Module]
    encoders: Mapping[str, Encode] = field(default_factory=dict)
    packing: int = 1
    side: int | None = None
    guidance: float | None = None
    unguided: float = 1.0
    grid: Callable[[Any, int, tuple[int, ...]], dict] = by_count


def device(pipeline: Any) -> torch.device:
    """Return where the text encoders of a pipeline are."""
    return pipeline.text_encoder.device


def pixels(pipeline: Any, net: Any) -> tuple[int, int]:
    """Return the height and the width of a pipeline's images."""
    size = net.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    return pipeline.vae_scale_factor * height, pipeline.vae_scale_factor * width


def padded(rows: list[Tensor], length: int) -> tuple[Tensor, Tensor]:
    """Return rows [L_i, D] of different lengths as one tensor [P, length, D] with zeros behind them, and its mask [P, length]."""
    text = torch.stack([torch.cat([row, row.new_zeros(length - len(row), row.shape[1])]) for row in rows])
    return text, torch.arange(length) < torch.tensor([len(row) for row in rows])[:, None]


def default(pipeline: Any, name: str) -> Any:
    """Return the default of an argument of the pipeline's call."""
    import inspect

    return inspect.signature(type(pipeline).__call__).parameters[name].default
