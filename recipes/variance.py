"""Measure why distillation learns faster than training: variance of targets and gradients by noise level, and loss curves.

    python recipes/variance.py --teacher digits --output-dir runs/variance-digits

Four targets are compared: the data sample, the teacher's E[x0 | x_t], their best mix, and the posterior mean over a batch. For each, the
error about E[x0 | x_t] (`distill.teacher_bias` estimates it) and the signal-to-noise ratio of the gradient of an untrained student are
measured. Then two students with equal seed are trained on equally many images, one on the data and one on the teacher, and tested on
held-out images.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from recipes.common import flags
from recipes.common.accepted import BATCH, SEED, TRAINED
from recipes.common.cli import (
    TRACKERS,
    flag,
    flags_first,
    machine_flag,
    measuring_flag,
    model_flag,
    one_line_errors,
    parse,
    training_flag,
)

PRESETS: dict[str, dict] = {
    "default": {},  # about 5 minutes on two CPU cores
    "smoke": {"levels": 3, "samples": 128, "gradients": 4, "training_images": 2048},  # about a minute
}


@dataclass(frozen=True)
class Config(flags.MachineFlags):
    preset: str = flag("default", "smoke is a trial run of about a minute", choices=PRESETS)
    teacher: str = model_flag("digits", "the trained model (accepted: --help teacher)")
    data: str = model_flag("digits", "the real images (accepted: --help data)")
    output_dir: str = flags.output_dir("runs/variance-digits")
    levels: int = measuring_flag(15, "noise levels", at_least=2, at_most=1000)
    samples: int = measuring_flag(1024, "images per noise level", at_least=2, at_most=1_000_000)
    gradients: int = measuring_flag(24, "batches whose gradients are compared", at_least=2, at_most=10_000)
    batch_size: int = training_flag(128, "images per batch", **BATCH)
    training_images: int = training_flag(64_000, "training images of each of the two students", **TRAINED)
    references: int = measuring_flag(4096, "most images for the estimate of the teacher's bias", at_least=2, at_most=1_000_000)
    seed: int = machine_flag(0, "seed of all random numbers", **SEED)
    log_with: str | None = machine_flag(None, "an Accelerate tracker", choices=TRACKERS)

    TOPICS: ClassVar = flags.TOPICS


flags_first(__name__, Config, __doc__, PRESETS)

import torch
from torch import Tensor

import teachers
from distill.denoiser import Denoiser, on_schedule
from distill.device import send
from distill.distance import snr_plus_one
from distill.files import write_json, write_text
from distill.regression import Regression
from distill.rng import Rng
from distill.schedule import Schedule, add_noise
from distill.target import DataSample, Mix, PosteriorMean, Target
from distill.teacher_bias import NoisySample, TeacherBias
from distill.train import BatchSplit, Optimization, train
from eval.progress import progress
from eval.variance_page import draw, page, verdict
from recipes.common.building import estimated_bias
from recipes.common.checks import check_match
from recipes.common.run import Run, processes
from recipes.data import sets
from recipes.data.sets import Data
from teachers import Teacher
from teachers.students import untrained


def gradients(
    student: Denoiser, targets: dict[str, Target], bias: TeacherBias, level: Tensor, config: Config
) -> dict[str, list[float]]:
    """Return |mean gradient|^2 over the variance of a batch's gradient, and that variance, for each target at one log-SNR.

    The loss is the squared error of v. All targets see the same data and noise. Both estimates are unbiased: |mean|^2 is
    |sample mean|^2 - variance / n.
    """
    schedule, generator = student.schedule, torch.Generator().manual_seed(config.seed)
    weights = [p for p in student.net.parameters() if p.requires_grad]
    total, squares = {name: torch.zeros((), device=bias.data.device) for name in targets}, dict.fromkeys(targets, 0.0)
    for _ in range(config.gradients):
        drawn = bias.draw(schedule, level, config.batch_size, generator)
        output = student(drawn.x_t, drawn.t, **drawn.cond)
        for name, target in targets.items():
            x0_hat = target(schedule, drawn.x_t, drawn.t, drawn.x0, **drawn.cond)
            weight = send(snr_plus_one(schedule, drawn.t), output.device)  # of the error of x0 in that of v
            loss = (weight * (output - x0_hat).square().flatten(1).mean(1)).mean()
            flat = torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights, retain_graph=True)])
            total[name] = total[name] + flat
            squares[name] += float(flat.square().sum())
    out, n = {}, config.gradients
    for name in targets:
        mean = float((total[name] / n).square().sum())
        variance = (squares[name] - n * mean) / (n - 1)
        out[name] = [max(0.0, mean - variance / n) / variance, variance]
    return out


def measured(config: Config, teacher: Teacher, bias: TeacherBias, fresh: Denoiser) -> dict:
    """Return the error of the four targets, and the variance and signal-to-noise ratio of their gradients, per noise level."""
    schedule, logsnr = teacher.denoiser.schedule, torch.linspace(-8, 8, config.levels)
    generator = torch.Generator().manual_seed(config.seed)
    found = bias.errors(schedule, logsnr, generator, config.samples)
    targets: dict[str, Target] = {
        "data": DataSample(),
        "teacher": Mix(teacher.denoiser, 1.0),
        "mix": Mix(teacher.denoiser, found["best"], logsnr),
        "posterior mean": PosteriorMean(),
    }
    v, b, g = found["variance"], found["bias"], found["best"]
    error = {"data": v.tolist(), "teacher": b.tolist(), "mix": ((1 - g) ** 2 * v + g**2 * b).tolist(), "posterior mean": []}
    rows: dict[str, dict[str, list[float]]] = {
        name: {"error": error[name], "gradient_snr": [], "gradient_variance": []} for name in targets
    }
    for level in progress(logsnr, desc="noise levels", unit="level"):
        error["posterior mean"].append(
            error_of_batches(bias.draw(schedule, level, config.samples, generator), schedule, config)
        )
        for name, (snr, variance) in gradients(fresh, targets, bias, level, config).items():
            rows[name]["gradient_snr"].append(snr)
            rows[name]["gradient_variance"].append(variance)
    return {"logsnr": logsnr.tolist(), "best": g.tolist(), "targets": rows}


def error_of_batches(drawn: NoisySample, schedule: Schedule, config: Config) -> float:
    """Return E|x0_hat - E[x0 | x_t]|^2 per pixel for the posterior means of batches."""
    parts = [slice(i, i + config.batch_size) for i in range(0, config.samples, config.batch_size)]
    of_part = PosteriorMean()
    x0_hat = [
        of_part(schedule, drawn.x_t[p], drawn.t[p], drawn.x0[p], **{k: z[p] for k, z in drawn.cond.items()}) for p in parts
    ]
    return float((torch.cat(x0_hat) - drawn.expected).square().mean())


def curve(run: Run, config: Config, fresh: Teacher, target: Target, data: Data, held_out: TeacherBias) -> list[list[float]]:
    """Train a student. Return [images, `excess` on held-out images] at about thirty points."""
    name = "data" if isinstance(target, DataSample) else "teacher"
    how = Optimization(config.training_images, config.batch_size, warmup_images=4_000)
    batches = data.batches(BatchSplit(config.batch_size), config.seed, "variance", run.device, fresh.condition)
    states = train(Regression(target), fresh.student(), batches, run.accelerator, how, seed=config.seed, phase="variance")
    points = []
    for state in run.watch(states, name, how.trained_images, f"student of the {name}"):
        if state.step % max(1, how.steps // 30) == 0:
            points.append([state.images, excess(state.student, held_out, config.seed)])
    run.accelerator.free_memory()
    return points


@torch.no_grad()
def excess(student: Denoiser, held_out: TeacherBias, seed: int, n: int = 1024) -> float:
    """Return how much larger the student's error in v is than the teacher's, per pixel over all noise levels, on held-out images.

    It is E (|x0 - student|^2 - |x0 - teacher|^2) (snr + 1).
    """
    schedule, rng = student.schedule, Rng(torch.Generator().manual_seed(seed + 2), n)
    index = rng.integers(len(held_out.data)).to(held_out.data.device)
    x0, cond = held_out.data[index], held_out.condition(None if held_out.labels is None else held_out.labels[index])
    t = 0.02 + 0.96 * rng.uniform().to(x0)
    x_t = add_noise(schedule, x0, rng.normal(x0), t)
    mine, teachers_ = ((x0 - d(x_t, t, **cond)).square() for d in (student, on_schedule(held_out.teacher, schedule)))
    return float(((mine - teachers_).flatten(1).mean(1) * snr_plus_one(schedule, t)).mean())


def split_data(data: Data, seed: int) -> tuple[Data, Data]:
    """Return nine tenths of the images, and the rest."""
    order = torch.randperm(len(data.images), generator=torch.Generator().manual_seed(seed))
    cut = max(1, len(order) // 10)
    first, rest = (
        replace(data, images=data.images[part], labels=None if data.labels is None else data.labels[part], captions=None)
        for part in (order[cut:], order[:cut])
    )
    return first, rest


def main(argv: list[str] | None = None) -> None:
    with one_line_errors():
        config = parse(Config, __doc__, PRESETS, argv)
        teacher, data = teachers.load(config.teacher), sets.load(config.data)
        data = check_match(teacher, data, training=True)
        if processes() > 1 or data.stream is not None:
            raise ValueError("this report needs one process and a set in memory, of which some images are held out")
        if teacher.embeddings is not None:
            raise ValueError("the students of this report are conditioned on labels or on nothing, and this teacher on text")
        fresh = untrained(data.sample_shape, teacher.classes, (32, 48), 1, config.seed)
        run = Run.open(config)
    device = run.device
    for model in (teacher, fresh):
        model.to(device)
    fresh.parametric.net.train()
    out = measured(config, teacher, estimated_bias(teacher, data, config.references, config.seed, device), fresh.parametric)
    kept, rest = split_data(data, config.seed)
    held_out = estimated_bias(teacher, rest, config.references, config.seed, device)
    targets: dict[str, Target] = {"data": DataSample(), "teacher": Mix(teacher.denoiser)}
    out["curves"] = {name: curve(run, config, fresh, target, kept, held_out) for name, target in targets.items()}
    out["verdict"] = verdict(out)
    if run.main:
        write_json(run.folder / "variance.json", out)
        draw(out, run.folder / "variance.png")
        write_text(run.folder / "variance.html", page(out))
    run.say(f"{out['verdict']}\nreport: {run.folder / 'variance.html'}")
    run.close()


if __name__ == "__main__":
    main()
