"""The cells of an evaluation: which sampler, step count and guidance scale each model is measured with, and the names of its rows."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Protocol

import torch

from distill.grid_search import gits, step_costs
from distill.sampling import SEARCHED, Sampling
from distill.schedule import prior_std
from eval.cells import Cell
from eval.generate import start
from eval.names import ON_SEARCHED_GRIDS
from recipes.common.checks import check_sampler, check_steps, with_sampler
from recipes.common.measurement import baselines, student_cells, training_seconds
from recipes.common.run import Run
from teachers import Teacher

FINE_STEPS, SEARCH_IMAGES = 60, 256  # of the trajectories along which a time grid is searched

Models = list[tuple[str, list[tuple[str, Teacher]]]]  # spec, and the file and model of each student behind it


class Config(Protocol):
    """What is read of the flags of `recipes/evaluate.py`."""

    @property
    def steps(self) -> tuple[int, ...]: ...
    @property
    def baseline_steps(self) -> int: ...
    @property
    def samplers(self) -> tuple[str, ...]: ...
    @property
    def student_samplers(self) -> tuple[str, ...] | None: ...
    @property
    def guidance(self) -> tuple[float, ...] | None: ...
    @property
    def images(self) -> int: ...
    @property
    def seed(self) -> int: ...


def cells_of(config: Config, models: Models) -> list[Cell]:
    """Return the cells of all models. Raises ValueError for a student that was made for none of the step counts."""
    cells: list[Cell] = []
    distilled = [group[0][1].distilled for _, group in models]
    several = max(distilled.count(True), distilled.count(False)) > 1
    for spec, group in models:
        mine: list[Cell] = []
        for path, model in group:
            if model.distilled:
                name = f"{Path(spec).stem} " if several else ""
                label = f"{name}student@{'/'.join(map(str, model.sampling.steps))}"
                run = run_of(spec) if several else ""
                scales = {"": None} if model.guidance is None else scales_of(config, 1)
                for (chosen, sampled), (ending, scale) in product(samplers_of(config, model).items(), scales.items()):
                    own = f"{label}{ending}{chosen}"
                    mine += student_cells(sampled, own, config.steps, training_seconds(Path(path)), run, scale)
            else:
                mine += teacher_cells(config, model, spec if distilled.count(False) > 1 else "teacher")
        if not mine:
            made = ", ".join(map(str, model.sampling.steps))
            raise ValueError(f"{spec} was distilled for {made} steps; --steps names {', '.join(map(str, config.steps))}")
        cells += mine
    if len({cell.name for cell in cells}) < len(cells):
        raise ValueError("two models would have one name in the report: give each only once, in directories of different names")
    return cells


def scales_of(config: Config, least: int) -> dict[str, float | None]:
    """Return the guidance scales by the ending that they give a model's name, where there are ``least`` or more; None: its own."""
    given = config.guidance
    if given is None:
        return {"": None}
    scales = given if isinstance(given, tuple) else (given,)  # Python's callers may give one number
    return {f" w={scale:g}" if len(scales) >= least else "": scale for scale in scales}


def samplers_of(config: Config, student: Teacher) -> dict[str, Teacher]:
    """Return the student with each of --student-samplers, by the ending that it gives its name where there are several.

    With one step all samplers are one. Raises ValueError for a sampler that the student does not support.
    """
    names = () if student.sampling.steps == (1,) else config.student_samplers or ()
    if len(names) < 2:
        return {"": with_sampler(student, names[0]) if names else student}
    sampled = [with_sampler(student, name) for name in names]
    return {f" with {model.sampling.label}": model for model in sampled}


def run_of(spec: str) -> str:
    """Return the name of the run that a student's path lies in; empty for what is no path, such as a model from Python."""
    path = Path(spec)
    if not path.exists():
        return ""
    if "stages" in path.parts[1:]:
        return path.parts[path.parts.index("stages", 1) - 1]
    return path.parent.name if path.name == "student.safetensors" else path.stem


def teacher_cells(config: Config, model: Teacher, label: str) -> list[Cell]:
    """Return the cells of a model that takes any step count, and its DDIM cell that ratios are taken against."""
    baseline = (config.baseline_steps,) if config.baseline_steps else ()
    check_steps(model, (*config.steps, *baseline))
    for name in config.samplers:
        check_sampler(model, Sampling.parse(name))
    cells: list[Cell] = []
    for ending, scale in scales_of(config, 2).items():
        scale = model.own_scale if scale is None else scale
        cells += baselines(model, f"{label}{ending}", config.steps, config.samplers, scale)
        cells += baselines(model, f"{label}{ending}", baseline, ("ddim",), scale)
    return list({cell.name: cell for cell in cells}.values())


def searched_cells(config: Config, cells: list[Cell], run: Run) -> list[Cell]:
    """Return cells on time grids that dynamic programming finds along a fine trajectory of a few hundred images."""
    found: list[Cell] = []
    steps = [n for n in config.steps if n > 1]
    for label, cell in {cell.label: cell for cell in cells if cell.role == "teacher"}.items():
        model, denoiser = cell.model, cell.denoiser
        fine = Sampling().on_best_grid(denoiser.schedule, FINE_STEPS).times_for(denoiser.schedule, FINE_STEPS)
        indices = range(config.images, config.images + SEARCH_IMAGES)
        begin = start(model, indices, config.seed, run.device)
        cond = model.condition(begin.labels)
        x = (prior_std(denoiser.schedule, fine[0]) * begin.noise).float()
        costs = step_costs(denoiser, x, fine, **cond)
        # on GPUs the last digits of the costs may differ between processes
        times = run.from_main(partial(_cheapest, costs, fine, steps))
        samplings = [Sampling.parse(name, grid=SEARCHED) for name in ON_SEARCHED_GRIDS if name in config.samplers]
        found += [
            Cell(label, "teacher", model, replace(sampling, times={n: times[n]}), n, cell.guidance)
            for sampling in samplings
            for n in steps
        ]
    return found


def _cheapest(costs: torch.Tensor, fine: torch.Tensor, steps: list[int]) -> dict[int, tuple[float, ...]]:
    return {n: tuple(gits(costs, fine, n).tolist()) for n in steps}
