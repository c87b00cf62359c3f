"""Check that a model is a denoiser and is declared correctly; optionally measure the likelihood of data.

    python recipes/probe.py --model SPEC --data DATA
    python recipes/probe.py --model SPEC --data DATA --nll

The first command prints errors, biases and skill per noise level, and which declarations of prediction, time, data range and discrete
table fit best. It ends with exit code 2 if the model is not a denoiser as declared. --nll adds the negative log-likelihood, in bits per
dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from recipes.common.accepted import SEED, THREADS, Checked
from recipes.common.cli import flag, flags_first, machine_flag, model_flag, one_line_errors, parse
from recipes.common.flags import TOPICS

LEGEND = """error: E|D - x0|^2 per pixel. bound: of the best linear denoiser. allowed: the largest error that passes. bias, slope: best is 0.
spread, reach: of D over those of the data. skill: 1 is the bound's. lost: part of the skill, best is 0. misfit: lower fits better."""
PRESETS: dict[str, dict] = {"default": {}, "smoke": {}}  # nothing here takes long


@dataclass(frozen=True)
class Config(Checked):
    """What is probed, and on which data."""

    TOPICS: ClassVar = TOPICS
    preset: str = flag("default", "both are the same here", choices=PRESETS)
    model: str = model_flag("digits", "the model (accepted: --help teacher)")
    data: str = model_flag("digits", "the data (accepted: --help data)")
    nll: bool = flag(False, "also measure the negative log-likelihood of the data")
    seed: int = machine_flag(0, "seed of all random numbers", **SEED)
    threads: int = machine_flag(0, "CPU threads; 0 for torch's default", short=False, **THREADS)


flags_first(__name__, Config, __doc__, PRESETS)

import torch

import teachers
from distill.likelihood import bits, bound, flow
from recipes.common.checks import check_match, conditioned, probed
from recipes.data import sets as datasets
from recipes.data.sets import Data
from teachers import Teacher


def likelihood_lines(teacher: Teacher, data: Data, seed: int, images: int = 128) -> list[str]:
    """Return -log2 p in bits per dimension, with standard errors, by the variational bound and by the probability flow.

    ``images``: the number of samples, drawn at random. For the flow, pixels are dequantised with uniform noise of their bin width
    2 / 255. For the bound, the decoder is a probability over their 256 values. Latents have a density. Raises ValueError for a latent
    model with image data.
    """
    if teacher.codec is not None and data.latents is None:
        raise ValueError(f"the teacher works on latents, {data.name} holds images: recipes/latents.py makes latents of them")
    rng = torch.Generator().manual_seed(seed)
    index = torch.randperm(len(data.images), generator=rng)[:images]
    x0, pixels = data.x0(index), data.latents is None
    cond: dict[str, Any] = teacher.condition(None if data.labels is None else data.labels[index])
    dequantised = x0 + (torch.rand(x0.shape, generator=rng) - 0.5) * (2 / 255) if pixels else x0
    terms = bound(teacher.denoiser, x0, rng, levels=48, values=256 if pixels else None, **cond)
    density = -flow(teacher.denoiser, dequantised, rng, steps=16, **cond)

    def line(what: str, nats: torch.Tensor, width: float = 1.0) -> str:
        per_sample = bits(nats, x0[0].numel(), width)
        return f"  {what:<18} {float(per_sample.mean()):8.4f} +- {float(per_sample.std()) / len(per_sample) ** 0.5:.4f}"

    return [
        f"{'-log2 p' if pixels else '-log2 density'} of {len(x0)} samples of {data.name}, bits per dimension",
        line("variational bound", terms.total),
        *(line(name, nats) for name, nats in vars(terms).items()),
        line("probability flow", density, 2 / 255 if pixels else 1.0),
    ]


def main(argv: list[str] | None = None) -> None:
    with one_line_errors():
        config = parse(Config, __doc__, PRESETS, argv)
        if config.threads:
            torch.set_num_threads(config.threads)
        model, data = conditioned(teachers.load(config.model), datasets.load(config.data))
        data = check_match(model, data)
        found = probed(model, data, config.seed)
        print("\n".join(found.lines()[:-1]))
        print(LEGEND)
        if not found.ok:
            raise ValueError(f"{config.model}: {found.verdict}")
        print(f"{config.model}: {found.verdict}")
        if config.nll:
            print("\n".join(likelihood_lines(model, data, config.seed)))


if __name__ == "__main__":
    main()
