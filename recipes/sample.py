"""Images of any model at any step count, as one PNG or a folder of them.

    python recipes/sample.py --model digits --steps 64 --images 100 --output samples.png
    python recipes/sample.py --model runs/progressive-digits --steps 1 --images 1000 --output images/

Image i of a seed is the same in every grid, folder and evaluation.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import teachers
from distill import solver
from distill.grid import GRIDS
from eval.generate import chunks, generate, start, to_uint8
from eval.sheet import contact_sheet, write_folder
from recipes.common import fail, flag, one_line_errors, parse
from recipes.matching import check_sampler
from teachers import Teacher

PRESETS: dict[str, dict] = {"default": {}, "smoke": {"images": 10}}


@dataclass(frozen=True)
class Config:
    preset: str = flag("default", "default, or smoke (ten images)", choices=PRESETS)
    model: str = flag("digits", "what is sampled: " + teachers.ACCEPTED)
    steps: int | None = flag(None, "step count; a student's own, else 64, where it is not given")
    sampler: str | None = flag(None, f"{solver.ACCEPTED}; a student's own, else ddim, where it is not given")
    grid: str | None = flag(None, "time grid; a student's own, else uniform, where it is not given", choices=GRIDS)
    guidance: float = flag(1.0, "classifier-free guidance; 1 is none")
    labels: tuple[int, ...] | None = flag(None, "classes, repeated as often as there are images; drawn where not given")
    images: int = flag(100, "how many")
    columns: int = flag(10, "columns of a grid")
    chunk: int = flag(256, "images generated at once")
    seed: int = flag(0, "seed of noise and labels")
    output: str = flag("samples.png", "a .png file for a grid, or a folder for single images; neither may exist")


def settings(model: Teacher, config: Config) -> tuple[str, str | None, int]:
    """Sampler, grid, None for the model's own, and steps. ValueError where a student is asked for a step count it was not made for."""
    made = model.sampler
    steps = config.steps or (min(made["steps"]) if made else 64)
    if steps < 1:
        raise ValueError(f"--steps {steps}: accepted are 1 and more")
    if made and steps not in made["steps"]:
        raise ValueError(f"this student was made for {made['steps']} steps, not {steps}")
    name = config.sampler or made.get("name", "ddim")
    check_sampler(model, name)
    return name, config.grid, steps


def main(argv: list[str] | None = None) -> None:
    with one_line_errors():
        config = parse(Config, __doc__.splitlines()[0], PRESETS, argv)
        output = Path(config.output)
        if output.exists():
            fail(f"{output} exists: name another --output")
        if config.images < 1:
            raise ValueError(f"--images {config.images}: accepted are 1 and more")
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model = teachers.load(config.model).to(device)
        sampler, grid, steps = settings(model, config)
        denoiser = model.guided(config.guidance)
        if config.labels is not None and (model.classes is None or not all(0 <= c < model.classes for c in config.labels)):
            raise ValueError(f"--labels: this model has {model.classes or 'no'} classes")
        shape = model.image_shape
        if len(shape) != 3 or shape[0] not in (1, 3):
            raise ValueError(f"samples of shape {shape} are no pictures: accepted are models of 1 or 3 channels")
    times = GRIDS[grid](denoiser.schedule, steps) if grid else model.times(steps)
    parts = []
    for indices in tqdm(
        chunks(config.images, min(config.chunk, config.images)), desc=f"{steps} steps of {sampler}", disable=None
    ):
        begin = start(indices, model.shape, model.classes, config.seed)
        if config.labels is not None:
            begin.labels = torch.tensor([config.labels[i % len(config.labels)] for i in indices])
        x0 = generate(denoiser, sampler, times, begin, model.condition, device)
        parts.append(to_uint8(model.decode(x0)).cpu())
    images = torch.cat(parts)[: config.images]
    if output.suffix == ".png":
        contact_sheet(images, output, config.columns)
    else:
        output.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
        write_folder(images, aside)
        aside.chmod(0o755)
        aside.rename(output)
    print(f"{len(images)} images, {sampler} with {steps} steps: {output}")


if __name__ == "__main__":
    main()
