"""Consistency models: one- and few-step generators, distilled from a teacher or trained from scratch.

    accelerate launch recipes/consistency.py --method cd                        distilled from the embedded teacher
    accelerate launch recipes/consistency.py --method ict --from-scratch        trained on the data alone
    accelerate launch recipes/consistency.py --method ect --target-mix auto     between data and teacher, by noise level

Writes what recipes/progressive.py writes. What each method reaches stands in EXPERIMENTS.md.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import teachers
from distill.consistency import GAP_WEIGHTS
from distill.grid import GRIDS
from distill.regularize import RESIDUALS
from distill.train import Optimization, Shares
from eval import reference
from eval.features import Extractor
from recipes import data as datasets
from recipes.common import Run, disk_errors, duration, flag, one_line_errors, parse, processes
from recipes.matching import check_match, check_sampler, codec_of
from recipes.measure import OPPONENTS, Measurement, cost_in_calls, measured_against, opponents, own_cells
from recipes.methods import DISTANCE_NAMES, METHODS, check, check_levels, method_of, part_of
from recipes.probing import check_denoiser
from recipes.stage import deliver, plan, stage, trial
from teachers import Teacher
from teachers.unet import on_table, untrained, with_two_times

PRESETS: dict[str, dict] = {
    "default": {},
    "full": {"training_images": 1_600_000, "images": 10_000},
    "smoke": {"training_images": 1024, "images": 200, "sweep_steps": (1, 2), "steps": (1, 2)},
}


@dataclass(frozen=True)
class Config:
    preset: str = flag("default", "default, full, or smoke (everything in less than a minute)", choices=PRESETS)
    method: str = flag("cd", "cd, scd, meanflow or denoise from a teacher; ct, ict, ect or sct from data", choices=METHODS)
    teacher: str = flag("digits", "what is distilled, or what training starts from: " + teachers.ACCEPTED.replace("%", "%%"))
    from_scratch: bool = flag(False, "start from new weights and use no teacher at all")
    student: str | None = flag(
        None,
        "what training starts from: new weights ('new'), the teacher's on a table that stock pipelines know ('table'), or any"
        " --teacher; the teacher as it is where not given",
    )
    data: str = flag("digits", "what it is trained on: " + datasets.ACCEPTED)
    output_dir: str = flag("runs/consistency-digits", "a new directory, or one that holds the same run, which is continued")
    target_mix: str | None = flag(
        None, "part of the teacher in the target: a number from 0 to 1, or auto; the method's own where not given"
    )
    target: str = flag("mix", "mix of datum and teacher, or posterior-mean over the batch", choices=("mix", "posterior-mean"))
    training_images: int = flag(256_000, "training images")
    batch_size: int = flag(128, "images a step, over all processes")
    microbatch: int | None = flag(None, "most images at once in a process; more accumulate")
    lr: float = flag(1e-3, "learning rate; it falls linearly to 0")
    warmup_images: int = flag(4_000, "images over which the learning rate rises first")
    ema_halflife_images: float = flag(4_000, "half-life of the average of the weights that is kept")
    distance: str | None = flag(None, "distance of the two ends; the method's own where not given", choices=DISTANCE_NAMES)
    weight: str | None = flag(
        None, "weight by the gap of the two noise levels; the method's own where not given", choices=GAP_WEIGHTS
    )
    grid: str = flag("uniform", "cd, ct: time grid whose neighbouring times are pairs; the papers have karras", choices=GRIDS)
    grid_steps: int = flag(4, "cd: steps of the grid; the paper has 18")
    substeps: int = flag(2, "cd: teacher steps within a step of the grid")
    order: int = flag(2, "cd: 1 for Euler steps of the teacher, 2 for Heun", choices=(1, 2))
    regularize: tuple[str, ...] = flag((), f"terms to add, as name=weight: {', '.join(RESIDUALS)}")
    averaged_target: bool = flag(False, "take the other end from the EMA of the student")
    jvp: str = flag("finite", "scd, sct, meanflow: tangents by finite differences, or exact", choices=("finite", "exact"))
    jvp_step: float = flag(0.02, "step of finite differences in t; one like this sees past time embeddings that turn fast")
    sampler: str | None = flag(
        None, "how several steps are taken: ddim, consistency:GAMMA (part of the noise that is fresh), jump; the method's own"
    )
    steps: tuple[int, ...] = flag((1, 2, 4), "step counts of the student")
    channels: tuple[int, ...] = flag((32, 48), "new students: channels of the UNet, one a resolution")
    layers: int = flag(1, "new students: residual blocks a resolution")
    mixed_precision: str = flag("no", "autocast of the networks in training", choices=("no", "bf16", "fp16"))
    images: int = flag(2_000, "generated images a cell of the sweep")
    sweep_steps: tuple[int, ...] = flag((1, 2, 4), "steps at which the teacher's samplers are measured beside it")
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


def started(config: Config, teacher: Teacher | None, data: datasets.Data) -> Teacher:
    """What training starts from: the teacher, another model, or new weights."""
    if teacher is not None and config.student == "table":
        model = on_table(teacher)
    elif config.student not in (None, "new"):
        model = teachers.load(config.student)
    elif teacher is None or config.student == "new":
        classes = data.classes if teacher is None else teacher.classes
        model = untrained(data.shape, classes, config.channels, config.layers, config.seed)
        model = replace(model, codec=codec_of(data) if teacher is None else teacher.codec)
    else:
        model = teacher
    if teacher is not None and not model.told_as(teacher):
        raise ValueError(f"the student takes {model.conditions} and the teacher {teacher.conditions}: they must be the same")
    return with_two_times(model) if METHODS[config.method].two_times else model


def main(argv: list[str] | None = None) -> None:
    with one_line_errors():
        config = parse(Config, __doc__.splitlines()[0], PRESETS, argv)
        check(config)
        sampler_name = config.sampler or METHODS[config.method].sampler
        data = datasets.load(config.data)
        teacher = None if config.from_scratch else teachers.load(config.teacher)
        if teacher is not None:
            data = check_match(teacher, data, training=True)
        model = started(config, teacher, data)
        data = check_match(model, data, training=True)
        check_sampler(model, sampler_name)
        if teacher is not None:
            check_levels(teacher, model)
        model.parametric  # an oracle has no network  # noqa: B018
        Shares(config.batch_size, processes(), microbatch=config.microbatch)
        extractor = Extractor.create(config.features).fits(model.image_shape)
        real = measured_against(config.reference, data, extractor)
        method = method_of(config, teacher, model, data)
        warning = None if teacher is None else check_denoiser(teacher, data, config.seed, config.force)
        trial(method, model, data)
        run = Run.open(config, config.mixed_precision)
    if warning:
        run.say(f"warning: {warning}")
    for loaded in (model, teacher):
        if loaded is not None:
            loaded.to(run.accelerator.device)
    if part_of(config) == "auto":
        method = method_of(config, teacher, model, data, run.accelerator.device)
    measurement = Measurement.of(extractor, real, run, images=config.images, chunk=config.chunk, seed=config.seed)
    cells = []
    if teacher is not None:
        cells += opponents(teacher, "teacher", config.sweep_steps, OPPONENTS)
        cells += opponents(teacher, "teacher", (64,), ("ddim",))
    how = Optimization(
        config.training_images, config.batch_size, config.microbatch, config.lr, warmup_images=config.warmup_images,
        ema_halflife_images=config.ema_halflife_images,
    )  # fmt: skip
    title = f"{config.method} {'from scratch' if teacher is None else 'from ' + config.teacher}"
    plan(run, title, model, method, data, [how], cost_in_calls(cells) + sum(config.steps), config.images)

    sampler = {"name": sampler_name, "grid": "uniform", "steps": list(config.steps)}
    record = {
        "method": config.method,
        "of": None if teacher is None else config.teacher,
        "data": data.name,
        "boundary": f"f(x, t) = x at t = {model.denoiser.schedule.t_clean:g}, t_min = {model.denoiser.schedule.t_min:g}",
    }
    student, seconds = stage(run, config.method, model, method, data, how, sampler=sampler, record=record, seed=config.seed)
    if run.main:
        teachers.save(run.folder / "student.safetensors", student)
    cells += own_cells(student, config.method, training_seconds=seconds)
    with disk_errors():
        report = measurement.report(run, title, cells, {"method": config.method, "training": duration(seconds)})
    deliver(run, student)
    run.say(f"\n{report['verdict']}\nreport: {run.folder / 'report.html'}")
    run.close()


if __name__ == "__main__":
    main()
