"""Compare models by three properties of an exact denoiser, at each noise level: martingale, Fokker-Planck, self-consistency.

    python recipes/residuals.py --model digits runs/progressive-digits runs/consistency-digits

The exact E[x0 | x_t] has the first two and not the third; a consistency function has the third and not the first two.
A residual is the mean square per pixel by which a model misses a property. Lai et al., arXiv 2306.00367, show how the three are related.
Writes residuals.json and residuals.png.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from recipes.common import flags
from recipes.common.accepted import SEED
from recipes.common.cli import flag, flags_first, machine_flag, measuring_flag, model_flag, one_line_errors, parse

PRESETS: dict[str, dict] = {
    "default": {},  # about a minute for three models
    "smoke": {"images": 16, "levels": 4},  # some seconds
}


@dataclass(frozen=True)
class Config(flags.MachineFlags):
    preset: str = flag("default", "smoke is a trial run of some seconds", choices=PRESETS)
    model: tuple[str, ...] = model_flag(
        ("digits",), "the models (accepted: --help teacher); a run's directory holds its last student"
    )
    data: str = model_flag("digits", "the data (accepted: --help data)")
    output_dir: str = flags.output_dir("runs/residuals-digits")
    images: int = measuring_flag(256, "images of the data", at_least=2, at_most=1_000_000)
    levels: int = measuring_flag(13, "log-SNRs, over the range of --regularize", at_least=2, at_most=1000)
    seed: int = machine_flag(0, "seed of all random numbers", **SEED)

    TOPICS: ClassVar = flags.TOPICS


flags_first(__name__, Config, __doc__, PRESETS)

import torch
from torch import Tensor

import teachers
from distill.files import write_json
from distill.regularize import RANGE, RESIDUALS, residuals
from distill.rng import Rng
from eval.residual_plot import draw
from recipes.common.checks import check_match
from recipes.common.run import Run, processes
from recipes.data import sets
from recipes.data.sets import Data
from teachers import Teacher


def measured(model: Teacher, data: Data, logsnr: Tensor, config: Config, device: torch.device) -> dict[str, list[float]]:
    """Return each residual at each log-SNR. All models see the same images and noise."""
    x0 = data.x0(slice(config.images), device)
    cond = model.to(device).condition(None if data.labels is None else data.labels[: config.images].to(device))
    rows = []
    for level in logsnr:
        rng = Rng.seeded(config.seed, device, len(x0))
        rows.append(residuals(model.denoiser, x0, rng, float(level), **cond))
    return {name: [row[name] for row in rows] for name in RESIDUALS}


def main(argv: list[str] | None = None) -> None:
    with one_line_errors():
        config = parse(Config, __doc__, PRESETS, argv)
        data = sets.load(config.data)
        models = {spec: teachers.load(spec) for spec in config.model}
        for spec, model in models.items():
            data = check_match(model, data, training=True)
            if model.embeddings is not None:
                raise ValueError(f"{spec} is conditioned on text: accepted are models of labels or of no condition")
        if data.imageless or processes() > 1:
            raise ValueError("residuals need one process, and data with images or latents")
        run = Run.open(config)
    logsnr = torch.linspace(*RANGE, config.levels, dtype=torch.float64)
    rows = []
    run.say("residuals per pixel".ljust(40) + "".join(name.rjust(18) for name in RESIDUALS))
    for spec, model in models.items():
        at = measured(model, data, logsnr, config, run.device)
        mean = {name: sum(values) / len(values) for name, values in at.items()}
        rows.append({"model": spec, "at": at, "mean": mean})
        run.say(f"  {spec.ljust(38)}" + "".join(f"{value:18.3g}" for value in mean.values()))
    out = {"residuals": list(RESIDUALS), "logsnr": logsnr.tolist(), "models": rows}
    write_json(run.folder / "residuals.json", out)
    draw(out, run.folder / "residuals.png")
    run.say(f"picture: {run.folder / 'residuals.png'}")
    run.close()


if __name__ == "__main__":
    main()
