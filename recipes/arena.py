"""Compare distillation methods: one teacher, equal training images or seconds, several training seeds, one measurement, one page.

    accelerate launch recipes/arena.py                                       the methods on digits, 3 seeds, hours on two CPU cores
    python recipes/arena.py --methods cd ect+cmt lmd --seeds 1               some of them
    python recipes/arena.py --training-seconds 300 --output-dir runs/seconds as many images as each method trains in 5 minutes
    CUDA_VISIBLE_DEVICES=1 python recipes/arena.py --join                    a second process, for the trainings that nobody has

Every training is a run of its own under OUTPUT_DIR/trainings and continues where it was killed; finished cells of the measurement are
kept. Any number of processes may join. Training seeds change the data order and all noise of training; all students are measured on
the same noise. Writes arena.html, arena.png and arena.json in OUTPUT_DIR.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import ClassVar

from recipes.common import flags
from recipes.common.accepted import STEPS, TRAINED
from recipes.common.cli import (
    fail,
    flag,
    flags_first,
    machine_flag,
    measuring_flag,
    model_flag,
    one_line_errors,
    parse,
    plural,
    training_flag,
)
from recipes.common.methods import METHODS

DONE = "done.json"  # of a training, with its peak memory
PILOT = 12_800  # training images that measure the speed of a method
WAIT = 5.0  # seconds until a training of another process is looked at again

PRESETS: dict[str, dict] = {
    "default": {},
    "smoke": {
        "methods": ("cd", "pdd"), "training_images": 512, "seeds": 2, "images": 200, "sweep_steps": (1, 2), "steps": (1, 2),
        "samplers": ("ddim",),
    },
}  # fmt: skip


def _consistency(method: str, *more: str) -> Callable[[int], list[str]]:
    return lambda images: ["--method", method, "--training-images", str(images), *more]


# name -> training images -> flags of recipes/consistency.py; those of recipes/progressive.py where the first is --images-per-stage
ENTRANTS: dict[str, Callable[[int], list[str]]] = {
    "progressive": lambda images: ["--images-per-stage", str(max(1, round(images / 6.5)))],  # its stages have 6.5 times that
    **{name: _consistency(name) for name in METHODS if name not in ("denoise", "dmd", "sid")},
    "ect+cmt": _consistency("ect", "--target-mix", "1", "--start", "cmt"),
    "scd-exact": _consistency("scd", "--jvp", "exact", "--time-embedding", "slow"),
    "meanflow-exact": _consistency("meanflow", "--jvp", "exact", "--time-embedding", "slow"),
    "lmd-data-free": _consistency("lmd", "--data-free"),
    "pdd-data-free": _consistency("pdd", "--data-free"),
    "cmt-data-free": _consistency("cmt", "--data-free"),
    "dmd": _consistency("dmd", "--start", "cmt", "--start-part", "0.75"),
    "sid": _consistency("sid", "--start", "cmt", "--start-part", "0.5"),
}
STANDARD = tuple(
    name for name in ENTRANTS if name != "unrolled"
)  # its step samples a whole path of the teacher: ten times the time of others


@dataclass(frozen=True)
class Config(flags.RunFlags, flags.SweepFlags):
    preset: str = flag("default", "smoke is a trial run of about a minute", choices=PRESETS)
    teacher: str = model_flag("digits", "the trained model (accepted: --help teacher)")
    data: str = model_flag("digits", "the training data (accepted: --help data)")
    output_dir: str = flags.output_dir("runs/arena-digits")
    methods: tuple[str, ...] = flag(STANDARD, "what is compared", choices=ENTRANTS)
    seeds: int = flag(3, "trainings of each method", at_least=1, at_most=10)
    training_images: int = training_flag(128_000, "training images of each student, its start included", **TRAINED)
    training_seconds: float | None = training_flag(
        None,
        "equal seconds in place of equal images, by the speed of a short pilot of each method",
        short=False,
        above=0,
        at_most=1e7,
    )
    steps: tuple[int, ...] = flag((1, 2, 4), "step counts of the students that take several", **STEPS)
    samplers: tuple[str, ...] = measuring_flag(
        ("ddim", "heun", "dpm++2m", "dpm++3m", "unipc", "ipndm", "deis"), "training-free samplers of the teacher", short=False
    )
    images: int = measuring_flag(10_000, "generated images per cell", at_least=40, at_most=10_000_000)
    second_features: str = measuring_flag(
        "eval.pixels:Pixels",
        "a second feature extractor; its distance is fid2 (the value of --features: no second one)",
        short=False,
    )
    join: bool = machine_flag(
        False, "train what no other process trains, for an arena that runs in this output directory, and end", short=False
    )

    MAY_CHANGE: ClassVar = ("methods", "seeds", "samplers", "sweep_steps", "join")
    TOPICS: ClassVar = flags.TOPICS


flags_first(__name__, Config, __doc__, PRESETS)

import shlex
import sys
import time

import teachers
from distill import reading
from distill.files import write_json, write_text
from eval import arena, machine
from eval.features import Extractor
from eval.report import pictures_of
from eval.sweep import Cell
from eval.verdict import good, with_comparisons
from recipes import consistency, progressive
from recipes.common.checks import check_match, conditioned
from recipes.common.interrupts import interruptible
from recipes.common.locks import locked
from recipes.common.measurement import Measurement, baselines, measured_against, student_cells, training_seconds
from recipes.common.run import Run, device_name, versions
from recipes.data import sets
from teachers import Teacher
from teachers.saved import Stored


@interruptible()
def main(argv: list[str] | None = None) -> None:
    with one_line_errors():
        config = parse(Config, __doc__, PRESETS, argv)
        teacher, data = conditioned(teachers.load(config.teacher), sets.load(config.data))
        data = check_match(teacher, data, training=True)
        extractor = Extractor.create(config.features).fits(teacher.image_shape)
        real = measured_against(config.reference, data, extractor)
        other = None if config.second_features == config.features else second_extractor(config, teacher)
        if config.join and config.training_seconds is not None:
            raise ValueError("--join does not go with --training-seconds: processes beside each other change the speed of both")
        run = Run.open(config, config.join)
    images = {name: images_of(config, run, name) for name in config.methods}
    files = train_all(config, run, images)
    if config.join:
        run.say("all other trainings are done, or another process has them: the first process measures")
        return run.close()
    teacher.to(run.device)
    measurement = Measurement.of(extractor, real, run, images=config.images, chunk=config.chunk, seed=config.seed)
    cells = baselines(teacher, "teacher", config.sweep_steps, config.samplers) + baselines(teacher, "teacher", (64,), ("ddim",))
    for (name, seed), file in files.items():
        cells += cells_of(config, file, teacher, f"{name} #{seed}")
    rows = measurement.rows(run, cells)
    if other is not None:
        rows = with_second(rows, run, other, data, config, cells)
    run.from_main(lambda: write(config, run, rows, images))
    run.say(f"arena: {run.folder / 'arena.html'}")
    run.close()


def second_extractor(config: Config, teacher: Teacher) -> Extractor:
    """Return the extractor of the second feature space. Raises ValueError where there is no second set of real features."""
    if config.reference is not None:
        raise ValueError(f"--second-features: --reference has one feature space; accepted with it is {config.features}")
    return Extractor.create(config.second_features).fits(teacher.image_shape)


def with_second(
    rows: list[dict], run: Run, extractor: Extractor, data: sets.Data, config: Config, cells: list[Cell]
) -> list[dict]:
    """Return the rows with "fid2", the Frechet distance of the same images in another feature space."""
    folder = run.folder / "second"
    measurement = Measurement.of(
        extractor, data, run, images=config.images, chunk=config.chunk, seed=config.seed, metrics="fid", folder=folder
    )
    found = {row["name"]: row.get("fid") for row in measurement.rows(run, cells, folder)}
    return [row | {"fid2": found[row["name"]]} for row in rows]


def images_of(config: Config, run: Run, name: str) -> int:
    """Return the training images of a method: of the configuration, or as many as its pilot says take --training-seconds here."""
    if config.training_seconds is None:
        return config.training_images
    pilot = train(config, run, name, 0, PILOT, run.folder / "pilots" / name, f"pilot of {name}")
    seconds = run.from_main(lambda: max(training_seconds(path) or 0.0 for path in pilot))
    if not seconds:
        fail(f"the pilot of {name} was too short to measure its speed: leave --training-seconds out")
    return max(1, round(PILOT * config.training_seconds / seconds))


def train_all(config: Config, run: Run, images: dict[str, int]) -> dict[tuple[str, int], list[Path]]:
    """Train each method with each seed. Wait for what other processes train, or with --join leave it. Return the files."""
    trainings = list(product(range(config.seeds), config.methods))
    files: dict[tuple[str, int], list[Path]] = {}
    waits = False
    while len(files) < len(trainings):
        before = len(files)
        for number, (seed, name) in enumerate(trainings, 1):
            folder = folder_of(run, name, seed)
            if (name, seed) not in files and run.from_main(partial(ready, folder)):
                title = f"training {number}/{len(trainings)}: {name}, seed {seed}"
                files[name, seed] = train(config, run, name, seed, images[name], folder, title)
        if len(files) == before:
            if config.join:
                break
            if not waits:
                run.say(f"waiting for {plural(len(trainings) - before, 'training')} of other processes")
            waits = True
            time.sleep(WAIT)
    return files


def ready(folder: Path) -> bool:
    """Return whether a training is done, or is this process's own from now on."""
    return (folder / DONE).exists() or locked(folder)


def train(config: Config, run: Run, name: str, seed: int, images: int, folder: Path, title: str) -> list[Path]:
    """Train a method into a folder, unless its students are there. Return their files, from many steps to few."""
    flags = ENTRANTS[name](images)
    recipe = progressive if flags[0] == "--images-per-stage" else consistency
    given = ["--teacher", config.teacher, "--data", config.data, "--seed", str(seed), "--threads", str(config.threads)]
    if recipe is consistency and METHODS[flags[1]].steps != (1,):
        given += ["--steps", *map(str, config.steps)]
    done = folder / DONE
    if not done.exists():
        run.say(title)
        machine.reset_peak_memory(run.device)
        with one_line_errors():
            own = parse(recipe.Config, recipe.__doc__ or "", recipe.PRESETS, [*given, *flags, "--output-dir", str(folder)])
            e = recipe.prepare(own, teachers.load(config.teacher), sets.load(config.data))
        recipe.learn(own, e, plan=False)
        if run.main:
            write_json(done, {"memory_gb": machine.peak_memory_gb(run.device)})
        e.run.close()
    found = sorted(folder.glob("stages/*/student.safetensors"))
    return [path for path in found if not path.parent.name.startswith("start-") and path.parent.name != "v"]


def cells_of(config: Config, files: list[Path], teacher: Teacher, label: str) -> list[Cell]:
    """Return the cells of the students of one training, at the step counts of the configuration."""
    cells: list[Cell] = []
    for path in files:
        student = teachers.load(str(path))
        stored = Stored(path, teacher, student.fingerprint, student.denoiser.schedule)
        own = student_cells(student, label, config.steps, training_seconds(path))
        cells += [replace(cell, model=stored) for cell in own]
    return cells


def write(config: Config, run: Run, rows: list[dict], images: dict[str, int]) -> None:
    """Write arena.json, arena.png and arena.html. A row that failed drops its method at that step count."""
    cells = run.folder / "cells"
    rows = with_comparisons(rows, {row["name"]: pictures_of(row, cells) for row in good(rows)})
    free = [row for row in good(rows) if row["role"] == "teacher"]
    standings = []
    for name in config.methods:
        memory = [reading.read_json(folder_of(run, name, seed) / DONE)["memory_gb"] for seed in range(config.seeds)]
        for steps in config.steps:
            labels = [f"{name} #{seed}" for seed in range(config.seeds)]
            own = [row for row in good(rows) if row["model"] in labels and row["steps"] == steps]
            if len(own) == config.seeds:
                standings.append(arena.Standing.of(name, steps, own, max(memory)))
    facts = {
        "teacher": config.teacher,
        **training_facts(config, images),
        "training seeds": config.seeds,
        "generated images per cell": f"{config.images:,}",
        "features": config.features,
        "device": device_name(run.accelerator),
        "versions": ", ".join(f"{k} {v}" for k, v in versions().items()),
        "command": shlex.join(["python", *sys.argv]),
    }
    write_json(run.folder / "arena.json", arena.as_json(standings, free, facts))
    if standings:
        arena.draw(standings, free, run.folder / "arena.png")
    write_text(run.folder / "arena.html", arena.page(f"Methods on {config.data}", standings, free, facts))
    run.say(f"\n{arena.advice(standings)}")


def training_facts(config: Config, images: dict[str, int]) -> dict[str, str]:
    """Return what the trainings have in common, for the page."""
    if config.training_seconds is None:
        return {"training images": f"{config.training_images:,}"}
    each = ", ".join(f"{name} {count:,}" for name, count in images.items())
    return {"training seconds": f"{config.training_seconds:g}, by pilots of {PILOT:,} images", "training images": each}


def folder_of(run: Run, name: str, seed: int) -> Path:
    """Return the folder of one training."""
    return run.folder / "trainings" / f"{name}-{seed}"


if __name__ == "__main__":
    main()
