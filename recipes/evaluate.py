"""FID, KID, IS, precision and recall against step count, for any models, beside the teacher's training-free samplers.

    accelerate launch recipes/evaluate.py --model digits runs/progressive-digits --output-dir runs/evaluate
    torchrun --nproc_per_node 2 recipes/evaluate.py --model digits ...             the same numbers from two processes
    python recipes/evaluate.py --compare runs/a runs/b --output-dir runs/a-and-b   finished runs on one page

A model is anything that --teacher accepts; a run directory stands for the students of all its stages. A student is measured
under its own sampler at the step counts it was made for, any other model under every --samplers at every --steps.
Finished cells are kept: a run that was interrupted continues, and more models may be added to it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from accelerate.utils import broadcast_object_list

import teachers
from distill import solver
from distill.grid import GRIDS
from distill.regularize import RESIDUALS, residuals
from distill.rng import Rng
from distill.schedule import prior_std
from distill.search import gits, step_costs
from eval import merge, reference, report
from eval.collect import COLLECTORS
from eval.features import OWN, Extractor
from eval.generate import start
from eval.reference import decoder_floor
from eval.sweep import Cell
from eval.verify import verify
from recipes import data as datasets
from recipes.common import Run, disk_errors, flag, one_line_errors, parse
from recipes.matching import check_match, check_sampler, check_steps
from recipes.measure import OPPONENTS, Measurement, best_grid, opponents, own_cells, training_seconds
from teachers import Teacher

SEARCHED = ("ddim", "dpm++2m", "ipndm")  # samplers that are also measured on a searched grid
FINE_STEPS, SEARCH_IMAGES = 60, 256

PRESETS: dict[str, dict] = {
    "default": {},
    "full": {"images": 50_000},
    "smoke": {"images": 200, "steps": (1, 2), "samplers": ("ddim", "heun"), "baseline_steps": 8},
}


@dataclass(frozen=True)
class Config:
    MAY_CHANGE: ClassVar = (
        "model",
        "steps",
        "samplers",
        "baseline_steps",
        "guidance",
        "search_grid",
        "verify",
    )  # each cell knows these of itself

    preset: str = flag("default", "default, full, or smoke (everything in less than a minute)", choices=PRESETS)
    model: tuple[str, ...] = flag(("digits",), "what is measured: " + teachers.ACCEPTED + ", or the directory of a run")
    data: str = flag("digits", "the real images: " + datasets.ACCEPTED)
    output_dir: str = flag(
        "runs/evaluate", "a new directory, or one that holds an evaluation under the same protocol, which is continued"
    )
    steps: tuple[int, ...] = flag((1, 2, 4, 8), "step counts")
    baseline_steps: int = flag(64, "DDIM steps of the teacher that ratios are taken against; 0 for none")
    samplers: tuple[str, ...] = flag(OPPONENTS, "of models that were not distilled: " + solver.ACCEPTED)
    guidance: float = flag(1.0, "classifier-free guidance of models that were not distilled; 1 is none")
    images: int = flag(10_000, "generated images a cell")
    metrics: str = flag("all", "all, or fid alone in memory that does not grow with --images", choices=COLLECTORS)
    features: str = flag("digits", "feature extractor: digits, any of torch-fidelity's, or " + OWN)
    features_weights: str | None = flag(None, "file with the extractor's weights, for use without a network")
    reference: str | None = flag(None, f"a stored reference instead of --data: {reference.ACCEPTED}")
    search_grid: bool = flag(False, f"also the teacher under {', '.join(SEARCHED)} on a time grid found by dynamic programming")
    verify: bool = flag(False, "write out the cheapest cell as PNG files and compare with torch_fidelity.calculate_metrics")
    diagnostics: bool = flag(False, "print how far each model is from three properties of an exact denoiser")
    compare: tuple[str, ...] = flag((), "no measuring: the reports of these finished runs on one page")
    chunk: int = flag(256, "images generated at once in a process; part of the protocol")
    seed: int = flag(0, "seed of noise and labels")
    log_with: str | None = flag(None, "an Accelerate tracker", choices=("tensorboard", "wandb"))
    threads: int = flag(0, "CPU threads a process; 0 shares the cores out evenly")
    resume: bool = flag(True, "continue an evaluation of the same configuration in the output directory")


def expand(spec: str) -> list[str]:
    """The models a spec stands for: the stages of a run directory from many steps to few, or itself."""
    stages = [p.parent for p in Path(spec).glob("stages/*/student.safetensors") if p.parent.name.isdigit()]
    return [str(p / "student.safetensors") for p in sorted(stages, key=lambda p: -int(p.name))] or [spec]


def cells_of(config: Config, data: datasets.Data | None, device: torch.device) -> list[Cell]:
    """The cells of all models. ValueError where a model does not match the data, or a student none of the step counts."""
    cells: list[Cell] = []
    several = len(config.model) > 2
    for spec in config.model:
        mine: list[Cell] = []
        for path in expand(spec):
            model = teachers.load(path)
            if data is not None:
                check_match(model, data)
            if model.sampler:
                name = f"{Path(spec).stem} " if several else ""
                label = f"{name}student@{'/'.join(map(str, model.sampler['steps']))}"
                mine += own_cells(model, label, config.steps, training_seconds(Path(path)))
            else:
                mine += teacher_cells(config, model, spec if several else "teacher", device)
        if not mine:
            raise ValueError(f"{spec} was distilled for {model.sampler['steps']} steps; --steps names {list(config.steps)}")
        cells += mine
    if len({cell.name for cell in cells}) < len(cells):
        raise ValueError(
            "two models would stand under one name in the report: give each only once, in directories of their own name"
        )
    return cells


def teacher_cells(config: Config, model: Teacher, label: str, device: torch.device) -> list[Cell]:
    """A model that takes any step count, under all samplers, and under DDIM at the step count ratios are against."""
    baseline = (config.baseline_steps,) if config.baseline_steps else ()
    check_steps(model, (*config.steps, *baseline))
    for name in config.samplers:
        check_sampler(model, name)
    cells = opponents(model, label, config.steps, config.samplers, config.guidance)
    cells += opponents(model, label, baseline, ("ddim",), config.guidance)
    if config.search_grid:
        samplers = [name for name in SEARCHED if name in config.samplers]
        cells += searched(model, label, [n for n in config.steps if n > 1], samplers, config, device)
    return cells


def searched(
    model: Teacher, label: str, steps: list[int], samplers: list[str], config: Config, device: torch.device
) -> list[Cell]:
    """Cells on the grids that dynamic programming finds along a fine trajectory of a few hundred images."""
    denoiser = model.to(device).guided(config.guidance)
    fine = GRIDS[best_grid(denoiser.schedule, "ddim", FINE_STEPS)](denoiser.schedule, FINE_STEPS)
    begin = start(range(config.images, config.images + SEARCH_IMAGES), model.shape, model.classes, config.seed)
    cond = model.condition(None if begin.labels is None else begin.labels.to(device))
    costs = step_costs(denoiser, (prior_std(denoiser.schedule, fine[0]) * begin.noise).float().to(device), fine, **cond)
    found = [{n: tuple(gits(costs, fine, n).tolist()) for n in steps}]
    (times,) = broadcast_object_list(found)  # on GPUs the last digits of the costs may differ between processes
    return [Cell(label, "teacher", model, name, n, "searched", config.guidance, times[n]) for name in samplers for n in steps]


def compare(config: Config) -> None:
    """One report of several finished runs, where their protocols agree."""
    merged, cells = merge.merged([Path(folder) for folder in config.compare])
    run = Run.open(config)
    if run.main:
        merge.copy_pictures(cells, run.folder / "cells")
        report.write(merged, run.folder, run.folder / "cells")
    run.say(f"{merged['verdict']}\nreport: {run.folder / 'report.html'}")
    run.close()


def main(argv: list[str] | None = None) -> None:
    with one_line_errors():
        config = parse(Config, __doc__.splitlines()[0], PRESETS, argv)
        if config.compare:
            return compare(config)
        if min(config.steps) < 1 or config.images < 40:
            raise ValueError("--steps are 1 or more, --images 40 or more")
        data = None if config.reference else datasets.load(config.data)
        if data is not None:
            data.pixels  # latents cannot be measured against  # noqa: B018
        extractor = Extractor.create(config.features, config.features_weights)
        stored = reference.load(Path(config.reference), extractor) if config.reference else None
        if config.verify and (data is None or not extractor.registered or config.metrics != "all"):
            raise ValueError("--verify needs --data, one of torch-fidelity's extractors and --metrics all")
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        cells = cells_of(config, data, device)
        extractor.fits(cells[0].model.image_shape)
        run = Run.open(config)
        device = run.accelerator.device
        for cell in cells:
            cell.model.to(device)
        real = stored or data
        assert real is not None
        measurement = Measurement.of(
            extractor, real, run, images=config.images, chunk=config.chunk, seed=config.seed, metrics=config.metrics
        )
    run.say(
        f"{len(cells)} cells of {config.images:,} images on {run.accelerator.num_processes} process(es), output {run.folder}"
    )
    if config.diagnostics and run.main and data is not None:
        diagnose(cells, data, run)
    facts = {"models": ", ".join(config.model)} | decoder_floors(cells, data, measurement, run)
    with disk_errors():
        out = measurement.report(run, f"FID against step count on {config.data}", cells, facts)
    if config.verify and run.main and data is not None:
        prove(config, measurement, cells, out, data.images, run)
    run.say(f"\n{out['verdict']}\nreport: {run.folder / 'report.html'}")
    run.close()


def decoder_floors(cells: list[Cell], data: datasets.Data | None, measurement: Measurement, run: Run) -> dict[str, float]:
    """Of latent models: the FID of the real images, encoded and decoded, which nothing they generate can be expected to beat."""
    models = {cell.label: cell.model for cell in cells if cell.model.codec is not None}
    if data is None:
        return {}
    return {
        f"decoder floor of {label}": decoder_floor(
            model, data.images, measurement.extractor, measurement.reference, run.accelerator
        )
        for label, model in models.items()
    }


def diagnose(cells: list[Cell], data: datasets.Data, run: Run, images: int = 256) -> None:
    """Prints the residuals of `distill/regularize.py` of each model, over some real images."""
    device = run.accelerator.device
    x0 = data.x0(slice(images), device)
    run.say("residuals a pixel: " + ", ".join(RESIDUALS))
    for label, model in {cell.label: cell.model for cell in cells if cell.model.codec is None}.items():
        labels = None if data.labels is None else data.labels[:images].to(device)
        rng = Rng(torch.Generator(device).manual_seed(0), len(x0))
        found = residuals(model.denoiser, x0, rng, **model.condition(labels))
        run.say(f"  {label.ljust(24)}" + "  ".join(f"{value:.3g}" for value in found.values()))


def prove(config: Config, measurement: Measurement, cells: list[Cell], out: dict, real: torch.Tensor, run: Run) -> None:
    """Compares the cheapest cell with torch-fidelity's own command and says so; exit code 1 where they differ."""
    finished = {row["name"]: row for row in out["rows"] if "error" not in row}
    cell = min((cell for cell in cells if cell.name in finished), key=lambda cell: cell.cost)
    worst, theirs = verify(
        cell,
        finished[cell.name],
        measurement.protocol,
        real,
        measurement.extractor,
        config.features_weights,
        run.accelerator.device,
    )
    numbers = ", ".join(f"{name} {value:.6g}" for name, value in theirs.items())
    run.say(f"{cell.name}: torch_fidelity.calculate_metrics says {numbers}; largest relative difference {worst:.1g}")
    if not worst < 1e-5:
        raise SystemExit("error: this evaluation and torch-fidelity disagree")


if __name__ == "__main__":
    main()
