"""Pairs of noise and the sample that a model makes of it, a coupling that reflow trains on."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill import files
from distill.denoiser import DenoiserLike
from distill.sampling import Sampling
from distill.train import Batches, BatchSplit
from eval.generate import generate, initial_noise
from recipes.data.batches import batches as make_batches
from recipes.data.sets import Data
from teachers import Teacher


@dataclass(frozen=True)
class Pairs(Data):
    """Hold samples x0, floats [N, ...], as ``images``, with ``noise`` [N, ...] and labels: batches have the condition ``noise`` too."""

    noise: Tensor | None = None

    def batches(
        self,
        split: BatchSplit,
        seed: int,
        phase: str,
        device: torch.device,
        condition: Callable[[Tensor | None], dict[str, Tensor]],
        null: int | None = None,
        null_probability: float = 0.0,
    ) -> Batches:
        assert null is None, "label dropout would leave the coupling of a label"

        def of_pair(index: Tensor | None) -> dict[str, Tensor]:
            assert index is not None and self.noise is not None
            return condition(None if self.labels is None else self.labels[index]) | {"noise": self.noise[index]}

        numbered = replace(self, labels=torch.arange(len(self.images)))
        return make_batches(numbered, split, seed, phase, device, of_pair)


def write_pairs(
    path: Path,
    model: Teacher,
    denoiser: DenoiserLike,
    sampling: Sampling,
    steps: int,
    seed: int,
    parts: Iterable[range],
    device: Any,
) -> None:
    """Write noise, samples and drawn labels of the indices ``parts`` as one safetensors file. All pairs are held in memory."""
    times, made = sampling.times_for(denoiser.schedule, steps), []
    for part in parts:
        drawn = initial_noise(part, model.shape, model.classes or None, seed, device)
        x0 = generate(denoiser, sampling, times, drawn, model.condition, device)
        made.append({"noise": drawn.noise, "x0": x0} | ({} if drawn.labels is None else {"labels": drawn.labels}))
    tensors = {name: torch.cat([rows[name].cpu() for rows in made]) for name in made[0]}
    files.save(path, tensors, {"pairs": len(tensors["x0"]), "steps": steps, "seed": seed, "of": model.fingerprint})


def read_pairs(path: Path) -> Pairs:
    """Read a file of `write_pairs`, mapped into memory. Raises ValueError for any other."""
    tensors, description = files.load(path)
    if "pairs" not in description:
        raise ValueError(f"{path}: no pairs of noise and samples; accepted are files that recipes/reflow.py wrote")
    return Pairs(path.stem, tensors["x0"], tensors.get("labels"), noise=tensors["noise"])
