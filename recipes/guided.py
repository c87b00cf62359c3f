"""Distil a guided model into students that take the guidance scale: half the calls, then few steps, at any scale of a range.

    accelerate launch recipes/guided.py                            digits, scales 1 to 4, 64 steps -> 1, then the report
    python recipes/sample.py --model runs/guided-digits --steps 4 --guidance 2

Meng et al., On Distillation of Guided Diffusion Models, arXiv 2210.03142. Stage one: the student learns the guided E[x0 | x_t] at random
scales, in one call instead of two. Stage two: progressive distillation with the scale as an input.
Writes what recipes/progressive.py writes, and guidance.png: a row for each scale, the same noise at every step count.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from recipes.common import flags
from recipes.common.accepted import GENERATED, GUIDANCE, LEARNING_RATE, STEPS, TRAINED
from recipes.common.cli import flag, flags_first, measuring_flag, method_flag, one_line_errors, parse, training_flag

PRESETS: dict[str, dict] = {
    "default": {},  # 15 minutes of one CPU core, about 10 on two: 10 of training, 4 of the sweep
    "full": {"images_per_stage": 240_000, "images": 10_000},
    "smoke": {  # about a minute, no quality
        "start_steps": 4, "images_per_stage": 256, "images": 200, "sweep_steps": (1, 2), "sweep_guidance": (1.0, 4.0),
    },
}  # fmt: skip

SAMPLERS = ("ddim", "dpm++3m", "ipndm")  # of the teacher: the reference, and its best ones at few steps


@dataclass(frozen=True)
class Config(flags.DistillationFlags):
    preset: str = flag("default", "smoke is a trial run of about a minute", choices=PRESETS)
    output_dir: str = flags.output_dir("runs/guided-digits")
    guidance_range: tuple[float, ...] | None = method_flag(
        (1.0, 4.0), "lowest and highest guidance scale; 1 is none", **GUIDANCE
    )
    sweep_guidance: tuple[float, ...] | None = measuring_flag(
        (1.0, 2.0, 4.0), "scales at which students and teacher are measured", **(GUIDANCE | {"distinct": True})
    )
    images: int = measuring_flag(1_000, "generated images per cell of the sweep", **GENERATED)
    sweep_steps: tuple[int, ...] = measuring_flag(
        (1, 2, 4), "step counts of the teacher's training-free samplers", short=False, **STEPS
    )
    start_steps: int = flag(64, "steps of the guided teacher's DDIM sampler", at_least=2, at_most=STEPS["at_most"])
    end_steps: int = flag(1, "steps of the last student: start-steps divided by a power of two", **STEPS)
    images_per_stage: int = training_flag(
        24_000,
        "training images per stage; stage one takes three times as many, stages to 2 and 1 steps twice, those to more than 8 half",
        **TRAINED,
    )
    lr: float = training_flag(1.5e-3, "learning rate; it falls linearly to 0 over each stage", **LEARNING_RATE)


flags_first(__name__, Config, __doc__, PRESETS)

import torch

from eval.generate import images
from eval.image_grid import sample_grid
from recipes import progressive
from recipes.common.guidance import measured
from recipes.common.interrupts import interruptible
from recipes.common.outline import teacher_of
from recipes.common.training import Experiment
from recipes.data import sets
from teachers import Teacher

SHOWN = 4  # images of each scale and step count in guidance.png


@interruptible()
def main(argv: list[str] | None = None) -> None:
    with one_line_errors():
        config = parse(Config, __doc__, PRESETS, argv)
        shared = {field.name for field in fields(progressive.Config)} & {field.name for field in fields(config)}
        ladder = progressive.Config(**{name: getattr(config, name) for name in shared})
        teacher = teacher_of(config)
        if teacher.null is None and teacher.guidance is None:
            raise ValueError(
                f"{config.teacher} has no null class, so that there is no guidance to distil: accepted are teachers trained with one;"
                " recipes/progressive.py distils this one as it is"
            )
        e = progressive.prepare(ladder, teacher, sets.load(config.data))
    with e:
        e.add_baselines(config.start_steps, SAMPLERS)
        progressive.learn(ladder, e)
        if e.run.main:
            draw(config, e)


def draw(config: Config, e: Experiment) -> None:
    """Write guidance.png: for each scale the images of the same noise and labels, from the fewest steps to the guided teacher."""
    if len(e.student.image_shape) != 3 or e.student.image_shape[0] not in (1, 3):
        return
    assert e.teacher is not None
    models = [(e.students[n].load().to(e.run.device), n) for n in sorted(e.students)] + [(e.teacher, config.start_steps)]
    rows = []
    for ending, scale in measured(config, e.student).items():
        parts = [pictures(model, steps, scale, config.seed, e.run.device) for model, steps in models]
        blank = torch.full_like(parts[0][:1], 255)
        rows.append((ending.strip(), torch.cat([part for tile in parts for part in (tile, blank)][:-1])))
    path = e.run.folder / "guidance.png"
    sample_grid(rows, path, columns=len(rows[0][1]))
    names = ", ".join(str(steps) for _, steps in models[:-1])
    e.run.say(f"{path}: students of {names} steps and the teacher's {config.start_steps}, {SHOWN} images each")


def pictures(model: Teacher, steps: int, scale: float, seed: int, device: torch.device) -> torch.Tensor:
    """Return the first images of a model at a scale, uint8 [n, C, H, W]."""
    (batch,) = images(model, model.sampling, steps, [range(SHOWN)], seed, device, denoiser=model.guided(scale))
    return batch.pixels.cpu()


if __name__ == "__main__":
    main()
