"""Distil a diffusion model progressively: a ladder of students, each doing two steps of the last one in one step.

    accelerate launch recipes/progressive.py                       digits, 64 -> 16 -> 8 -> 4 -> 2 -> 1 steps, then the report
    accelerate launch recipes/progressive.py --preset full         the same with more images
    torchrun --nproc_per_node 2 recipes/progressive.py             two processes (on CPUs too)

Salimans & Ho, Progressive Distillation for Fast Sampling of Diffusion Models, arXiv 2202.00512, Alg. 2.
Writes runs/progressive-digits: stages/<steps>/student.safetensors, student.safetensors, report.html, pipeline/ and more.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import ClassVar

from distill import names
from recipes.common import flags
from recipes.common.accepted import LEARNING_RATE, STEPS, TRAINED
from recipes.common.cli import flag, flags_first, method_flag, model_flag, one_line_errors, parse, training_flag
from recipes.common.real_images import CIFAR10_STUDENTS, FASHION_STUDENTS, REAL_IMAGES

PRESETS: dict[str, dict] = {
    "default": {},  # FID / teacher's 1.02, 1.08, 1.30, 1.64 at 8, 4, 2, 1 steps (n = 10,000); about 6 minutes on two CPU cores
    "full": {"images_per_stage": 240_000, "images": 10_000},  # about 40 minutes
    "smoke": {"start_steps": 8, "images_per_stage": 1024, "images": 200, "sweep_steps": (1, 2)},  # about a minute, no quality
    "fashion": FASHION_STUDENTS | {"output_dir": "runs/fashion/progressive", "images_per_stage": 48_000},
    "cifar10": CIFAR10_STUDENTS
    | {
        "output_dir": "runs/cifar10/progressive", "images_per_stage": 2_000_000, "images": 50_000, "batch_size": 512, "lr": 2e-4,
        "warmup_images": 50_000, "mixed_precision": "bf16",
    },  # for a GPU; tried with short trainings alone
}  # fmt: skip

GUIDED = 3  # times the images of a stage for the stage in which a student learns guidance
FIRST_TRY = "first-try"  # the file of a student that is trained again with twice the images


@dataclass(frozen=True)
class Config(flags.DistillationFlags):
    preset: str = flag("default", f"smoke is a trial run of about a minute; {REAL_IMAGES}", choices=PRESETS)
    output_dir: str = flags.output_dir("runs/progressive-digits")
    student: str | None = model_flag(
        None,
        "table: train the teacher's weights on a table that stock pipelines support; otherwise the teacher is copied",
        choices=("table",),
        short=False,
    )
    start_steps: int = flag(64, "steps of the teacher's DDIM sampler", at_least=2, at_most=STEPS["at_most"])
    end_steps: int = flag(1, "steps of the last student: start-steps divided by a power of two", **STEPS)
    images_per_stage: int = training_flag(
        24_000, "training images per stage; stages to 2 and 1 steps take twice as many, those to more than 8 half", **TRAINED
    )
    lr: float = training_flag(1.5e-3, "learning rate; it falls linearly to 0 over each stage", **LEARNING_RATE)
    warmup_images: int = training_flag(
        1_300, "images over which the learning rate rises at the start of a stage", short=False, **(TRAINED | {"at_least": 0})
    )
    weight: str = method_flag("truncated_snr", "weight of the x0 error", choices=names.WEIGHTS, short=False)
    distance: str = method_flag("l2", "distance of student and target", choices=names.DISTANCES, short=False)
    skip: tuple[int, ...] | None = flag(
        None,
        "step counts to leave out: the stage after one does four steps in one, or more; 0 leaves out none",
        own=lambda v: "half of start-steps, if these are 64 or more",
        short=False,
        **(STEPS | {"at_least": 0}),
    )
    max_fid_ratio: float | None = flag(
        None,
        "most that a stage may multiply the FID by: above it, the stage is trained again with twice the images, and then the ladder ends",
        short=False,
        above=0,
        at_most=1e12,
    )
    rerun: int | None = flag(
        None,
        "train the finished stage to so many steps and all after it again, with other random numbers",
        short=False,
        **STEPS,
    )
    data_free: bool = method_flag(
        False, "train on the teacher's own paths from pure noise and use no training image", short=False
    )

    MAY_CHANGE: ClassVar = (*flags.DistillationFlags.MAY_CHANGE, "rerun")


flags_first(__name__, Config, __doc__, PRESETS)

from distill.denoiser import DenoiserLike, Guided, on_schedule, under_autocast
from distill.distance import DISTANCES, WEIGHTS
from distill.files import write_json
from distill.grid import uniform
from distill.progressive import Progressive
from distill.regression import Regression
from distill.rng import seed_of
from distill.sampling import Sampling
from distill.target import Mix
from distill.train import Optimization
from recipes.common.checks import check_match, check_steps, conditioned
from recipes.common.guidance import guided, taking_scale
from recipes.common.interrupts import interruptible
from recipes.common.lora import with_lora
from recipes.common.outline import teacher_of
from recipes.common.training import Experiment
from recipes.data import sets, source
from recipes.data.sets import Data
from teachers import Teacher
from teachers.students import on_table
from teachers.teacher import require_network


@interruptible()
def main(argv: list[str] | None = None) -> None:
    with one_line_errors():
        config = parse(Config, __doc__, PRESETS, argv)
        e = prepare(config, teacher_of(config, source.load), sets.load(config.data))
    distil(config, e)


def distil(config: Config, e: Experiment) -> None:
    """Train and measure the students of all stages."""
    with e:
        e.add_baselines(config.start_steps)
        learn(config, e)


def learn(config: Config, e: Experiment, plan: bool = True) -> None:
    """Salimans & Ho 2202.00512, Alg. 2. ``plan``: say first what it will take."""
    assert e.teacher is not None
    config = replace(config, data_free=config.data_free or e.data.imageless)
    steps, student, precision = ladder(config), e.student, config.autocast_of_teacher
    target = under_autocast(guided(config, e.teacher, student), precision)
    pairs = list(pairwise([config.start_steps, *steps]))
    if plan:
        name, calls = warm_start(config, e.teacher, student), pairs[0][0] // pairs[0][1]
        taught = under_autocast(student.denoiser, precision) if name else target  # by the student that was warmed up
        first = stage_loss(config, on_schedule(taught, student.denoiser.schedule), *pairs[0])
        warm = [warm_budget(config, name)] if name else []
        more = sum(budget(config, n).trained_images * (m // n - calls) for m, n in pairs)
        more += sum(stage.trained_images * (1 + isinstance(target, Guided) - calls) for stage in warm)
        e.plan(first, [*warm, *(budget(config, n) for n in steps)], steps, more=more)
    restart(config, e, steps)
    if name := warm_start(config, e.teacher, student):
        times = uniform(student.denoiser.schedule, config.start_steps) if config.data_free else None
        denoising = Regression(Mix(target), times=times)
        student = e.stage(name, as_v(student), denoising, warm_budget(config, name))
        target = under_autocast(student.denoiser, precision)
    for before, n in pairs:  # N <- N / 2
        student, go_on = climb(config, e, student, stage_loss(config, target, before, n), n)
        target = under_autocast(student.denoiser, precision)  # the student is the next teacher
        if not go_on:
            break


def climb(config: Config, e: Experiment, student: Teacher, loss: Progressive, n: int) -> tuple[Teacher, bool]:
    """Train the stage to n steps. Return its student, and whether the ladder goes on.

    With --max-fid-ratio the FID of the student is compared with that of the stage before, or of the teacher, at its own step count. A
    stage that costs more is trained again with twice the images. If it still does, it is kept, and the ladder ends.
    """
    planned, limit = budget(config, n), config.max_fid_ratio
    before = e.cells[-1] if limit is not None else None
    twice, sampling = replace(planned, images=2 * planned.images), Sampling(steps=(n,))
    tried = e.file(str(n), FIRST_TRY).exists()
    trained = e.stage(str(n), student, loss, twice if tried else planned, sampling)
    if limit is None or before is None:
        return trained, True
    ratio = e.fid_ratio(e.cells[-1], before)
    if ratio > limit and not tried:
        e.run.say(f"stage {n}: {ratio:.3g} times the FID before, allowed are {limit:g}: once more with {twice.images:,} images")
        e.set_aside(str(n), FIRST_TRY)
        trained = e.stage(str(n), student, loss, twice, sampling)
        ratio = e.fid_ratio(e.cells[-1], before)
    if not ratio <= limit:
        e.run.say(
            f"stage {n}: {ratio:.3g} times the FID before with twice the images, allowed are {limit:g}: the ladder ends here"
        )
    return trained, ratio <= limit


def restart(config: Config, e: Experiment, steps: list[int]) -> None:
    """Set aside what --rerun names, unless a killed run has done so, and give stages that are trained again other random numbers.

    stages/reruns.json holds the stages of all reruns; the old students stay beside the new ones.
    """
    record = e.run.folder / "stages" / "reruns.json"

    def begin() -> list[int]:
        reruns = json.loads(record.read_text()) if record.exists() else []
        again = [n for n in steps if config.rerun is not None and n <= config.rerun]
        unfinished = any(not e.file(str(n)).exists() for n in again)
        if again and not (unfinished and reruns[-1:] == [config.rerun]):
            reruns.append(config.rerun)
            write_json(record, reruns)
            for path in (e.file(str(n), kind) for n in again for kind in ("student", FIRST_TRY)):
                if path.exists():
                    path.replace(path.with_stem(f"{path.stem}-before-rerun-{len(reruns)}"))
        return reruns

    reruns = e.run.from_main(begin)
    for n in steps:
        if count := sum(stage >= n for stage in reruns):
            e.seeds[str(n)] = seed_of(config.seed, "rerun", count)


def prepare(config: Config, teacher: Teacher, data: Data) -> Experiment:
    """Check that teacher, data and configuration fit together, and claim the output directory.

    Raises ValueError in one line, before anything is written, where they do not.
    """
    names = " -> ".join(map(str, [config.start_steps, *ladder(config)]))
    teacher, data = conditioned(teacher, data, config)
    data = check_match(teacher, data, training=True)
    require_network(teacher)
    check_steps(teacher, (config.start_steps,))
    student = taking_scale(config, teacher, on_table(teacher) if config.student else teacher)
    shared, student = with_lora(config, teacher, student, config.teacher, config.seed)
    teacher = shared or teacher
    record = {"method": "progressive", "of": config.teacher, "data": data.name, "guidance": config.guidance}
    if student.guidance is not None:
        record["guidance"] = student.guidance.describe()
    title = f"Progressive distillation of {config.teacher}: {names} steps"
    stages = len(ladder(config)) + bool(warm_start(config, teacher, student))
    return Experiment.open(config, teacher, student, data, title=title, record=record, stages=stages)


def ladder(config: Config) -> list[int]:
    """Return the students' step counts. Raises ValueError where end_steps is not start_steps divided by a power of two.

    It also does where --skip, --rerun or --max-fid-ratio do not fit the ladder.
    """
    start, end = config.start_steps, config.end_steps
    steps = [start]
    while steps[-1] > max(1, end) and steps[-1] % 2 == 0:
        steps.append(steps[-1] // 2)
    if start < 2 or steps[-1] != end or len(steps) < 2:
        accepted = [start >> k for k in range(1, start.bit_length()) if start % (1 << k) == 0]
        raise ValueError(
            f"--end-steps {end} is not --start-steps {start} halved some times: accepted are {accepted or 'none: start is odd'}"
        )
    skip = (start // 2,) if config.skip is None and start >= 64 and len(steps) > 2 else config.skip or ()
    if wrong := [n for n in skip if n and n not in steps[1:-1]]:
        raise ValueError(f"--skip {wrong[0]}: accepted are the stages before the last one, {steps[1:-1] or 'none here'}")
    left = [n for n in steps[1:] if n not in skip]
    if config.rerun is not None and config.rerun not in left:
        raise ValueError(f"--rerun {config.rerun}: accepted are the stages of this ladder, {left}")
    if config.max_fid_ratio is not None and not 0 < config.max_fid_ratio < math.inf:
        raise ValueError(f"--max-fid-ratio {config.max_fid_ratio:g}: accepted are numbers above 0, such as 1.5")
    return left


def stage_loss(config: Config, target: DenoiserLike, before: int, steps: int) -> Progressive:
    """Return the loss of the stage from so many steps to so many."""
    times = uniform(target.schedule, before)
    how = (WEIGHTS[config.weight], DISTANCES[config.distance], before // steps, config.data_free)
    return Progressive(target, times, *how)


def budget(config: Config, steps: int) -> Optimization:
    """Return the training of the stage to so many steps: twice the images to 2 and 1 steps, where the map is hard, and half to more
    than 8. A stage lasts a few hundred steps, so that Adam's second moment is taken over a hundred of them."""
    images = config.images_per_stage * (2 if steps <= 2 else 1)
    if 8 < steps < config.start_steps:
        images = math.ceil(images / 2)
    return Optimization(
        images, config.batch_size, config.microbatch, config.lr, betas=(0.9, 0.99), warmup_images=config.warmup_images,
        optimizer=config.optimizer,
    )  # fmt: skip


def warm_start(config: Config, teacher: Teacher, student: Teacher) -> str:
    """Return the name of the stage in which the student learns the teacher's E[x0 | x_t] first; "" where there is none.

    "v": eps and score networks cannot give x0 at pure noise, and the weights for another table do not fit it yet. "guided": the student
    takes the guidance scale and the teacher does not, so that it learns guidance first (Meng et al. 2210.03142, stage one).
    """
    if student.guidance is not None and teacher.guidance is None:
        return "guided"
    return "v" if config.student is not None or student.parametric.prediction in ("eps", "score") else ""


def warm_budget(config: Config, name: str) -> Optimization:
    """Return the training of the stage that `warm_start` names."""
    planned = budget(config, config.start_steps)
    return replace(planned, images=GUIDED * planned.images) if name == "guided" else planned


def as_v(model: Teacher) -> Teacher:
    """Return the weights of an eps or score network read as a v prediction, where v and eps agree near the data; others unchanged."""
    if model.parametric.prediction not in ("eps", "score"):
        return model
    return replace(model, denoiser=replace(model.parametric, prediction="v"))


if __name__ == "__main__":
    main()
