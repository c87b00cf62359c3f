"""Check that a model is a denoiser and is declared correctly.

    python recipes/probe.py --model SPEC --data DATA

Prints errors, biases and skill per noise level, and which declarations of prediction, time, data range and discrete table fit best. Ends
with exit code 2 if the model is not a denoiser as declared.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

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
    MOVED: ClassVar = {"--nll": "python recipes/likelihood.py --model SPEC --data DATA"}
    preset: str = flag("default", "both are the same here", choices=PRESETS)
    model: str = model_flag("digits", "the model (accepted: --help teacher)")
    data: str = model_flag("digits", "the data (accepted: --help data)")
    seed: int = machine_flag(0, "seed of all random numbers", **SEED)
    threads: int = machine_flag(0, "CPU threads; 0 for torch's default", short=False, **THREADS)


flags_first(__name__, Config, __doc__, PRESETS)

import torch

import teachers
from recipes.common.checks import check_match, conditioned, probed
from recipes.data import sets as datasets


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


if __name__ == "__main__":
    main()
