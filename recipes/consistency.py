"""Consistency models: one- and few-step generators, distilled from a teacher or trained from scratch.

    accelerate launch recipes/consistency.py --method cd                        distilled from the embedded teacher
    accelerate launch recipes/consistency.py --method ict --from-scratch        trained on the data alone
    accelerate launch recipes/consistency.py --method ect --target-mix auto     between data and teacher, by noise level

Writes what recipes/progressive.py writes. What each method reaches stands in EXPERIMENTS.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import teachers
from distill.consistency import GAP_WEIGHTS, Consistency, Gap, Neighbours, ct_steps, ict_steps
from distill.denoise import Denoise
from distill.denoiser import DenoiserLike
from distill.distance import DISTANCES
from distill.grid import GRIDS
from distill.regularize import RESIDUALS, Regularized
from distill.scm import ContinuousConsistency
from distill.target import Datum, Mix, PosteriorMean, Target, errors
from distill.train import Method, Optimization, Shares
from eval.features import Extractor
from recipes import data as datasets
from recipes.common import Run, disk_errors, duration, flag, one_line_errors, parse, processes
from recipes.measure import OPPONENTS, Measurement, check_match, cost_in_calls, opponents, own_cells
from recipes.stage import deliver, plan, stage
from teachers import Teacher
from teachers.unet import untrained

PRESETS: dict[str, dict] = {
    "default": {},
    "full": {"training_images": 1_200_000, "images": 10_000},
    "smoke": {"training_images": 1024, "images": 200, "sweep_steps": (1, 2), "steps": (1, 2)},
}
KINDS = ("cd", "ct", "ict", "ect", "scd", "sct", "denoise")
LEVELS = torch.linspace(-9, 13, 45)  # log-SNRs at which --target-mix auto compares datum and teacher


@dataclass(frozen=True)
class Config:
    preset: str = flag("default", "default, full, or smoke (everything in less than a minute)", choices=PRESETS)
    method: str = flag("cd", "cd, scd or denoise from a teacher; ct, ict, ect or sct from data", choices=KINDS)
    teacher: str = flag("digits", "what is distilled, or what training starts from: " + teachers.ACCEPTED.replace("%", "%%"))
    from_scratch: bool = flag(False, "start from new weights and use no teacher at all")
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
    distance: str | None = flag(None, "distance of the two ends; the method's own where not given", choices=DISTANCES)
    weight: str | None = flag(
        None, "weight by the gap of the two noise levels; the method's own where not given", choices=GAP_WEIGHTS
    )
    grid: str = flag("uniform", "cd, ct: time grid whose neighbouring times are pairs; the papers have karras", choices=GRIDS)
    grid_steps: int = flag(4, "cd: steps of the grid; the paper has 18")
    substeps: int = flag(2, "cd: teacher steps within a step of the grid")
    order: int = flag(2, "cd: 1 for Euler steps of the teacher, 2 for Heun", choices=(1, 2))
    regularize: tuple[str, ...] = flag((), f"terms to add, as name=weight: {', '.join(RESIDUALS)}")
    averaged_target: bool = flag(False, "take the other end from the EMA of the student")
    jvp: str = flag("exact", "scd, sct: exact forward-mode tangents, or finite differences", choices=("exact", "finite"))
    sampler: str = flag(
        "ddim", "how several steps are taken: ddim, or consistency (fresh noise)", choices=("ddim", "consistency")
    )
    steps: tuple[int, ...] = flag((1, 2, 4), "step counts of the student")
    channels: tuple[int, ...] = flag((32, 48), "from scratch: channels of the UNet, one a resolution")
    layers: int = flag(1, "from scratch: residual blocks a resolution")
    mixed_precision: str = flag("no", "autocast of the networks in training", choices=("no", "bf16", "fp16"))
    images: int = flag(2_000, "generated images a cell of the sweep")
    sweep_steps: tuple[int, ...] = flag((1, 2, 4), "steps at which the teacher's samplers are measured beside it")
    features: str = flag("digits", "feature extractor of FID")
    chunk: int = flag(256, "images generated at once in the sweep")
    seed: int = flag(0, "seed of training and sweep")
    log_with: str | None = flag(None, "an Accelerate tracker", choices=("tensorboard", "wandb"))
    threads: int = flag(0, "CPU threads a process; 0 shares the cores out evenly")
    resume: bool = flag(True, "continue a run of the same configuration in the output directory")


@dataclass(frozen=True)
class Usual:
    """A method with the settings that serve it best here (EXPERIMENTS.md has the papers' beside them): built from
    (config, target, common options), with the teacher's part in the target."""

    build: Callable[[Config, Target, dict[str, Any]], Method]
    mix: float
    weight: str = "one"
    distance: str = "l2"


METHODS: dict[str, Usual] = {
    "cd": Usual(
        lambda c, target, o: Consistency(
            target, Neighbours(lambda _: c.grid_steps, grid=c.grid), order=c.order, substeps=c.substeps, **o
        ),
        1.0,
        "truncated_snr",
    ),
    "ct": Usual(lambda c, target, o: Consistency(target, Neighbours(ct_steps(), grid=c.grid), **o), 0.0, "inverse_level"),
    "ict": Usual(
        lambda c, target, o: Consistency(target, Neighbours(ict_steps(), (-1.1, 2.0)), **o), 0.0, "inverse_gap", "pseudo_huber"
    ),
    "ect": Usual(lambda c, target, o: Consistency(target, Gap(), **o), 0.0, "inverse_level"),
    "scd": Usual(lambda c, target, o: ContinuousConsistency(target, jvp=c.jvp), 1.0),
    "sct": Usual(lambda c, target, o: ContinuousConsistency(target, jvp=c.jvp), 0.0),
}


def part_of(config: Config) -> float | str:
    """The part of the teacher in the target, or "auto". ValueError for anything else."""
    if config.target_mix is None:
        return 0.0 if config.from_scratch or config.method == "denoise" else METHODS[config.method].mix
    if config.target_mix == "auto":
        return "auto"
    try:
        part = float(config.target_mix)
    except ValueError:
        raise ValueError(f"--target-mix {config.target_mix!r}: accepted are auto and numbers from 0 to 1") from None
    if not 0 <= part <= 1:
        raise ValueError(f"--target-mix {part:g}: accepted are auto and numbers from 0 to 1")
    return part


def check(config: Config) -> None:
    """ValueError where the flags contradict each other."""
    if not config.from_scratch:
        return
    if config.method in ("cd", "scd", "denoise"):
        raise ValueError(f"--method {config.method} distils a teacher and --from-scratch has none: choose ct, ict, ect or sct")
    if config.target_mix not in (None, "0"):
        raise ValueError(f"--target-mix {config.target_mix} needs a teacher and --from-scratch has none")


def target_of(config: Config, teacher: DenoiserLike | None, data: datasets.Data) -> Target:
    """What stands for x0 in each step, as --target and --target-mix say."""
    part = part_of(config)
    if config.target == "posterior-mean":
        return PosteriorMean()
    if teacher is None or part == 0:
        return Datum()
    if part != "auto":
        return Mix(teacher, float(part))
    some = torch.randperm(len(data.images), generator=torch.Generator().manual_seed(config.seed))[:4096]
    labels = None if data.labels is None else data.labels[some]
    x0 = data.images[some].float() / 127.5 - 1
    found = errors(teacher, teacher.schedule, x0, labels, LEVELS, torch.Generator().manual_seed(config.seed))
    return Mix(teacher, found["best"], LEVELS)


def terms_of(config: Config) -> tuple[tuple[str, float], ...]:
    """--regularize as names and weights. ValueError for anything else."""
    terms = []
    for term in config.regularize:
        name, _, weight = term.partition("=")
        if name not in RESIDUALS or not weight.replace(".", "", 1).isdigit():
            raise ValueError(f"--regularize {term}: accepted is name=weight with a name of {', '.join(RESIDUALS)}")
        terms.append((name, float(weight)))
    return tuple(terms)


def method_of(config: Config, teacher: DenoiserLike | None, data: datasets.Data) -> Method:
    method = bare_method(config, teacher, data)
    terms = terms_of(config)
    return Regularized(method, terms) if terms else method


def bare_method(config: Config, teacher: DenoiserLike | None, data: datasets.Data) -> Method:
    if config.method == "denoise":
        return Denoise(teacher)
    usual = METHODS[config.method]
    options = {"weight": config.weight or usual.weight, "distance": config.distance or usual.distance}
    return usual.build(config, target_of(config, teacher, data), options | {"averaged": config.averaged_target})


def main(argv: list[str] | None = None) -> None:
    with one_line_errors():
        config = parse(Config, __doc__.splitlines()[0], PRESETS, argv)
        check(config)
        data = datasets.load(config.data)
        model: Teacher
        if config.from_scratch:
            model = untrained(data.shape, data.classes, config.channels, config.layers, config.seed)
        else:
            model = teachers.load(config.teacher)
        check_match(model, data)
        teacher = None if config.from_scratch else model.denoiser
        part_of(config)
        model.parametric  # an oracle has no network  # noqa: B018
        Shares(config.batch_size, processes(), microbatch=config.microbatch)
        extractor = Extractor.create(config.features)
        method = method_of(config, teacher, data)
        run = Run.open(config, config.mixed_precision)
    model.to(run.accelerator.device)
    measurement = Measurement.of(extractor, data, run, images=config.images, chunk=config.chunk, seed=config.seed)
    cells = []
    if teacher is not None:
        cells += opponents(model, "teacher", config.sweep_steps, OPPONENTS)
        cells += opponents(model, "teacher", (64,), ("ddim",))
    how = Optimization(
        config.training_images, config.batch_size, config.microbatch, config.lr, warmup_images=config.warmup_images,
        ema_halflife_images=config.ema_halflife_images,
    )  # fmt: skip
    title = f"{config.method} {'from scratch' if teacher is None else 'from ' + config.teacher}"
    plan(run, title, model, method, data, [how], cost_in_calls(cells) + sum(config.steps), config.images)

    sampler = {"name": config.sampler, "grid": "uniform", "steps": list(config.steps)}
    record = {"method": config.method, "of": None if teacher is None else config.teacher, "data": data.name}
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
