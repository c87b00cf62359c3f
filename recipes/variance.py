"""Why distillation learns faster than training: the variance of its targets and gradients, by noise level, and the loss curves.

    python recipes/variance.py --teacher digits --output-dir runs/variance-digits

Of the datum, of the teacher's E[x0 | x_t], of their best mix and of the batch's posterior mean it measures, against E[x0 | x_t] as
well as the teacher and the data together tell it (`distill.target.Judge`): the error of the target, variance and squared bias, and the
signal-to-noise ratio of the gradient it gives an untrained student. Then two students of equal seed are trained for equal images,
one on data and one on the teacher, and tried on images that neither was trained on.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from tqdm import tqdm

import teachers
from distill.checkpoint import write_json, write_text
from distill.denoise import Denoise
from distill.denoiser import Denoiser, ask_in
from distill.distance import WEIGHTS
from distill.rng import Rng
from distill.schedule import Schedule, add_noise
from distill.target import Datum, Judge, Mix, PosteriorMean, Sample, Target
from distill.train import Optimization, Shares, train
from eval.variance import draw, page, verdict
from recipes import data as datasets
from recipes.common import Run, flag, one_line_errors, parse, processes
from recipes.matching import check_match
from recipes.methods import judged
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
    references: int = flag(4096, "most images by which the teacher is judged")
    seed: int = flag(0, "seed of everything")
    log_with: str | None = flag(None, "an Accelerate tracker", choices=("tensorboard", "wandb"))
    threads: int = flag(0, "CPU threads a process; 0 shares the cores out evenly")


def gradients(
    student: Denoiser, targets: dict[str, Target], judge: Judge, level: Tensor, config: Config
) -> dict[str, list[float]]:
    """Of each target: |mean gradient|^2 over the variance of one batch's gradient, and that variance, of v's squared error at one
    log-SNR.

    The same data and noise for every target. Both mean and variance are unbiased: |mean|^2 is |sample mean|^2 - variance / n.
    """
    schedule, generator = student.schedule, torch.Generator().manual_seed(config.seed)
    weights = [p for p in student.net.parameters() if p.requires_grad]
    total, squares = {name: torch.zeros((), device=judge.data.device) for name in targets}, dict.fromkeys(targets, 0.0)
    for _ in range(config.gradients):
        drawn = judge.draw(schedule, level, config.batch_size, generator)
        answer = student(drawn.x_t, drawn.t, **drawn.cond)
        for name, target in targets.items():
            x0_hat = target(schedule, drawn.x_t, drawn.t, drawn.x0, **drawn.cond)
            weight = WEIGHTS["snr_plus_one"](schedule, drawn.t)  # of x0's error in that of v
            loss = (weight * (answer - x0_hat).square().flatten(1).mean(1)).mean()
            flat = torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights, retain_graph=True)])
            total[name] = total[name] + flat
            squares[name] += float(flat.square().sum())
    out, n = {}, config.gradients
    for name in targets:
        mean = float((total[name] / n).square().sum())
        variance = (squares[name] - n * mean) / (n - 1)
        out[name] = [max(0.0, mean - variance / n) / variance, variance]
    return out


def measured(config: Config, teacher: Teacher, judge: Judge, fresh: Denoiser) -> dict:
    """Per noise level: variance and bias of the four targets, gradient variance and signal-to-noise ratio of each."""
    schedule, logsnr = teacher.denoiser.schedule, torch.linspace(-8, 8, config.levels)
    generator = torch.Generator().manual_seed(config.seed)
    found = judge.errors(schedule, logsnr, generator, config.samples)
    targets: dict[str, Target] = {
        "datum": Datum(),
        "teacher": Mix(teacher.denoiser, 1.0),
        "mix": Mix(teacher.denoiser, found["best"], logsnr),
        "posterior mean": PosteriorMean(),
    }
    v, b, g = found["variance"], found["bias"], found["best"]
    error = {"datum": v.tolist(), "teacher": b.tolist(), "mix": ((1 - g) ** 2 * v + g**2 * b).tolist(), "posterior mean": []}
    rows: dict[str, dict[str, list[float]]] = {
        name: {"error": error[name], "gradient_snr": [], "gradient_variance": []} for name in targets
    }
    for level in tqdm(logsnr, desc="noise levels", disable=None):
        error["posterior mean"].append(
            error_of_batches(judge.draw(schedule, level, config.samples, generator), schedule, config)
        )
        for name, (snr, variance) in gradients(fresh, targets, judge, level, config).items():
            rows[name]["gradient_snr"].append(snr)
            rows[name]["gradient_variance"].append(variance)
    return {"logsnr": logsnr.tolist(), "best": g.tolist(), "targets": rows}


def error_of_batches(drawn: Sample, schedule: Schedule, config: Config) -> float:
    """E|x0_hat - E[x0 | x_t]|^2 a pixel of the posterior means of batches."""
    parts = [slice(i, i + config.batch_size) for i in range(0, config.samples, config.batch_size)]
    of_part = PosteriorMean()
    x0_hat = [
        of_part(schedule, drawn.x_t[p], drawn.t[p], drawn.x0[p], **{k: z[p] for k, z in drawn.cond.items()}) for p in parts
    ]
    return float((torch.cat(x0_hat) - drawn.expected).square().mean())


def curve(run: Run, config: Config, fresh: Teacher, target: Target, data: datasets.Data, held_out: Judge) -> list[list[float]]:
    """Training from one seed: [images, `excess` on the images held out] about thirty times on the way."""
    name = "datum" if isinstance(target, Datum) else "teacher"
    how = Optimization(config.training_images, config.batch_size, warmup_images=4_000)
    conditional = fresh.classes is not None
    batches = data.batches(Shares(config.batch_size), config.seed, "variance", run.accelerator.device, conditional)
    states = train(Denoise(target), fresh.student(), batches, run.accelerator, how, seed=config.seed, phase="variance")
    points = []
    for state in run.watch(states, name, config.training_images, f"student of the {name}"):
        if state.step % max(1, how.steps // 30) == 0:
            points.append([state.images, excess(state.student, held_out, config.seed)])
    run.accelerator.free_memory()
    return points


@torch.no_grad()
def excess(student: Denoiser, held_out: Judge, seed: int, n: int = 1024) -> float:
    """E (|x0 - student|^2 - |x0 - teacher|^2) / sigma^2 a pixel over all noise levels, of images of which neither target came: how
    much more the student errs in v than the teacher."""
    schedule, rng = student.schedule, Rng(torch.Generator().manual_seed(seed + 2), n)
    index = rng.integers(len(held_out.data)).to(held_out.data.device)
    x0, cond = held_out.data[index], held_out.condition(None if held_out.labels is None else held_out.labels[index])
    t = 0.02 + 0.96 * rng.uniform().to(x0)
    x_t = add_noise(schedule, x0, rng.normal(x0), t)
    mine, teachers_ = ((x0 - d(x_t, t, **cond)).square() for d in (student, ask_in(held_out.teacher, schedule)))
    return float(((mine - teachers_).flatten(1).mean(1) * WEIGHTS["snr_plus_one"](schedule, t)).mean())


def parted(data: datasets.Data, seed: int) -> tuple[datasets.Data, datasets.Data]:
    """Nine tenths of the images and the rest."""
    order = torch.randperm(len(data.images), generator=torch.Generator().manual_seed(seed))
    cut = max(1, len(order) // 10)
    first, rest = (
        replace(data, images=data.images[part], labels=None if data.labels is None else data.labels[part], captions=None)
        for part in (order[cut:], order[:cut])
    )
    return first, rest


def main(argv: list[str] | None = None) -> None:
    with one_line_errors():
        config = parse(Config, __doc__.splitlines()[0], PRESETS, argv)
        teacher, data = teachers.load(config.teacher), datasets.load(config.data)
        data = check_match(teacher, data, training=True)
        if processes() > 1 or data.stream is not None:
            raise ValueError("this report is made by one process, on a set in memory of which some images are held out")
        if teacher.table is not None:
            raise ValueError("the students of this report are told labels or nothing, and this teacher a text")
        fresh = untrained(data.shape, teacher.classes, (32, 48), 1, config.seed)
        run = Run.open(config)
    device = run.accelerator.device
    for model in (teacher, fresh):
        model.to(device)
    fresh.parametric.net.train()
    out = measured(config, teacher, judged(teacher, data, config.references, config.seed, device), fresh.parametric)
    kept, rest = parted(data, config.seed)
    held_out = judged(teacher, rest, config.references, config.seed, device)
    targets: dict[str, Target] = {"datum": Datum(), "teacher": Mix(teacher.denoiser)}
    out["curves"] = {name: curve(run, config, fresh, target, kept, held_out) for name, target in targets.items()}
    out["verdict"] = verdict(out)
    if run.main:
        write_json(run.folder / "variance.json", out)
        draw(out, run.folder / "variance.png")
        write_text(run.folder / "variance.html", page(out, run.folder))
    run.say(f"{out['verdict']}\nreport: {run.folder / 'variance.html'}")
    run.close()


if __name__ == "__main__":
    main()
