"""Images of masked diffusion models by index: image i of a seed is the same for every batch that it is generated in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from distill.images import to_uint8
from distill.masked import SAMPLERS
from eval.generate import Noise, initial_noise
from teachers.masked import MaskedModel

LARGEST = 1 - 2**-24  # below 1 in float32


def uniform_of(noise: Noise, like: Tensor) -> Tensor:
    """Return the next uniform numbers of each index, in (0, 1): the normal distribution function of its next normal numbers."""
    return torch.special.ndtr(noise.fresh(like)).clamp(max=LARGEST)


def token_images(
    model: MaskedModel,
    steps: int,
    sampler: str,
    indices: Iterable[range],
    seed: int,
    device: torch.device,
    classes_in_turn: bool = False,
) -> Iterator[Tensor]:
    """Generate the uint8 images [n, C, H, W] of each range of ``indices``. Labels are drawn, or i mod classes in turn.

    ``sampler``: a key of `distill.masked.SAMPLERS`.
    """
    sample, grid = SAMPLERS[sampler]
    for part in indices:
        noise = initial_noise(part, (1,), model.classes, seed, device)
        if classes_in_turn and model.classes is not None:
            noise.labels = torch.tensor(list(part), device=device) % model.classes
        with torch.inference_mode():
            tokens = sample(
                model.denoiser, model.masks(len(part), device), grid(steps),
                lambda like, noise=noise: uniform_of(noise, like), **model.condition(noise.labels),
            )  # fmt: skip
        yield to_uint8(model.decode(tokens))
