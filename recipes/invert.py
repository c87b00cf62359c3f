"""Encode images into the noise that a model makes them from, decode them again, and edit them on the way.

    python recipes/invert.py                                              digits: round trips at 2 to 64 steps, and a picture
    python recipes/invert.py --teacher SPEC --data DATA --to-label 3      encode with each image's label, decode with class 3
    python recipes/invert.py --student runs/progressive-digits            a run's students too, each at its own step count

The probability flow is integrated from the image to noise (DDIM inversion, 2010.02502) and back. Writes invert.json, the
round-trip error per step count, and invert.png: images, latents, reconstructions, a class change, and interpolations of two images.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from recipes.common import flags
from recipes.common.accepted import SEED, STEPS
from recipes.common.cli import flag, flags_first, machine_flag, measuring_flag, method_flag, model_flag, one_line_errors, parse

PRESETS: dict[str, dict] = {"default": {}, "smoke": {"images": 32, "steps": (2, 8)}}  # some seconds each
ORDERS = {"ddim": 1, "heun": 2}


@dataclass(frozen=True)
class Config(flags.MachineFlags):
    preset: str = flag("default", "smoke measures fewer images at fewer steps", choices=PRESETS)
    teacher: str = model_flag("digits", "the trained model (accepted: --help teacher)")
    student: str | None = model_flag(None, "a student with a deterministic sampler, or a run's directory, measured beside it")
    data: str = model_flag("digits", "the images (accepted: --help data)")
    output_dir: str = flags.output_dir("runs/invert-digits")
    steps: tuple[int, ...] = flag((2, 4, 8, 16, 32, 64), "step counts of the teacher", **STEPS)
    to_label: int | None = flag(
        None,
        "class to decode with, after encoding with the image's own",
        own=lambda v: "the next class",
        at_least=0,
        at_most=1_000_000,
    )
    sampler: str = method_flag("ddim", "solver of both ways for the teacher; a student has its own", choices=ORDERS)
    images: int = measuring_flag(256, "images of the round trips", at_least=2, at_most=1_000_000)
    columns: int = machine_flag(10, "images of the picture", short=False, at_least=2, at_most=100)
    seed: int = machine_flag(0, "seed of the choice of images", **SEED)

    TOPICS: ClassVar = flags.TOPICS


flags_first(__name__, Config, __doc__, PRESETS)

from typing import Any

import torch
from torch import Tensor

import teachers
from distill.denoiser import DenoiserLike
from distill.files import write_json
from distill.images import to_uint8
from distill.inversion import encode, slerp
from distill.sampling import Sampling
from distill.schedule import prior_std
from eval.image_grid import sample_grid
from recipes.common.checks import check_match, check_steps, conditioned, stages_of
from recipes.common.run import Run, processes
from recipes.data import sets
from teachers import Teacher

Rows = list[tuple[str, Tensor]]  # of the picture


@dataclass(frozen=True)
class Inversion:
    """Map samples to latents, of the scale of standard normal noise, and back, by one sampler with one step count."""

    denoiser: DenoiserLike
    sampling: Sampling
    steps: int

    @property
    def times(self) -> Tensor:
        return self.sampling.times_for(self.denoiser.schedule, self.steps)

    @torch.inference_mode()
    def encode(self, x0: Tensor, cond: dict[str, Any]) -> Tensor:
        order = ORDERS.get(self.sampling.name, 1)
        return encode(self.denoiser, x0, self.times, order=order, **cond) / prior_std(self.denoiser.schedule, self.times[0])

    @torch.inference_mode()
    def decode(self, latent: Tensor, cond: dict[str, Any]) -> Tensor:
        x = prior_std(self.denoiser.schedule, self.times[0]) * latent
        return self.sampling.run(self.denoiser, x, self.times, torch.zeros_like, **cond)


def inversions(model: Teacher, steps: tuple[int, ...], sampler: str) -> list[Inversion]:
    """Return one inversion per step count: a student's own above 1, else ``steps``. Raises ValueError without a deterministic sampler."""
    made, schedule = model.sampling, model.denoiser.schedule
    if made.two_times or (made.noisy and made.gamma != 0):
        raise ValueError(f"sampler {made.label!r} has no inverse: accepted are models with a deterministic one, such as ddim")
    check_steps(model, made.steps or steps)
    if made.steps:
        ways = [Inversion(model.denoiser, made, n) for n in made.steps if n > 1]
        if not ways:
            raise ValueError(
                "a student of one step is evaluated at pure noise alone and has no inverse: accepted are students of 2 steps or more"
            )
        return ways
    chosen = Sampling(sampler)
    return [Inversion(model.denoiser, chosen.on_best_grid(schedule, n).on_entries(schedule, n), n) for n in steps]


def round_trips(ways: list[Inversion], x0: Tensor, cond: dict[str, Any]) -> dict[str, dict[int, float]]:
    """Return, per step count, the error per value of x0 encoded and decoded, and the standard deviation of the latents, best 1."""
    out: dict[str, dict[int, float]] = {"round_trip_rms": {}, "latent_std": {}}
    for way in ways:
        latent = way.encode(x0, cond)
        out["round_trip_rms"][way.steps] = float((way.decode(latent, cond) - x0).square().mean().sqrt())
        out["latent_std"][way.steps] = float(latent.std())
    return out


def pictures(way: Inversion, x0: Tensor, own: dict[str, Any], others: list[tuple[str, dict, dict]]) -> Rows:
    """Return the rows of the picture: the way with the images' own conditions, with other conditions, and between two images.

    ``others``: name, conditions of encoding and of decoding.
    """
    latent, n = way.encode(x0, own), len(x0)
    rows = [("image", x0), ("latent", latent / 3), ("reconstruction", way.decode(latent, own))]
    rows += [(name, way.decode(way.encode(x0, before), after)) for name, before, after in others]
    ends = [{name: rows[i : i + 1].expand(n, *rows.shape[1:]) for name, rows in own.items()} for i in (0, 1)]
    between = torch.cat([slerp(latent[:1], latent[1:2], k / (n - 1)) for k in range(n)])
    return [*rows, *((f"arc, label {'AB'[i]}" if own else "arc", way.decode(between, ends[i])) for i in range(2 if own else 1))]


def prepared(config: Config) -> tuple[list[Teacher], sets.Data, dict[str, list[Inversion]]]:
    """Load teacher, students and data. Raises ValueError where they do not fit together, or have no inverse."""
    model, data = conditioned(teachers.load(config.teacher), sets.load(config.data))
    data = check_match(model, data, training=True)
    students = [] if config.student is None else [teachers.load(path) for path in stages_of(config.student)]
    ways = {"teacher": inversions(model, config.steps, config.sampler)}
    for student in students:
        check_match(student, data, training=True)
        if not student.same_conditioning(model):
            raise ValueError(f"the student takes {student.conditions}, the teacher {model.conditions}: they must agree")
        ways.setdefault("student", []).extend(inversions(student, config.steps, config.sampler))
    shape, classes = model.image_shape, model.classes
    if processes() > 1 or data.imageless or data.stream is not None or len(data.images) < 2:
        raise ValueError("an inversion needs one process, and two or more images in memory as --data")
    if len(shape) != 3 or shape[0] not in (1, 3):
        raise ValueError(f"samples of shape {shape} are no pictures: accepted are models of 1 or 3 channels")
    if config.to_label is not None and not (classes and config.to_label < classes):
        accepted = f"accepted are 0 to {classes - 1}" if classes else "this model has no classes"
        raise ValueError(f"--to-label {config.to_label}: {accepted}")
    return [model, *students], data, ways


def main(argv: list[str] | None = None) -> None:
    with one_line_errors():
        config = parse(Config, __doc__, PRESETS, argv)
        models, data, ways = prepared(config)
        run = Run.open(config)
    for model in models:
        model.to(run.device)
    model, n = models[0], config.columns
    index = torch.randperm(len(data.images), generator=torch.Generator().manual_seed(config.seed))[: max(config.images, n)]
    x0, few, own, others = data.x0(index, run.device), data.x0(index[:n], run.device), {}, []
    out: dict[str, Any] = {"images": len(x0), "to_label": config.to_label}
    if model.classes and data.labels is not None:
        labels = data.labels[index].to(run.device)
        target = (labels + 1) % model.classes if config.to_label is None else torch.full_like(labels, config.to_label)
        own, to = model.condition(labels), model.condition(target[:n])
        name = "next label" if config.to_label is None else f"label {config.to_label}"
        others = [(f"to {name}", model.condition(labels[:n]), to)]
        if model.null is not None:
            null = model.condition(torch.full_like(labels, model.null))
            out["teacher, no label"] = round_trips(ways["teacher"], x0, null)
            none = model.condition(torch.full_like(labels[:n], model.null))
            others += [("no label", none, none), (f"none to {name}", none, to)]
    out = {kind: round_trips(some, x0, own) for kind, some in ways.items()} | out
    finest = max(ways["teacher"], key=lambda way: way.steps)
    shown = pictures(finest, few, {name: rows[:n] for name, rows in own.items()}, others)
    write_json(run.folder / "invert.json", out)
    sample_grid([(name, to_uint8(model.decode(x)).cpu()) for name, x in shown], run.folder / "invert.png", n)
    for kind, found in out.items():
        if isinstance(found, dict):
            run.say(f"{kind}: round trip, rms: " + ", ".join(f"{rms:.4f} at {n}" for n, rms in found["round_trip_rms"].items()))
    run.say(f"numbers: {run.folder / 'invert.json'}\npicture: {run.folder / 'invert.png'}")
    run.close()


if __name__ == "__main__":
    main()
