"""Train a consistency model: a one- and few-step generator, distilled from a teacher or trained from scratch.

    accelerate launch recipes/consistency.py --method cd                        distilled from the embedded teacher
    accelerate launch recipes/consistency.py --method ict --from-scratch        trained on the data alone
    accelerate launch recipes/consistency.py --method ect --target-mix auto     between data and teacher, by noise level

Song et al., Consistency Models, arXiv 2303.01469. Each method's own paper is named in its file under distill/.
Writes what recipes/progressive.py writes. EXPERIMENTS.md has the figures of each method.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from recipes.common import flags
from recipes.common.accepted import CHANNELS, LAYERS, LEARNING_RATE, STEPS, TRAINED
from recipes.common.cli import flag, flags_first, measuring_flag, model_flag, one_line_errors, parse, training_flag
from recipes.common.method_checks import check_carrying, check_flags, check_range, from_images, without_images
from recipes.common.method_flags import MethodFlags
from recipes.common.methods import METHODS, START_LR, lr_of, midtraining, start_name, steps_of, teacher_weight, terms_of
from recipes.common.real_images import CIFAR10_STUDENTS, FASHION_STUDENTS, REAL_IMAGES

PRESETS: dict[str, dict] = {
    "default": {},  # cd: FID / teacher's 1.75, 0.67, 0.64 at 1, 2, 4 steps (n = 10,000); 8 to 15 minutes on two CPU cores
    "full": {"training_images": 1_600_000, "images": 10_000},  # cd: 1.36, 0.60, 0.60; about 50 minutes
    "lcm": {  # latent consistency models (2310.04378) of a text-to-image teacher: pairs of a grid of 50 DDIM steps, scales as an input
        "grid_steps": 50, "substeps": 1, "order": 1, "weight": "one", "averaged_target": True, "sampler": "consistency",
        "guidance_range": (3.0, 15.0),
    },
    "smoke": {"training_images": 1024, "images": 200, "sweep_steps": (1, 2), "steps": (1, 2)},  # about a minute, no quality
    "fashion": FASHION_STUDENTS | {"training_images": 128_000},
    "cifar10": CIFAR10_STUDENTS
    | {
        "training_images": 25_600_000, "images": 50_000, "batch_size": 512, "lr": 1e-4, "warmup_images": 50_000,
        "ema_halflife_images": 500_000, "mixed_precision": "bf16",
    },  # for a GPU; tried with short trainings alone
}  # fmt: skip

POINTS = 32  # of a path from noise, where --start denoise has no images


@dataclass(frozen=True)
class Config(MethodFlags, flags.DistillationFlags):
    preset: str = flag("default", f"smoke is a trial run of about a minute; {REAL_IMAGES}", choices=PRESETS)
    output_dir: str = flags.output_dir("runs/consistency-digits")
    student: str | None = model_flag(
        None,
        "start from new weights (new), from the teacher's on a table that stock pipelines support (table), or from any model (accepted:"
        " --help teacher); otherwise the teacher is copied",
    )
    channels: tuple[int, ...] = model_flag(
        (32, 48), "new students: channels of the UNet, one per resolution", short=False, **CHANNELS
    )
    layers: int = model_flag(1, "new students: residual blocks per resolution", short=False, **LAYERS)
    training_images: int = training_flag(256_000, "training images", **TRAINED)
    lr: float | None = training_flag(  # type: ignore[assignment]
        None, "learning rate; it falls linearly to 0", own=lambda v: f"{METHODS[v['method']].lr:g}", **LEARNING_RATE
    )
    ema_halflife_images: float = training_flag(
        4_000, "half-life of the average of the weights that is kept", short=False, **TRAINED
    )
    sweep_steps: tuple[int, ...] = measuring_flag(
        (1, 2, 4), "step counts of the teacher's training-free samplers", short=False, **STEPS
    )


flags_first(__name__, Config, __doc__, PRESETS)

import teachers
from distill.denoiser import under_autocast
from distill.grid import uniform
from distill.regression import Regression
from distill.sampling import Sampling
from distill.self_conditioning import self_conditioned
from distill.target import DataSample, Mix
from distill.train import Method, Optimization
from recipes.common.building import method_of, student_of
from recipes.common.checks import check_levels, check_match, check_sampler, check_steps, check_unsharded, codec_of, conditioned
from recipes.common.guidance import guided, taking_scale
from recipes.common.interrupts import interruptible
from recipes.common.lora import with_lora
from recipes.common.outline import teacher_of
from recipes.common.training import Experiment
from recipes.data import sets, source
from recipes.data.sets import Data
from teachers import Teacher
from teachers.students import on_table, untrained


@interruptible()
def main(argv: list[str] | None = None) -> None:
    with one_line_errors():
        config = parse(Config, __doc__, PRESETS, argv)
        teacher = None if config.from_scratch else teacher_of(config, source.load)
        e = prepare(config, teacher, sets.load(config.data))
    distil(config, e)


def distil(config: Config, e: Experiment) -> None:
    """Train and measure a student."""
    with e:
        if e.teacher is not None:
            e.add_baselines(64)
        learn(config, e)


def learn(config: Config, e: Experiment, plan: bool = True) -> None:
    """Train f(x_t, t) ~ sg f(x_s, s) along the target's path (2303.01469, Alg. 2 and 3), or by another method of `METHODS`.

    ``plan``: say first what it will take.
    """
    teacher, student = e.teacher, e.student
    config = fitting(config, teacher, e.data)
    if teacher is not None:
        teacher = replace(teacher, denoiser=under_autocast(guided(config, teacher, student), config.autocast_of_teacher))
    estimated = teacher_weight(config) == "auto" and not student.hollow
    device = e.run.device if estimated else None  # where the teacher's bias is estimated
    method, first = method_of(config, teacher, student, e.data, config.seed, device), start_of(config, teacher)
    if plan:
        e.plan(
            method,
            [budget(config), *([budget(config, of_start=True)] if first else [])],
            steps_of(config),
            sampling=sampling(config),
        )
    if first:
        student = e.stage(f"start-{start_name(config)}", student, first, budget(config, of_start=True))
    e.stage(config.method, student, method, budget(config), sampling(config), label=config.method)


def prepare(config: Config, teacher: Teacher | None, data: Data) -> Experiment:
    """Check that teacher, student, data and configuration fit together, and claim the output directory.

    Raises ValueError in one line, before anything is written, where they do not.
    """
    config = fitting(config, teacher, data)
    check_flags(config, config.student)
    if config.checkpoint_activations and any(name == "fokker-planck" for name, _ in terms_of(config)):
        raise ValueError(
            "--regularize fokker-planck differentiates through the network twice, which checkpoints do not allow:"
            " leave --checkpoint-activations out"
        )
    config.check_precision(teacher)
    if config.method == "unrolled" and config.unroll > 1:
        check_unsharded(f"--unroll {config.unroll}")
    if teacher is not None:
        teacher, data = conditioned(teacher, data, config)
        data = check_match(teacher, data, training=True)
    teacher, student = with_lora(config, teacher, initial_student(config, teacher, data), config.teacher, config.seed)
    data = check_match(student, data, training=True)
    check_sampler(student, sampling(config))
    check_steps(student, (*steps_of(config), config.grid_steps))
    if teacher is not None:
        check_levels(teacher, student)
    schedule = student.denoiser.schedule
    record: dict = {
        "method": config.method,
        "of": None if teacher is None else config.teacher,
        "data": data.name,
        "boundary": f"f(x, t) = x at t = {schedule.t_clean:g}, t_min = {schedule.t_min:g}",
    }
    title = f"{config.method} {'from scratch' if teacher is None else 'from ' + config.teacher}"
    if student.guidance is not None:
        record["guidance"] = student.guidance.describe()
    elif config.guidance != 1:
        record["guidance"] = config.guidance
    target = teacher and replace(teacher, denoiser=guided(config, teacher, student))
    trial = method_of(config, target, student, data, config.seed)
    return Experiment.open(config, teacher, student, data, title=title, record=record, trial=trial, averaged=True)


def fitting(config: Config, teacher: Teacher | None, data: Data) -> Config:
    """Return the configuration for data without images, or for a teacher that does not start from noise. Raises ValueError."""
    config = without_images(config) if data.imageless else config
    return config if teacher is None or teacher.source is None else from_images(config)


def initial_student(config: Config, teacher: Teacher | None, data: Data) -> Teacher:
    """Return the model that training starts from: the teacher, another model, or new weights.

    Raises ValueError where it is not conditioned as the teacher is.
    """
    if teacher is not None and config.student == "table":
        student = on_table(teacher)
    elif config.student not in (None, "new"):
        student = teachers.load(config.student)
    elif teacher is None or config.student == "new":
        classes = data.classes if teacher is None else teacher.classes
        student = untrained(data.sample_shape, classes, config.channels, config.layers, config.seed)
        student = replace(student, codec=codec_of(data) if teacher is None else teacher.codec)
    else:
        student = teacher
    if teacher is not None and not student.same_conditioning(teacher):
        raise ValueError(f"the student takes {student.conditions} and the teacher {teacher.conditions}: they must be the same")
    if teacher is not None and teacher.embeddings is not None:
        student = student.with_conditions(teacher.embeddings)
    if self_conditioned(student.denoiser):
        check_carrying(config)
    student = taking_scale(config, teacher, student_of(config, student))
    if student.guidance is not None:
        check_range(config)
    return student


def start_of(config: Config, teacher: Teacher | None) -> Method | None:
    """Return the method that prepares the student; None where there is none."""
    if start_name(config) == "as-is":
        return None
    target = DataSample() if teacher is None else Mix(teacher.denoiser)
    if start_name(config) == "denoise":
        times = None
        if config.data_free and teacher is not None:
            times = uniform(teacher.denoiser.schedule, POINTS)
        return Regression(target, times=times)
    return midtraining(target, jumps=METHODS[config.method].two_times, data_free=config.data_free)


def sampling(config: Config) -> Sampling:
    """Return how the student is sampled."""
    return Sampling.parse(config.sampler or METHODS[config.method].sampler, steps=steps_of(config))


def budget(config: Config, of_start: bool = False) -> Optimization:
    """Return the training of the student, or that of its start. Both together have the images of the configuration."""
    defaults = METHODS[config.method]
    part = 0.0 if start_name(config) == "as-is" else config.start_part or defaults.start_part
    images = round(config.training_images * (part if of_start else 1 - part))
    lr = config.start_lr or config.lr or START_LR if of_start else lr_of(config, config.lr)
    return Optimization(
        images, config.batch_size, config.microbatch, lr, warmup_images=config.warmup_images,
        ema_halflife_images=config.ema_halflife_images, optimizer=config.optimizer,
    )  # fmt: skip


if __name__ == "__main__":
    main()
