"""Why distillation learns faster than training: the variance of its targets and gradients, by noise level, and the loss curves.

    python recipes/variance.py --teacher digits --output-dir runs/variance-digits

Of the datum, of the teacher's E[x0 | x_t], of their best mix and of the batch's posterior mean it measures, against the exact
E[x0 | x_t] of the data: the variance of the target, its bias, and the signal-to-noise ratio of the gradient it gives an untrained
student. Then two students of equal seed are trained for equal images, one on data and one on the teacher.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from tqdm import tqdm

import teachers
from distill.checkpoint import write_json, write_text
from distill.denoise import Denoise
from distill.denoiser import Denoiser
from distill.rng import Rng
from distill.schedule import add_noise
from distill.target import Datum, Mix, PosteriorMean, Target, errors, posterior_mean
from distill.train import Optimization, Shares, train
from eval.variance import draw, page, verdict
from recipes import data as datasets
from recipes.common import Run, flag, one_line_errors, parse
from recipes.measure import check_match
from teachers import Teacher
from teachers.unet import untrained

PRESETS: dict[str, dict] = {
    "default": {},
    "smoke": {"levels": 3, "samples": 128, "gradients": 4, "training_images": 2048},
}


@dataclass(frozen=True)
class Config:
    preset: str = flag("default", "default, or smoke (everything in less than a minute)", choices=PRESETS)
    teacher: str = flag("digits", "the teacher: " + teachers.ACCEPTED.replace("%", "%%"))
    data: str = flag("digits", "the real images: " + datasets.ACCEPTED)
    output_dir: str = flag("runs/variance-digits", "a new directory, or one that holds the same run")
    levels: int = flag(15, "noise levels")
    samples: int = flag(1024, "images a noise level")
    gradients: int = flag(24, "batches whose gradients are compared")
    batch_size: int = flag(128, "images a batch")
    training_images: int = flag(64_000, "images that each of the two students is trained on")
    references: int = flag(4096, "most images the exact E[x0 | x_t] is taken over")
    seed: int = flag(0, "seed of everything")
    log_with: str | None = flag(None, "an Accelerate tracker", choices=("tensorboard", "wandb"))
    threads: int = flag(0, "CPU threads a process; 0 shares the cores out evenly")


@dataclass(frozen=True)
class Facts:
    """Images in [-1, 1] with their labels, on which everything here is measured."""

    x0: Tensor
    labels: Tensor | None

    def batch(self, n: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        index = torch.randint(len(self.x0), (n,), generator=generator)
        return self.x0[index], {} if self.labels is None else {"labels": self.labels[index]}


def gradient_snr(student: Denoiser, target: Target, facts: Facts, level: Tensor, config: Config) -> tuple[float, float]:
    """|mean gradient|^2 over the variance of one batch's gradient, and that variance, of v's squared error at one log-SNR.

    The same data and noise for every target. Both mean and variance are unbiased: |mean|^2 is |sample mean|^2 - variance / n.
    """
    schedule, generator = student.schedule, torch.Generator().manual_seed(config.seed)
    weights = [p for p in student.net.parameters() if p.requires_grad]
    total, squares = torch.zeros(sum(p.numel() for p in weights), device=facts.x0.device), 0.0
    for _ in range(config.gradients):
        x0, cond = facts.batch(config.batch_size, generator)
        t = schedule.time(level).expand(len(x0)).to(x0)
        x_t = add_noise(schedule, x0, torch.randn(x0.shape, generator=generator).to(x0), t)
        x0_hat = target(schedule, x_t, t, x0, **cond)
        weight = 1 / schedule.sigma(t).square()  # of x0's error in that of v
        loss = (weight * (student(x_t, t, **cond) - x0_hat).square().flatten(1).mean(1)).mean()
        flat = torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights)])
        total += flat
        squares += float(flat.square().sum())
    n = config.gradients
    mean = total / n
    variance = (squares - n * float(mean.square().sum())) / (n - 1)
    return max(0.0, float(mean.square().sum()) - variance / n) / variance, variance


def measured(config: Config, teacher: Teacher, facts: Facts, fresh: Denoiser) -> dict:
    """Per noise level: variance and bias of the four targets, gradient variance and signal-to-noise ratio of each."""
    schedule = teacher.denoiser.schedule
    logsnr = torch.linspace(-8, 8, config.levels)
    generator = torch.Generator().manual_seed(config.seed)
    found = errors(teacher.denoiser, schedule, facts.x0, facts.labels, logsnr, generator, config.samples)
    best = Mix(teacher.denoiser, found["best"], logsnr)
    targets: dict[str, Target] = {
        "datum": Datum(),
        "teacher": Mix(teacher.denoiser, 1.0),
        "mix": best,
        "posterior mean": PosteriorMean(),
    }
    out: dict = {"logsnr": logsnr.tolist(), "best": found["best"].tolist(), "targets": {}}
    for name, target in targets.items():
        rows: dict[str, list[float]] = {"error": [], "gradient_snr": [], "gradient_variance": []}
        for level in tqdm(logsnr, desc=f"target: {name}", leave=False, disable=None):
            rows["error"].append(error_of(target, facts, schedule, level, config))
            snr, variance = gradient_snr(fresh, target, facts, level, config)
            rows["gradient_snr"].append(snr)
            rows["gradient_variance"].append(variance)
        out["targets"][name] = rows
    out["targets"]["datum"]["variance"] = found["variance"].tolist()
    out["targets"]["teacher"]["bias"] = found["bias"].tolist()
    return out


@torch.no_grad()
def error_of(target: Target, facts: Facts, schedule, level: Tensor, config: Config) -> float:
    """E|x0_hat - E[x0 | x_t]|^2 a pixel: variance and squared bias together."""
    generator = torch.Generator().manual_seed(config.seed + 1)
    values = []
    for _ in range(max(1, config.samples // config.batch_size)):
        x0, cond = facts.batch(config.batch_size, generator)
        t = schedule.time(level).expand(len(x0)).to(x0)
        x_t = add_noise(schedule, x0, torch.randn(x0.shape, generator=generator).to(x0), t)
        mean = posterior_mean(schedule, x_t, t, facts.x0, cond.get("labels"), facts.labels)
        values.append((target(schedule, x_t, t, x0, **cond) - mean).square().mean())
    return float(torch.stack(values).mean())


def curve(
    run: Run, config: Config, model: Teacher, teacher: Teacher | None, data: datasets.Data, facts: Facts
) -> list[list[float]]:
    """Training from one seed: [images, error against the exact E[x0 | x_t]] about thirty times on the way."""
    name = "datum" if teacher is None else "teacher"
    student = replace(model.parametric, net=copy.deepcopy(model.parametric.net).requires_grad_(True))
    method = Denoise(Datum() if teacher is None else Mix(teacher.denoiser))
    how = Optimization(config.training_images, config.batch_size, warmup_images=4_000)
    batches = data.batches(Shares(config.batch_size), config.seed, "variance", run.accelerator.device)
    states = train(method, student, batches, run.accelerator, how, seed=config.seed, phase="variance")
    points = []
    for state in run.watch(states, name, config.training_images, f"student of the {name}"):
        if state.step % max(1, how.steps // 30) == 0:
            points.append([state.images, held_out_error(state.student, facts, config)])
    run.accelerator.free_memory()
    return points


@torch.no_grad()
def held_out_error(student: Denoiser, facts: Facts, config: Config) -> float:
    """E|student - E[x0 | x_t]|^2 / sigma^2, the error of v about the exact answer, over all noise levels."""
    schedule = student.schedule
    rng = Rng(torch.Generator().manual_seed(config.seed + 2), 512)
    x0, cond = facts.batch(512, rng.generator)
    t = 0.02 + 0.96 * rng.uniform().to(x0)
    x_t = add_noise(schedule, x0, rng.normal(x0), t)
    mean = posterior_mean(schedule, x_t, t, facts.x0, cond.get("labels"), facts.labels)
    error = (student(x_t, t, **cond) - mean).square().flatten(1).mean(1)
    return float((error / schedule.sigma(t).square()).mean())


def main(argv: list[str] | None = None) -> None:
    with one_line_errors():
        config = parse(Config, __doc__.splitlines()[0], PRESETS, argv)
        teacher, data = teachers.load(config.teacher), datasets.load(config.data)
        check_match(teacher, data, training=True)
        fresh = untrained(data.shape, data.classes, (32, 48), 1, config.seed)
        run = Run.open(config)
    device = run.accelerator.device
    for model in (teacher, fresh):
        model.to(device)
    some = torch.randperm(len(data.images), generator=torch.Generator().manual_seed(config.seed))[: config.references]
    labels = None if data.labels is None or teacher.classes is None else data.labels[some].to(device)
    facts = Facts(data.x0(some, device), labels)
    nn.Module.train(fresh.parametric.net)
    out = measured(config, teacher, facts, fresh.parametric)
    out["curves"] = {
        "datum": curve(run, config, fresh, None, data, facts),
        "teacher": curve(run, config, fresh, teacher, data, facts),
    }
    out["verdict"] = verdict(out)
    if run.main:
        write_json(run.folder / "variance.json", out)
        draw(out, run.folder / "variance.png")
        write_text(run.folder / "variance.html", page(out, run.folder))
    run.say(f"{out['verdict']}\nreport: {run.folder / 'variance.html'}")
    run.close()


if __name__ == "__main__":
    main()
