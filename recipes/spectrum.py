"""Measure power spectra: at which noise level a model recovers which frequency, and which frequencies a student loses.

    python recipes/spectrum.py --model digits
    python recipes/spectrum.py --model digits --student runs/progressive-digits

Power is averaged over samples, channels and directions. A model restores low frequencies first: they are known at lower log-SNR, as if
an image were written from coarse to fine. With --student, images of the student at its own step counts are compared with those of
--model at --steps, from the same noise. Writes spectrum.json and spectrum.png.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from recipes.common import flags
from recipes.common.accepted import BATCH, SEED, STEPS
from recipes.common.cli import flag, flags_first, machine_flag, measuring_flag, model_flag, one_line_errors, parse

PRESETS: dict[str, dict] = {
    "default": {},  # about a minute
    "smoke": {"images": 64, "levels": 6, "steps": 4},  # some seconds
}


@dataclass(frozen=True)
class Config(flags.MachineFlags):
    preset: str = flag("default", "smoke is a trial run of some seconds", choices=PRESETS)
    model: str = model_flag("digits", "the model (accepted: --help teacher)")
    student: str | None = model_flag(None, "its student, or a run's directory with several")
    data: str = model_flag("digits", "the data (accepted: --help data)")
    output_dir: str = flags.output_dir("runs/spectrum-digits")
    images: int = measuring_flag(512, "images of the data, and generated ones", at_least=2, at_most=1_000_000)
    levels: int = measuring_flag(25, "log-SNRs from -8 to 8", at_least=2, at_most=1000)
    steps: int = measuring_flag(64, "DDIM steps of the model for images beside the student's", **STEPS)
    chunk: int = measuring_flag(256, "images generated at once", short=False, **BATCH)
    seed: int = machine_flag(0, "seed of all random numbers", **SEED)

    TOPICS: ClassVar = flags.TOPICS


flags_first(__name__, Config, __doc__, PRESETS)

import torch
from torch import Tensor

import teachers
from distill.files import write_json
from distill.images import from_uint8
from distill.sampling import Sampling
from eval.generate import chunks, images
from eval.spectrum import draw, error, power
from recipes.common.checks import check_match, check_sampler, check_steps, conditioned, stages_of
from recipes.common.run import Run, processes
from recipes.data import sets
from recipes.data.sets import Data
from teachers import Teacher


def restored(model: Teacher, data: Data, config: Config, device: torch.device) -> dict:
    """Return the power of the data about their mean image, of x_t / alpha, and of the error at each log-SNR."""
    rng = torch.Generator().manual_seed(config.seed)
    index = torch.randperm(len(data.images), generator=rng)[: config.images]
    x0 = data.x0(index).to(device)
    cond = model.condition(None if data.labels is None else data.labels[index].to(device))
    logsnr = torch.linspace(-8, 8, config.levels, dtype=torch.float64)
    clean, missed = power(x0 - x0.mean(0)), error(model.denoiser, x0, logsnr, rng, **cond)
    return {
        "model": config.model,
        "data": clean.tolist(),
        "logsnr": logsnr.tolist(),
        "noisy": (clean + (-logsnr).exp()[:, None]).tolist(),
        "error": missed.tolist(),
        "unknown": (missed / clean).tolist(),
    }


def generated(model: Teacher, sampling: Sampling, steps: int, config: Config, device: torch.device) -> Tensor:
    """Return the power of generated images about their mean image. Image i of the seed has the same noise in every model."""
    parts = chunks(config.images, min(config.chunk, config.images))
    drawn = [batch.pixels.cpu() for batch in images(model.to(device), sampling, steps, parts, config.seed, device)]
    x = from_uint8(torch.cat(drawn)[: config.images])
    return power(x - x.mean(0))


def main(argv: list[str] | None = None) -> None:
    with one_line_errors():
        config = parse(Config, __doc__, PRESETS, argv)
        model, data = conditioned(teachers.load(config.model), sets.load(config.data))
        data = check_match(model, data, training=True)
        if data.imageless or processes() > 1 or len(data.shape) != 3:
            raise ValueError("a spectrum needs one process, and data that are images or latents")
        students = [] if config.student is None else [teachers.load(spec) for spec in stages_of(config.student)]
        for student in students:
            check_sampler(student, student.sampling)
            if student.image_shape != model.image_shape:
                raise ValueError(f"--student makes {student.image_shape}, the model {model.image_shape}: they must agree")
        check_steps(model, (config.steps,))
        run = Run.open(config)
    device = run.device
    out = restored(model.to(device), data, config, device) | {"students": []}
    if students:
        sampling = Sampling().on_best_grid(model.denoiser.schedule, config.steps)
        teacher = generated(model, sampling, config.steps, config, device)
        out["teacher"] = {"steps": config.steps, "power": teacher.tolist()}
        for student in students:
            for steps in student.sampling.steps or (config.steps,):
                found = generated(student, student.sampling, steps, config, device)
                ratio = (found / teacher).tolist()
                out["students"].append({"steps": steps, "power": found.tolist(), "ratio": ratio})
                run.say(f"student, {steps} steps: power / teacher's " + " ".join(f"{value:.3f}" for value in ratio))
    write_json(run.folder / "spectrum.json", out)
    draw(out, run.folder / "spectrum.png")
    known = [next((level for level, part in zip(out["logsnr"], column, strict=True) if part < 0.5), None) for column in
             zip(*out["unknown"], strict=True)]  # fmt: skip
    run.say("half known at log-SNR, by frequency: " + " ".join("-" if v is None else f"{v:.1f}" for v in known))
    run.say(f"picture: {run.folder / 'spectrum.png'}")
    run.close()


if __name__ == "__main__":
    main()
