"""Draw images of any model at any step count, as one PNG or as a folder.

    python recipes/sample.py --model digits --steps 64 --images 100 --output samples.png
    python recipes/sample.py --model runs/progressive-digits --steps 4 --images 1000 --output images/
    python recipes/sample.py --model PIPELINE --benchmark geneval:evaluation_metadata.jsonl --output geneval/

With --benchmark the folder is laid out as GenEval or DPG-Bench read it, so that their own scripts run.

Image i of a seed is the same in every grid, folder and evaluation.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from distill import names
from recipes.common import flags
from recipes.common.accepted import BATCH, GUIDANCE, SEED, STEPS, Checked
from recipes.common.cli import flag, flags_first, machine_flag, method_flag, model_flag, one_line_errors, parse, plural

PRESETS: dict[str, dict] = {"default": {}, "smoke": {"images": 10}}


@dataclass(frozen=True)
class Config(Checked):
    preset: str = flag("default", "smoke draws ten images", choices=PRESETS)
    model: str = model_flag("digits", "the model (accepted: --help teacher); a run's directory holds its students")
    steps: int | None = flag(None, "step count", own=lambda v: "the student's, else 64", **STEPS)
    images: int = flag(100, "how many images", at_least=1, at_most=1_000_000)
    labels: tuple[int, ...] | None = flag(
        None, "classes, repeated in turn", own=lambda v: "drawn", at_least=0, at_most=1_000_000
    )
    benchmark: str | None = flag(
        None, "prompts of a benchmark for a text-to-image model: geneval:FILE.jsonl or dpg:FOLDER; --output is a folder"
    )
    images_per_prompt: int = flag(4, "images of each prompt of --benchmark", at_least=1, at_most=1_000)
    sampler: str | None = method_flag(None, names.SAMPLER_TEXT, own=lambda v: "the student's, else ddim")
    grid: str | None = method_flag(None, "time grid", choices=names.GRIDS, own=lambda v: "the student's, else uniform")
    guidance: float | None = method_flag(
        None, "classifier-free guidance; 1 is none", own=lambda v: "1, or the scale of a student that takes it", **GUIDANCE
    )
    captions: str | None = flag(
        None, "file of prompts for a text-to-image model, one per line, drawn in turn", short=False, path="file"
    )
    columns: int = machine_flag(10, "columns of a PNG", at_least=1, at_most=1000)
    chunk: int = machine_flag(256, "images generated at once", **BATCH)
    seed: int = machine_flag(0, "seed of noise and labels", **SEED)
    output: str = machine_flag("samples.png", "a .png file, or a folder for single images; neither may exist", path="new")

    TOPICS: ClassVar = {"teacher": flags.TOPICS["teacher"]}


flags_first(__name__, Config, __doc__, PRESETS)

import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from distill.files import replacing_folder
from distill.sampling import SEARCHED, Sampling
from eval.generate import Batch, chunks, images
from eval.image_grid import contact_sheet, write_folder
from eval.layouts import DPG_IMAGES, LAYOUTS, Task
from eval.machine import default_device
from eval.progress import progress
from recipes.common.checks import captions_for, check_steps, stage_of, with_sampler
from recipes.common.guidance import outside
from recipes.data import source
from teachers import Teacher
from teachers.encoder import with_prompts


def main(argv: list[str] | None = None) -> None:
    with one_line_errors():
        config = parse(Config, __doc__, PRESETS, argv)
        output = Path(config.output)
        device = default_device()
        model = source.load(stage_of(config.model, config.steps)).to(device)
        if config.benchmark is not None:
            model, tasks, write = prompted(model, config)
        if (table := captions_for(model, config.captions)) is not None:
            model = model.with_conditions(table)
        if model.embeddings is not None and not model.classes:
            raise ValueError(f"{config.model} is conditioned on text: --captions FILE is needed, with one prompt per line")
        sampling, steps = settings(model, config)
        denoiser = model.guided(config.guidance)
        if warning := outside(model, config.guidance):
            print(f"warning: {warning}", file=sys.stderr)
        labels = tuple(range(table.count)) if table is not None and config.labels is None else config.labels
        if labels is not None and (model.classes is None or not all(0 <= c < model.classes for c in labels)):
            raise ValueError(f"--labels: this model has {model.classes or 'no'} classes")
        shape = model.image_shape
        if len(shape) != 3 or shape[0] not in (1, 3):
            raise ValueError(f"samples of shape {shape} are no pictures: accepted are models of 1 or 3 channels")
    label_of = None if labels is None else lambda i: labels[i % len(labels)]
    count = config.images
    if config.benchmark is not None:
        count, label_of = config.images_per_prompt * len(tasks), lambda i: min(i // config.images_per_prompt, len(tasks) - 1)
    parts = progress(chunks(count, min(config.chunk, count)), desc=f"{plural(steps, 'step')} of {sampling.label}")
    drawn = images(model, sampling, steps, parts, config.seed, device, denoiser=denoiser, label_of=label_of)
    if config.benchmark is not None:
        with replacing_folder(output) as aside:
            for task, made in zip(tasks, in_groups(drawn, config.images_per_prompt), strict=False):
                write(aside, task, made)
        print(
            f"{plural(count, 'image')} of {plural(len(tasks), 'prompt')}, {sampling.label} with {plural(steps, 'step')}: {output}"
        )
        return
    pixels = torch.cat([batch.pixels.cpu() for batch in drawn])[:count]
    if output.suffix == ".png":
        contact_sheet(pixels, output, config.columns)
    else:
        with replacing_folder(output) as aside:
            write_folder(pixels, aside)
    print(f"{plural(len(pixels), 'image')}, {sampling.label} with {plural(steps, 'step')}: {output}")


def prompted(model: Teacher, config: Config) -> tuple[Teacher, list[Task], Callable[[Path, Task, Tensor], None]]:
    """Return the model with the prompts of --benchmark, its tasks, and what writes their images.

    Raises ValueError for a model that takes no text, for files of another form, and where --labels, --captions or a .png are given too.
    """
    assert config.benchmark is not None
    kind, _, where = config.benchmark.partition(":")
    if kind not in LAYOUTS:
        raise ValueError(f"--benchmark {config.benchmark}: accepted are geneval:FILE.jsonl and dpg:FOLDER")
    read, write = LAYOUTS[kind]
    tasks = read(Path(where))
    if config.labels is not None or config.captions is not None or Path(config.output).suffix == ".png":
        raise ValueError(
            "--benchmark has prompts of its own: accepted are --output FOLDER, and neither --labels nor --captions"
        )
    if kind == "dpg" and config.images_per_prompt != DPG_IMAGES:
        raise ValueError(f"--images-per-prompt {config.images_per_prompt}: DPG-Bench reads {DPG_IMAGES}")
    return with_prompts(model, [task.prompt for task in tasks]), tasks, write


def in_groups(batches: Iterator[Batch], size: int) -> Iterator[Tensor]:
    """Yield the uint8 images of batches, on the CPU, in groups [size, C, H, W]."""
    kept: list[Tensor] = []
    for batch in batches:
        kept += batch.pixels.cpu().unbind()
        while len(kept) >= size:
            yield torch.stack(kept[:size])
            kept = kept[size:]


def settings(model: Teacher, config: Config) -> tuple[Sampling, int]:
    """Return sampling and step count. Warns of a step count that a student was not made for.

    Raises ValueError where such a step count has no times, because those of the student were found by a search.
    """
    made = model.sampling
    steps = config.steps or (min(made.steps) if made.steps else 64)
    if made.steps and steps not in made.steps:
        line = f"this student was made for {', '.join(map(str, made.steps))} steps, not {steps}"
        if made.grid == SEARCHED and config.grid is None:
            raise ValueError(f"{line}, for which it has no times: accepted are {names.GRIDS} as --grid")
        print(f"warning: {line}", file=sys.stderr)
    sampling = made if config.sampler is None else with_sampler(model, config.sampler).sampling
    check_steps(model, (steps,))
    return replace(sampling, grid=config.grid, times={}) if config.grid else sampling, steps


if __name__ == "__main__":
    main()
