"""Better step times for a student: tried on shared seeds with a cheap figure, confirmed by FID, written into the student.

    python recipes/search.py --model runs/progressive-digits/stages/4 --steps 2 3 4 --output-dir runs/search

A student's steps follow no differential equation, so its times are found by trying: one at a time is moved along a fine grid
where that lowers the KID of a thousand images. Of the found and the trained times those with the lower FID are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor

import teachers
from distill.grid import uniform
from distill.search import coordinate_descent
from eval import fidelity
from eval.features import Extractor
from eval.generate import chunks, generate, start, to_uint8
from eval.sweep import Cell
from recipes import data as datasets
from recipes import stage
from recipes.common import Run, disk_errors, flag, one_line_errors, parse
from recipes.matching import check_match, check_steps
from recipes.measure import Measurement
from teachers import Teacher

PRESETS: dict[str, dict] = {
    "default": {},
    "full": {"proxy_images": 4000, "images": 50_000},
    "smoke": {"steps": (2,), "nodes": 8, "proxy_images": 100, "images": 100},
}


@dataclass(frozen=True)
class Config:
    preset: str = flag("default", "default, full, or smoke (everything in less than a minute)", choices=PRESETS)
    model: str = flag("digits", "the student: " + teachers.ACCEPTED)
    data: str = flag("digits", "the real images: " + datasets.ACCEPTED)
    output_dir: str = flag("runs/search", "a new directory, or one that holds the same search, which is continued")
    steps: tuple[int, ...] = flag((2, 3, 4), "step counts that are given times")
    nodes: int = flag(64, "fine grid of equal steps in t that times are taken from")
    proxy_images: int = flag(1000, "images of the figure that is searched with")
    images: int = flag(10_000, "images of the FID that decides")
    features: str = flag("digits", "feature extractor")
    chunk: int = flag(256, "images generated at once")
    seed: int = flag(0, "seed of noise and labels; the search takes others than the FID")
    threads: int = flag(0, "CPU threads a process; 0 shares the cores out evenly")


def proxy(model: Teacher, sampler: str, measurement: Measurement, config: Config, fine: Tensor, device: torch.device):
    """indices of ``fine`` -> KID of ``proxy_images`` images along these times; the same seeds at every call."""
    real = measurement.reference.features
    assert real is not None
    indices = chunks(config.proxy_images, config.chunk)
    begins = [start([config.images + i for i in part], model.shape, model.classes, config.seed) for part in indices]

    def merit(path: Sequence[int]) -> float:
        features = []
        for begin in begins:
            x0 = generate(model.denoiser, sampler, fine[list(path)], begin, model.condition, device)
            features.append(measurement.extractor(to_uint8(model.decode(x0))).fid)
        kid, _ = fidelity.kid(torch.cat(features)[: config.proxy_images], real, subsets=1)
        return kid if kid == kid else float("inf")

    return merit


def main(argv: list[str] | None = None) -> None:
    with one_line_errors():
        config = parse(Config, __doc__.splitlines()[0], PRESETS, argv)
        model, data = teachers.load(config.model), datasets.load(config.data)
        data.pixels  # latents cannot be measured against  # noqa: B018
        check_match(model, data)
        check_steps(model, (*config.steps, config.nodes))
        if max(config.steps) > config.nodes:
            raise ValueError(
                f"--steps {max(config.steps)} on --nodes {config.nodes}: accepted are at most as many steps as nodes"
            )
        extractor = Extractor.create(config.features).fits(data.shape)
        run = Run.open(config)
        device = run.accelerator.device
        measurement = Measurement.of(extractor, data, run, images=config.images, chunk=config.chunk, seed=config.seed)
    model.to(device)
    sampler = model.sampler.get("name", "ddim")
    fine = uniform(model.denoiser.schedule, config.nodes)
    merit = proxy(model, sampler, measurement, config, fine, device)
    cells = []
    for n in config.steps:
        begin = [round(i * config.nodes / n) for i in range(n + 1)]
        out: list = [None]
        if run.main:
            out = [coordinate_descent(merit, begin, config.nodes + 1)]
            run.say(
                f"{n} steps: KID x1000 {1000 * merit(begin):.2f} -> {1000 * out[0][1]:.2f}, times {fine[out[0][0]].tolist()}"
            )
        found, _ = broadcast_object_list(out)[0]
        label = f"student@{n}"
        cells.append(Cell(label, "student", model, sampler, n, "uniform"))
        cells.append(Cell(label, "student", model, sampler, n, "searched", times=tuple(fine[found].tolist())))
    with disk_errors():
        report = measurement.report(run, f"Step times of {config.model}", cells, {"model": config.model})
    if run.main:
        finish(run, model, sampler, cells, report)
    run.say(f"report: {run.folder / 'report.html'}")
    run.close()


def finish(run: Run, model: Teacher, sampler: str, cells: list[Cell], report: dict) -> None:
    """The student with the better times of each step count, and its pipelines."""
    fid = {row["name"]: row["fid"] for row in report["rows"]}
    times = {}
    for usual, searched in zip(cells[::2], cells[1::2], strict=True):
        better = min(usual, searched, key=lambda cell: fid[cell.name])
        times[str(better.steps)] = better.grid_times.tolist()
        run.say(f"{better.steps} steps: FID {fid[usual.name]:.4f} uniform, {fid[searched.name]:.4f} searched")
    made = {"name": sampler, "grid": "searched", "steps": [int(n) for n in times], "times": times}
    better_model = replace(model, sampler=made)
    teachers.save(run.folder / "student.safetensors", better_model)
    stage.deliver(run, better_model)


if __name__ == "__main__":
    main()
