"""Search step times for a student: try them on shared seeds with a cheap figure, then decide by FID.

    python recipes/search.py --model runs/progressive-digits/stages/4 --steps 2 3 4 --output-dir runs/search

The steps of a student are not those of a differential equation, so its times are found by trying. One time after the other is moved
along a fine grid where that lowers the KID of a thousand images. Of the found and the trained times those with the lower FID are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from recipes.common import flags
from recipes.common.accepted import BATCH, GENERATED, SEED, STEPS
from recipes.common.cli import (
    flag,
    flags_first,
    machine_flag,
    measuring_flag,
    method_flag,
    model_flag,
    one_line_errors,
    parse,
    plural,
)

PRESETS: dict[str, dict] = {
    "default": {},
    "full": {"proxy_images": 4000, "images": 50_000},
    "smoke": {"steps": (2,), "nodes": 8, "proxy_images": 100, "images": 100},  # about a minute
}


@dataclass(frozen=True)
class Config(flags.MachineFlags):
    preset: str = flag("default", "smoke is a trial run of about a minute", choices=PRESETS)
    model: str = model_flag("digits", "the student (accepted: --help teacher)")
    data: str = model_flag("digits", "the real images (accepted: --help data)")
    output_dir: str = flags.output_dir("runs/search")
    steps: tuple[int, ...] = flag((2, 3, 4), "step counts to find times for", **STEPS)
    nodes: int = method_flag(64, "steps of the fine grid, equal in t, that times are taken from", **STEPS)
    proxy_images: int = method_flag(1000, "images of the KID that is minimised", **GENERATED)
    images: int = measuring_flag(10_000, "images of the FID that decides", **GENERATED)
    features: str = measuring_flag("digits", "feature extractor")
    chunk: int = measuring_flag(256, "images generated at once", short=False, **BATCH)
    seed: int = machine_flag(0, "seed of noise and labels; the search uses other seeds than the FID", **SEED)

    TOPICS: ClassVar = flags.TOPICS


flags_first(__name__, Config, __doc__, PRESETS)

import torch
from torch import Tensor

import teachers
from distill.grid import uniform
from distill.grid_search import coordinate_descent
from distill.sampling import SEARCHED, Sampling
from eval import fidelity
from eval.features import Extractor
from eval.generate import chunks, images
from eval.sweep import Cell
from recipes.common.checks import check_match, check_steps, conditioned
from recipes.common.delivery import export_pipelines
from recipes.common.interrupts import interruptible
from recipes.common.measurement import Measurement
from recipes.common.run import Run
from recipes.data import sets
from teachers import Teacher


@interruptible()
def main(argv: list[str] | None = None) -> None:
    with one_line_errors():
        config = parse(Config, __doc__, PRESETS, argv)
        model, data = teachers.load(config.model), sets.load(config.data)
        data.require_pixels()
        model, data = conditioned(model, data)
        check_match(model, data)
        check_steps(model, (*config.steps, config.nodes))
        if max(config.steps) > config.nodes:
            raise ValueError(
                f"--steps {max(config.steps)} on --nodes {config.nodes}: accepted are at most as many steps as nodes"
            )
        extractor = Extractor.create(config.features).fits(data.shape)
        run = Run.open(config)
        measurement = Measurement.of(extractor, data, run, images=config.images, chunk=config.chunk, seed=config.seed)
    model.to(run.device)
    cells = [cell for n in config.steps for cell in search(config, run, model, measurement, n)]
    report = measurement.report(run, f"Step times of {config.model}", cells, {"model": config.model})
    if run.main:
        keep_better(run, model, cells, report)
    run.say(f"report: {run.folder / 'report.html'}")
    run.close()


def search(config: Config, run: Run, model: Teacher, measurement: Measurement, n: int) -> tuple[Cell, Cell]:
    """Return two cells of a step count: uniform times, and the times that minimise KID."""
    fine = uniform(model.denoiser.schedule, config.nodes)
    merit = kid_of_times(model, measurement, config, fine, run.device)
    begin = [round(i * config.nodes / n) for i in range(n + 1)]

    def descend() -> list[int]:
        path, kid = coordinate_descent(merit, begin, config.nodes + 1)
        before = 1000 * merit(begin)
        run.say(f"{plural(n, 'step')}: KID x1000 {before:.2f} -> {1000 * kid:.2f}, times {fine[path].tolist()}")
        return path

    found = tuple(fine[run.from_main(descend)].tolist())
    plain = replace(model.sampling, grid="uniform", times={})
    label = f"student@{n}"
    searched = replace(plain, grid=SEARCHED, times={n: found})
    return Cell(label, "student", model, plain, n), Cell(label, "student", model, searched, n)


def kid_of_times(
    model: Teacher, measurement: Measurement, config: Config, fine: Tensor, device: torch.device
) -> Callable[[Sequence[int]], float]:
    """Return the function: indices of ``fine`` -> KID of images along these times, with the same seeds at every call."""
    real = measurement.reference.features
    assert real is not None
    seeds = [[config.images + i for i in part] for part in chunks(config.proxy_images, config.chunk)]

    def merit(path: Sequence[int]) -> float:
        n, times = len(path) - 1, tuple(fine[list(path)].tolist())
        sampling = replace(model.sampling, grid=SEARCHED, times={n: times})
        drawn = images(model, sampling, n, seeds, config.seed, device)
        features = torch.cat([measurement.extractor.on_device(batch.pixels).fid for batch in drawn]).cpu()
        kid, _ = fidelity.kid(features[: config.proxy_images], real, subsets=1)
        return kid if kid == kid else float("inf")

    return merit


def keep_better(run: Run, model: Teacher, cells: list[Cell], report: dict) -> None:
    """Write the student with the better times of each step count, and its pipelines."""
    fid = {row["name"]: row["fid"] for row in report["rows"]}
    times = {}
    for plain, searched in zip(cells[::2], cells[1::2], strict=True):
        better = min(plain, searched, key=lambda cell: fid[cell.name])
        times[better.steps] = tuple(better.times.tolist())
        run.say(f"{plural(better.steps, 'step')}: FID {fid[plain.name]:.4f} uniform, {fid[searched.name]:.4f} searched")
    made: Sampling = replace(model.sampling, grid=SEARCHED, steps=tuple(times), times=times)
    student = replace(model, sampling=made)
    teachers.save(run.folder / "student.safetensors", student)
    export_pipelines(run, student)


if __name__ == "__main__":
    main()
