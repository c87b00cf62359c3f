"""What stands before every distillation: whether the teacher is a denoiser and is read rightly (`teachers.probe`)."""

from __future__ import annotations

from typing import Any

import torch

import teachers
from distill.likelihood import bits, bound, flow
from recipes.data import Data
from recipes.matching import check_match
from teachers import Teacher
from teachers.probe import Probe, probe

QUICK: dict[str, Any] = {"levels": 6, "samples": 16}
IMAGES = 1024


def probed(teacher: Teacher, data: Data, seed: int, **how: Any) -> Probe:
    """The probe on some images of the data, latents among them."""
    index = torch.randperm(len(data.images), generator=torch.Generator().manual_seed(seed))[:IMAGES]
    labels = None if data.labels is None else data.labels[index]
    return probe(teacher, data.x0(index), labels, seed=seed, encoded=data.latents is not None, **how)


def check_denoiser(teacher: Teacher, data: Data, seed: int, force: bool) -> str | None:
    """A warning where the teacher is no denoiser as it is read: under ``force``, and for a distilled model (one with a `sampler`).

    A student jumps: it answers with a sample that x_t may have come from, not with their mean, and from it a ladder goes on all the
    same. ValueError for any other.
    """
    found = probed(teacher, data, seed, **QUICK)
    if found.ok:
        return None
    if teacher.sampler:
        return f"the teacher is a student of {teacher.sampler['name']} steps and not E[x0 | x_t]: {found.verdict}"
    if force:
        return f"--force: {found.verdict}"
    raise ValueError(f"the teacher is not what it says it is: {found.verdict}; label it rightly, or --force")


def scored(teacher: Teacher, data: Data, seed: int, images: int = 128) -> list[str]:
    """-log2 p of some images of the data by both of `distill.likelihood`, with standard errors, in bits a dimension.

    Pixels are dequantised for the flow by uniform noise of the width of their bins, 2 / 255, and decoded over their 256 values for the
    bound; latents have a density. ValueError for a latent model of images, whose pixels have neither.
    """
    if teacher.codec is not None and data.latents is None:
        raise ValueError(f"the teacher works on latents, {data.name} holds images: recipes/latents.py makes latents of them")
    rng = torch.Generator().manual_seed(seed)
    index = torch.randperm(len(data.images), generator=rng)[:images]
    x0, pixels = data.x0(index), data.latents is None
    cond: dict[str, Any] = teacher.condition(None if data.labels is None else data.labels[index])
    smeared = x0 + (torch.rand(x0.shape, generator=rng) - 0.5) * (2 / 255) if pixels else x0
    parts = bound(teacher.denoiser, x0, rng, levels=48, values=256 if pixels else None, **cond)
    density = -flow(teacher.denoiser, smeared, rng, steps=16, **cond)
    name = f"{'-log2 p' if pixels else '-log2 density'} of {len(x0)} samples of {data.name}, bits a dimension"

    def line(what: str, nats: torch.Tensor, width: float = 1.0) -> str:
        each = bits(nats, x0[0].numel(), width)
        return f"  {what:<18} {float(each.mean()):8.4f} +- {float(each.std()) / len(each) ** 0.5:.4f}"

    of_bound = [line(what, nats) for what, nats in vars(parts).items()]
    return [
        name,
        line("variational bound", parts.total),
        *of_bound,
        line("probability flow", density, 2 / 255 if pixels else 1.0),
    ]


def examine(to_probe: str | None, to_score: str | None, data: Data, seed: int, threads: int) -> None:
    """Prints the probe of one model and the likelihood of the data under another. ValueError for one that is no denoiser."""
    if threads:
        torch.set_num_threads(threads)
    if to_probe:
        teacher = teachers.load(to_probe)
        found = probed(teacher, check_match(teacher, data), seed)
        print("\n".join(found.lines()[:-1]))
        if not found.ok:
            raise ValueError(f"{to_probe}: {found.verdict}")
        print(f"{to_probe}: {found.verdict}")
    if to_score:
        teacher = teachers.load(to_score)
        print("\n".join(scored(teacher, check_match(teacher, data), seed)))
