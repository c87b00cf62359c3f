"""Measure FID, KID, IS, precision and recall against step count, beside the teacher's training-free samplers.

    accelerate launch recipes/evaluate.py --model digits runs/progressive-digits --output-dir runs/evaluate
    torchrun --nproc_per_node 2 recipes/evaluate.py --model digits ...             the same numbers from two processes

A run's directory stands for the students of all its stages. A student is measured with its own sampler, or with each of
--student-samplers, at the step counts that it was made for; any other model with every --samplers at every --steps. Finished cells are
kept: an interrupted evaluation continues, and more models may be added to it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from distill import names
from eval.names import EXTRACTORS, METRICS, ON_SEARCHED_GRIDS, REFERENCES
from recipes.common import flags
from recipes.common.accepted import BATCH, GENERATED, GUIDANCE, STEPS
from recipes.common.cli import flag, flags_first, measuring_flag, method_flag, model_flag, one_line_errors, parse, plural
from recipes.common.real_images import CIFAR10, CIFAR10_FEATURES, FASHION, FASHION_FEATURES, REAL_IMAGES

PRESETS: dict[str, dict] = {
    "default": {},  # the four digits students of the progressive ladder: about 7 minutes on two CPU cores
    "full": {"images": 50_000},
    "smoke": {"images": 200, "steps": (1, 2), "samplers": ("ddim", "heun"), "baseline_steps": 8},  # half a minute
    "fashion": FASHION | FASHION_FEATURES | {"output_dir": "runs/fashion/evaluate"},
    "cifar10": CIFAR10 | CIFAR10_FEATURES | {"output_dir": "runs/cifar10/evaluate", "images": 50_000},
}


@dataclass(frozen=True)
class Config(flags.RunFlags, flags.DecodingFlags):
    preset: str = flag("default", f"smoke is a trial run of half a minute; {REAL_IMAGES}", choices=PRESETS)
    model: tuple[str, ...] = model_flag(("digits",), "the models (accepted: --help teacher), or directories of runs")
    data: str = model_flag("digits", "the real images (accepted: --help data)")
    output_dir: str = flags.output_dir("runs/evaluate")
    steps: tuple[int, ...] = flag((1, 2, 4, 8), "step counts", **STEPS)
    baseline_steps: int = flag(
        64, "DDIM steps of the teacher that ratios are taken against; 0 for none", short=False, **(STEPS | {"at_least": 0})
    )
    samplers: tuple[str, ...] = method_flag(names.BASELINES, f"for models that were not distilled: {names.SAMPLER_TEXT}")
    student_samplers: tuple[str, ...] | None = method_flag(
        None,
        "samplers of all students in place of their own, such as consistency:0 consistency:0.5 consistency:1",
        own=lambda v: "each student's own",
        short=False,
    )
    guidance: tuple[float, ...] | None = method_flag(
        None,
        "guidance scales of students that take the scale, and of models that were not distilled; 1 is none",
        own=lambda v: "1, or the scale of a student that takes it",
        **(GUIDANCE | {"distinct": True}),
    )
    search_grid: bool = method_flag(
        False, f"also measure {', '.join(ON_SEARCHED_GRIDS)} on a time grid found by dynamic programming", short=False
    )
    images: int = measuring_flag(10_000, "generated images per cell", **GENERATED)
    metrics: str = measuring_flag("all", "all, or fid alone in memory that does not grow with --images", choices=METRICS)
    features: str = measuring_flag("digits", "feature extractor: digits, any of torch-fidelity's, or " + EXTRACTORS)
    features_weights: str | None = measuring_flag(
        None, "file with the extractor's weights, for use without a network", short=False, path="file"
    )
    reference: str | None = measuring_flag(
        None, f"a stored reference instead of --data: {REFERENCES}", short=False, path="file"
    )
    captions: str | None = flags.captions_flag()
    chunk: int = measuring_flag(256, "images generated at once; part of the protocol", short=False, **BATCH)
    verify: bool = measuring_flag(
        False, "write the cheapest cell as PNG files and compare it with torch_fidelity.calculate_metrics", short=False
    )
    diagnostics: bool = measuring_flag(
        False, "print how far each model is from three properties of an exact denoiser", short=False
    )

    # each cell holds these itself
    MAY_CHANGE: ClassVar = (
        "model",
        "steps",
        "samplers",
        "student_samplers",
        "baseline_steps",
        "guidance",
        "search_grid",
        "verify",
    )
    TOPICS: ClassVar = flags.TOPICS
    MOVED: ClassVar = {"--compare": "python recipes/compare.py --runs runs/a runs/b --output-dir runs/a-and-b"}


flags_first(__name__, Config, __doc__, PRESETS)

import torch

from distill.regularize import RESIDUALS, residuals
from distill.rng import Rng
from eval import reference
from eval.features import Extractor
from eval.reference import decoder_floor
from eval.sweep import Cell
from eval.verify import verify
from recipes.common.cells import Models, cells_of, searched_cells
from recipes.common.checks import (
    captions_for,
    check_match,
    conditioned,
    decoded_by,
    stages_of,
)
from recipes.common.guidance import outside
from recipes.common.interrupts import interruptible
from recipes.common.measurement import Measurement
from recipes.common.run import Run
from recipes.data import sets, source
from recipes.data.sets import Data
from teachers import Teacher


@interruptible()
def main(argv: list[str] | None = None) -> None:
    with one_line_errors():
        config = parse(Config, __doc__, PRESETS, argv)
        data = None if config.reference else sets.load(config.data)
        models = [
            (spec, [(path, decoded_by(source.load(path), config.decode)) for path in stages_of(spec)]) for spec in config.model
        ]
        extractor = Extractor.create(config.features, config.features_weights)
        run, cells, measurement = prepare(config, models, data, extractor)
    out = measure(config, run, cells, measurement, data)
    if config.verify and run.main and data is not None:
        compare_with_torch_fidelity(config, measurement, cells, out, data.images, run)
    run.say(f"\n{out['verdict']}\nreport: {run.folder / 'report.html'}")
    run.close()


def prepare(config: Config, models: Models, data: Data | None, extractor: Extractor) -> tuple[Run, list[Cell], Measurement]:
    """Check everything that can be checked, then claim the output directory.

    Raises ValueError, before anything is written, where parts do not fit together.
    """
    if data is not None:
        data.require_pixels()
    stored = reference.load(Path(config.reference), extractor) if config.reference else None
    if config.verify and (data is None or not extractor.registered or config.metrics != "all"):
        raise ValueError("--verify needs --data, one of torch-fidelity's extractors and --metrics all")
    for _, model in (one for _, group in models for one in group):
        if model.source is not None and config.diagnostics:
            raise ValueError(
                f"--diagnostics add Gaussian noise, and paths start from {model.source}: accepted are models that start from noise"
            )
        if data is not None:
            check_match(model, data)
    models = [(spec, [(path, on_captions(config, model, data)) for path, model in group]) for spec, group in models]
    cells = cells_of(config, models)
    warned = {warning for cell in cells if (warning := outside(cell.model, cell.guidance))}
    extractor.fits(cells[0].model.image_shape)
    run = Run.open(config)
    for warning in sorted(warned):
        run.say(f"warning: {warning}")
    for cell in cells:
        cell.model.to(run.device)
    if config.search_grid:
        cells += searched_cells(config, cells, run)
    real = stored or data
    assert real is not None
    classes = {} if data is None else data.caption_classes
    settings = {
        "classes": classes,
        "images": config.images,
        "chunk": config.chunk,
        "seed": config.seed,
        "metrics": config.metrics,
    }
    return run, cells, Measurement.of(extractor, real, run, **settings)  # type: ignore[arg-type]


def on_captions(config: Config, model: Teacher, data: Data | None) -> Teacher:
    """Return a text-to-image model with the prompts of --captions, else with its own, else with the captions of the data.

    Raises ValueError where there are none.
    """
    if (table := captions_for(model, config.captions, config)) is not None:
        return model.with_conditions(table)
    if model.embeddings is None or model.classes:
        return model
    if data is None or data.captions is None:
        raise ValueError("this model is conditioned on text: accepted are --captions FILE, or --data with captions")
    return conditioned(model, data, config)[0]


def measure(config: Config, run: Run, cells: list[Cell], measurement: Measurement, data: Data | None) -> dict:
    """Measure the cells that are not finished, and write the report."""
    images, processes = f"{config.images:,} images", plural(run.accelerator.num_processes, "process")
    run.say(f"{plural(len(cells), 'cell')} of {images} on {processes}, output {run.folder}")
    facts: dict = {"models": ", ".join(config.model)}
    if data is not None:
        if config.diagnostics and run.main:
            print_residuals(cells, data, run)
        facts |= decoder_floors(cells, data, measurement, run)
    return measurement.report(run, f"FID against step count on {config.data}", cells, facts)


def decoder_floors(cells: list[Cell], data: Data, measurement: Measurement, run: Run) -> dict[str, float]:
    """Return the FID of the real images after encoding and decoding, for each latent model: the best that it can reach."""
    models = {cell.label: cell.model for cell in cells if cell.model.codec is not None}
    known = (measurement.extractor, measurement.reference, run.accelerator)
    return {f"decoder floor of {label}": decoder_floor(model, data.images, *known) for label, model in models.items()}


def print_residuals(cells: list[Cell], data: Data, run: Run, images: int = 256) -> None:
    """Print the residuals of `distill.regularize` for each pixel model, over some real images."""
    x0 = data.x0(slice(images), run.device)
    run.say("residuals per pixel".ljust(26) + "  ".join(name.rjust(16) for name in RESIDUALS))
    for label, model in {cell.label: cell.model for cell in cells if cell.model.codec is None}.items():
        labels = None if data.labels is None else data.labels[:images].to(run.device)
        rng = Rng(torch.Generator(run.device).manual_seed(0), len(x0))
        found = residuals(model.denoiser, x0, rng, **model.condition(labels))
        run.say(f"  {label.ljust(24)}" + "  ".join(f"{value:16.3g}" for value in found.values()))


def compare_with_torch_fidelity(
    config: Config, measurement: Measurement, cells: list[Cell], out: dict, real: torch.Tensor, run: Run
) -> None:
    """Compare the cheapest cell with torch-fidelity's own command. Exit code 1 where they differ."""
    finished = {row["name"]: row for row in out["rows"] if "error" not in row}
    cell = min((cell for cell in cells if cell.name in finished), key=lambda cell: cell.cost)
    worst, theirs = verify(
        cell, finished[cell.name], measurement.protocol, real, measurement.extractor, config.features_weights, run.device
    )
    numbers = ", ".join(f"{name} {value:.6g}" for name, value in theirs.items())
    run.say(f"{cell.name}: torch_fidelity.calculate_metrics says {numbers}; largest relative difference {worst:.1g}")
    if not worst < 1e-5:
        raise SystemExit("error: this evaluation and torch-fidelity disagree")


if __name__ == "__main__":
    main()
