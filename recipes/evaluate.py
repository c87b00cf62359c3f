"""FID, KID, IS, precision and recall against step count, for any models, beside the teacher's training-free samplers.

    accelerate launch recipes/evaluate.py --model digits runs/progressive-digits --output-dir runs/evaluate
    torchrun --nproc_per_node 2 recipes/evaluate.py --model digits ...             the same numbers from two processes

A model is anything that --teacher accepts; a run directory stands for the students of all its stages. A student is measured
under its own sampler at the step counts it was made for, any other model under every --samplers at every --steps.
Finished cells are kept: a run that was interrupted continues, and more models may be added to it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import teachers
from distill.solver import SAMPLERS
from eval.features import Extractor
from eval.sweep import Cell
from recipes import data as datasets
from recipes.common import Run, flag, one_line_errors, parse
from recipes.measure import OPPONENTS, Measurement, check_match, opponents, own_cells

PRESETS: dict[str, dict] = {
    "default": {},
    "full": {"images": 50_000},
    "smoke": {"images": 200, "steps": (1, 2), "samplers": ("ddim", "heun"), "baseline_steps": 8},
}


@dataclass(frozen=True)
class Config:
    MAY_CHANGE: ClassVar = ("model", "steps", "samplers", "baseline_steps", "guidance")  # each cell knows these of itself

    preset: str = flag("default", "default, full, or smoke (everything in less than a minute)", choices=PRESETS)
    model: tuple[str, ...] = flag(("digits",), "what is measured: " + teachers.ACCEPTED + ", or the directory of a run")
    data: str = flag("digits", "the real images: " + datasets.ACCEPTED)
    output_dir: str = flag(
        "runs/evaluate", "a new directory, or one that holds an evaluation under the same protocol, which is continued"
    )
    steps: tuple[int, ...] = flag((1, 2, 4, 8), "step counts")
    baseline_steps: int = flag(64, "DDIM steps of the teacher that ratios are taken against; 0 for none")
    samplers: tuple[str, ...] = flag(OPPONENTS, "samplers of models that were not distilled", choices=SAMPLERS)
    guidance: float = flag(1.0, "classifier-free guidance of models that were not distilled; 1 is none")
    images: int = flag(10_000, "generated images a cell")
    features: str = flag("digits", "feature extractor: digits or any of torch-fidelity's")
    features_weights: str | None = flag(None, "file with the extractor's weights, for use without a network")
    chunk: int = flag(256, "images generated at once in a process; part of the protocol")
    seed: int = flag(0, "seed of noise and labels")
    log_with: str | None = flag(None, "an Accelerate tracker", choices=("tensorboard", "wandb"))
    threads: int = flag(0, "CPU threads a process; 0 shares the cores out evenly")
    resume: bool = flag(True, "continue an evaluation of the same configuration in the output directory")


def expand(spec: str) -> list[str]:
    """The models a spec stands for: the stages of a run directory from many steps to few, or itself."""
    stages = [p.parent for p in Path(spec).glob("stages/*/student.safetensors") if p.parent.name.isdigit()]
    return [str(p / "student.safetensors") for p in sorted(stages, key=lambda p: -int(p.name))] or [spec]


def cells_of(config: Config, data: datasets.Data) -> list[Cell]:
    """The cells of all models. ValueError where a model does not match the data, or a student none of the step counts."""
    cells: list[Cell] = []
    for spec in config.model:
        mine: list[Cell] = []
        for path in expand(spec):
            model = teachers.load(path)
            check_match(model, data)
            name = "" if len(config.model) <= 2 else f"{Path(spec).stem} "
            if model.sampler:
                steps = model.sampler["steps"]
                mine += own_cells(model, f"{name}student@{'/'.join(map(str, steps))}", config.steps)
            else:
                label = "teacher" if len(config.model) <= 2 else spec
                mine += opponents(model, label, config.steps, config.samplers, config.guidance)
                mine += opponents(
                    model, label, (config.baseline_steps,) if config.baseline_steps else (), ("ddim",), config.guidance
                )
        if not mine:
            raise ValueError(f"{spec} was distilled for {model.sampler['steps']} steps; --steps names {list(config.steps)}")
        cells += mine
    if len({cell.name for cell in cells}) < len(cells):
        raise ValueError(
            "two models would stand under one name in the report: give each only once, in directories of their own name"
        )
    return cells


def main(argv: list[str] | None = None) -> None:
    with one_line_errors():
        config = parse(Config, __doc__.splitlines()[0], PRESETS, argv)
        if min(config.steps) < 1 or config.images < 40:
            raise ValueError("--steps are 1 or more, --images 40 or more")
        data = datasets.load(config.data)
        cells = cells_of(config, data)
        extractor = Extractor.create(config.features, config.features_weights)
        run = Run.open(config)
    device = run.accelerator.device
    for cell in cells:
        cell.model.to(device)
    measurement = Measurement.of(extractor, data, config.images, config.chunk, config.seed, device)
    run.say(
        f"{len(cells)} cells of {config.images:,} images on {run.accelerator.num_processes} process(es), output {run.folder}"
    )
    report = measurement.report(run, f"FID against step count on {config.data}", cells, {"models": ", ".join(config.model)})
    run.say(f"\n{report['verdict']}\nreport: {run.folder / 'report.html'}")
    run.close()


if __name__ == "__main__":
    main()
