"""Progressive distillation (Salimans & Ho 2022): a ladder of students, each doing two steps of the last in one.

    accelerate launch recipes/progressive.py                       digits, 64 -> 32 -> ... -> 1, then the sweep and the export
    accelerate launch recipes/progressive.py --preset full         the same with more images, at most an hour on two cores
    torchrun --nproc_per_node 2 recipes/progressive.py             two processes (the way to have several on CPUs)

Writes runs/progressive-<data>: stages/<steps>/student.safetensors, student.safetensors, report.html, pipeline/ and more.
What the presets reach stands in EXPERIMENTS.md.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import teachers
from distill.denoise import Denoise
from distill.denoiser import ask_in
from distill.distance import DISTANCES, WEIGHTS
from distill.grid import uniform
from distill.progressive import Progressive
from distill.target import Mix
from distill.train import Optimization, Shares
from eval import reference
from eval.features import Extractor
from recipes import data as datasets
from recipes.common import Run, disk_errors, duration, flag, one_line_errors, parse, processes
from recipes.matching import check_match
from recipes.measure import OPPONENTS, Measurement, cost_in_calls, measured_against, opponents, own_cells
from recipes.probing import check_denoiser
from recipes.stage import deliver, plan, stage
from teachers import Teacher
from teachers.unet import on_table

PRESETS: dict[str, dict] = {
    "default": {},
    "full": {"images_per_stage": 240_000, "images": 10_000},
    "smoke": {"start_steps": 8, "images_per_stage": 1024, "images": 200, "sweep_steps": (1, 2)},
}


@dataclass(frozen=True)
class Config:
    preset: str = flag("default", "default, full, or smoke (everything in less than a minute)", choices=PRESETS)
    teacher: str = flag("digits", "what is distilled: " + teachers.ACCEPTED.replace("%", "%%"))
    data: str = flag("digits", "what it is distilled on: " + datasets.ACCEPTED)
    student: str | None = flag(
        None, "'table': the teacher's weights on a table that stock pipelines know; the teacher as it is where not given",
        choices=("table",),
    )  # fmt: skip
    output_dir: str = flag("runs/progressive-digits", "a new directory, or one that holds the same run, which is continued")
    start_steps: int = flag(64, "steps of the teacher's DDIM sampler")
    end_steps: int = flag(1, "steps of the last student, start-steps divided by a power of two")
    images_per_stage: int = flag(32_000, "training images of a stage; the last two stages take twice as many")
    batch_size: int = flag(128, "images a step, over all processes")
    microbatch: int | None = flag(None, "most images at once in a process; more accumulate")
    lr: float = flag(1e-3, "learning rate at the start of a stage; it falls linearly to 0")
    warmup_images: int = flag(4_000, "images over which the learning rate rises first")
    weight: str = flag("truncated_snr", "weight of the x0 error", choices=WEIGHTS)
    distance: str = flag("l2", "distance of student and target", choices=DISTANCES)
    guidance: float = flag(1.0, "classifier-free guidance baked into the student; 1 is none")
    mixed_precision: str = flag("no", "autocast of the networks in training", choices=("no", "bf16", "fp16"))
    images: int = flag(2_000, "generated images a cell of the sweep")
    sweep_steps: tuple[int, ...] = flag((1, 2, 4, 8), "steps at which the teacher's samplers are measured beside it")
    features: str = flag("digits", "feature extractor of FID")
    reference: str | None = flag(
        None, f"a stored reference instead of --data's images, needed by latents: {reference.ACCEPTED}"
    )
    chunk: int = flag(256, "images generated at once in the sweep")
    seed: int = flag(0, "seed of training and sweep")
    log_with: str | None = flag(None, "an Accelerate tracker", choices=("tensorboard", "wandb"))
    threads: int = flag(0, "CPU threads a process; 0 shares the cores out evenly")
    resume: bool = flag(True, "continue a run of the same configuration in the output directory")
    force: bool = flag(False, "distil a teacher that the probe finds to be no denoiser, with a warning")

    MAY_CHANGE: ClassVar = ("force",)


def ladder(start: int, end: int) -> list[int]:
    """The students' step counts. ValueError where ``end`` is not ``start`` divided by a power of two."""
    steps = [start]
    while steps[-1] > max(1, end) and steps[-1] % 2 == 0:
        steps.append(steps[-1] // 2)
    if start < 2 or steps[-1] != end or len(steps) < 2:
        accepted = [start >> k for k in range(1, start.bit_length()) if start % (1 << k) == 0]
        raise ValueError(
            f"--end-steps {end} is not --start-steps {start} halved some times: accepted are {accepted or 'none: start is odd'}"
        )
    return steps[1:]


def main(argv: list[str] | None = None) -> None:
    with one_line_errors():
        config = parse(Config, __doc__.splitlines()[0], PRESETS, argv)
        steps = ladder(config.start_steps, config.end_steps)
        teacher, data = teachers.load(config.teacher), datasets.load(config.data)
        data = check_match(teacher, data, training=True)
        teacher.parametric  # an oracle has no network  # noqa: B018
        model = on_table(teacher) if config.student else teacher
        target = teacher.guided(config.guidance)
        Shares(config.batch_size, processes(), microbatch=config.microbatch)
        extractor = Extractor.create(config.features).fits(teacher.image_shape)
        real = measured_against(config.reference, data, extractor)
        warning = check_denoiser(teacher, data, config.seed, config.force)
        run = Run.open(config, config.mixed_precision)
    if warning:
        run.say(f"warning: {warning}")
    device = run.accelerator.device
    measurement = Measurement.of(extractor, real, run, images=config.images, chunk=config.chunk, seed=config.seed)
    cells = opponents(teacher.to(device), "teacher", config.sweep_steps, OPPONENTS, config.guidance)
    cells += opponents(teacher, "teacher", (config.start_steps,), ("ddim",), config.guidance)
    title = f"progressive distillation of {config.teacher}: {' -> '.join(map(str, [config.start_steps, *steps]))} steps"
    model.to(device)
    first = Progressive(
        ask_in(target, model.denoiser.schedule), uniform(model.denoiser.schedule, 2 * steps[0]), config.weight, config.distance
    )
    stages = [optimization(config, n) for n in steps]
    plan(run, title, model, first, data, stages, cost_in_calls(cells) + sum(steps), config.images)
    record = {"method": "progressive", "of": config.teacher, "data": data.name, "guidance": config.guidance}

    seconds = 0.0
    if config.student or model.parametric.prediction in ("eps", "score"):
        warm_start = optimization(config, config.start_steps)
        model, seconds = stage(
            run, "v", as_v(model), Denoise(Mix(target)), data, warm_start, sampler={}, record=record, seed=config.seed
        )
        target = model.denoiser
    for n, how in zip(steps, stages, strict=True):
        method = Progressive(target, uniform(model.denoiser.schedule, 2 * n), config.weight, config.distance)
        sampler = {"name": "ddim", "grid": "uniform", "steps": [n]}
        model, seconds = stage(
            run, str(n), model, method, data, how, sampler=sampler, record=record, seed=config.seed, spent=seconds
        )
        target = model.denoiser
        cells += own_cells(model, f"student@{n}", training_seconds=seconds)
    if run.main:
        teachers.save(run.folder / "student.safetensors", model)

    facts = {"teacher": config.teacher, "training": duration(seconds)}
    with disk_errors():
        report = measurement.report(run, f"Progressive distillation of {config.teacher}", cells, facts)
    deliver(run, model)
    run.say(f"\n{report['verdict']}\nreport: {run.folder / 'report.html'}")
    run.close()


def optimization(config: Config, steps: int) -> Optimization:
    """How the stage to so many steps is trained: the last two, to 2 and to 1, take twice as many images."""
    images = config.images_per_stage * (2 if steps <= 2 else 1)
    return Optimization(images, config.batch_size, config.microbatch, config.lr, warmup_images=config.warmup_images)


def as_v(model: Teacher) -> Teacher:
    """The same weights read as a v prediction: near the data eps and v agree, and near pure noise eps has no student."""
    return replace(model, denoiser=replace(model.parametric, prediction="v"))


if __name__ == "__main__":
    main()
