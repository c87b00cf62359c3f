"""Train a diffusion teacher: a diffusers UNet2DModel on any schedule, from data or from another teacher.

    accelerate launch recipes/teacher.py --output-dir runs/teacher-digits          the embedded teacher
    python recipes/teacher.py --prediction edm --schedule edm                      as Karras et al., arXiv 2206.00364
    python recipes/teacher.py --schedule flow --source digits,labels=3 --data digits,labels=8 --output-dir runs/3-to-8
    python recipes/teacher.py --teacher SPEC --channels 16 32                      a smaller network that learns E[x0 | x_t] of SPEC

The default is v prediction on a discrete cosine table of 1024 entries with zero terminal SNR. Every ladder of powers of two meets its
entries exactly, in our samplers and in those of diffusers.
Writes teacher.safetensors, which every --teacher accepts, samples.png, metrics.jsonl and config.json.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import ClassVar

from distill import names
from recipes.common import flags
from recipes.common.accepted import CHANNELS, LAYERS, LEARNING_RATE, TRAINED
from recipes.common.cli import duration, flag, flags_first, method_flag, model_flag, one_line_errors, parse, training_flag
from recipes.common.real_images import CIFAR10, FASHION, REAL_IMAGES

PRESETS: dict[str, dict] = {
    "default": {},  # FID 0.066 with 64 DDIM steps (n = 10,000); 9 minutes on two CPU cores
    "smoke": {"training_images": 4096, "channels": (16, 32)},  # some seconds, no quality
    "fashion": FASHION
    | {"output_dir": "runs/fashion/teacher", "channels": (32, 64, 64), "training_images": 800_000},  # estimate: 1 hour of one core
    "cifar10": CIFAR10
    | {
        "output_dir": "runs/cifar10/teacher", "channels": (128, 256, 256), "layers": 2, "training_images": 50_000_000, "lr": 4e-4,
        "batch_size": 512, "ema_halflife_images": 500_000, "mixed_precision": "bf16",
    },  # for a GPU; tried with short trainings alone
}  # fmt: skip
SCHEDULES = ("table", "cosine", "linear_vp", "flow", "edm")


@dataclass(frozen=True)
class Config(flags.PlanFlags, flags.RunFlags, flags.TrainingFlags):
    preset: str = flag("default", f"smoke is a trial run of some seconds; {REAL_IMAGES}", choices=PRESETS)
    teacher: str | None = model_flag(None, "learn E[x0 | x_t] of this model instead of the data (accepted: --help teacher)")
    data: str = model_flag("digits", "the training data (accepted: --help data)")
    source: str | None = model_flag(
        None,
        "start paths from images instead of noise: a data set, or lowres=4[,noise=0.1] for the data at a lower resolution; with --schedule"
        " flow (arXiv 2305.03486, 2303.11435)",
        short=False,
    )
    force: bool = model_flag(False, "learn even if the probe finds that the teacher is not a denoiser", short=False)
    output_dir: str = flags.output_dir("runs/teacher-digits")
    training_images: int = training_flag(800_000, "training images", was="images", **TRAINED)
    lr: float = training_flag(2e-3, "learning rate; it falls linearly to 0 over the last 30 % of the run", **LEARNING_RATE)
    warmup_images: int = training_flag(
        25_000, "images over which the learning rate rises at the start", short=False, **(TRAINED | {"at_least": 0})
    )
    ema_halflife_images: float = training_flag(
        50_000, "half-life of the average of the weights that is kept", short=False, **TRAINED
    )
    prediction: str = method_flag(
        "v", "output of the network; eps and score need --schedule linear_vp or edm", choices=names.PREDICTIONS
    )
    schedule: str = method_flag("table", "noise schedule; table: cosine, 1024 entries, zero terminal SNR", choices=SCHEDULES)
    sigma_data: float | None = method_flag(
        None, "standard deviation of the data, for prediction edm", short=False, own=lambda v: "measured", above=0, at_most=1000
    )
    times: str | None = method_flag(
        None, "where training draws t", choices=names.DRAWS, short=False, own=lambda v: _draw_name(v["schedule"])
    )
    weight: str | None = method_flag(
        None, "weight of the x0 error", choices=names.WEIGHTS, short=False, own=lambda v: _weight_name(v["prediction"])
    )
    channels: tuple[int, ...] = model_flag((32, 48), "channels of the UNet, one per resolution", **CHANNELS)
    layers: int = model_flag(1, "residual blocks per resolution", short=False, **LAYERS)
    self_conditioning: bool = model_flag(
        False,
        "a network that also takes its previous estimate of x0, fed on half of each batch (arXiv 2208.04202)",
        short=False,
    )
    label_dropout: float = training_flag(
        0.1, "part of the labels replaced by the null class, for guidance", short=False, at_least=0, at_most=1
    )

    MAY_CHANGE: ClassVar = ("force", "rollbacks", "compile", "checkpoint_activations", "dry_run")
    TOPICS: ClassVar = flags.TOPICS
    MOVED: ClassVar = {
        "--probe": "python recipes/probe.py --model SPEC --data DATA",
        "--nll": "python recipes/likelihood.py --model SPEC --data DATA",
    }


def _draw_name(schedule: str) -> str:
    return "lognormal" if schedule == "edm" else "uniform"


def _weight_name(prediction: str) -> str:
    return {"eps": "snr", "score": "snr", "x0": "min_snr"}.get(prediction, "snr_plus_one")


flags_first(__name__, Config, __doc__, PRESETS)

import teachers
from distill.denoiser import Denoiser, under_autocast
from distill.distance import WEIGHTS
from distill.regression import DRAWS, Regression
from distill.resume import Resumable
from distill.sampling import Sampling
from distill.schedule import Schedule, schedule_from
from distill.source import Coupled, Source
from distill.speed import checkpoint_activations, compiled
from distill.target import DataSample, Mix, Target
from distill.train import BatchSplit, Method, Optimization, train
from eval.generate import images
from eval.image_grid import contact_sheet
from eval.machine import peak_memory_gb
from recipes.common.checks import check_denoiser, check_finite_data, check_match, check_optimizer, codec_of
from recipes.common.cost import ADAM
from recipes.common.forecast import Forecast
from recipes.common.interrupts import finishing_steps, interruptible, stop_requested
from recipes.common.plan import batches_text, gigabytes, measure_step_time, size_of, training_memory
from recipes.common.run import Run, finished_file, processes, settings_of
from recipes.common.training import divergence_errors
from recipes.data import sets, source
from recipes.data.sets import Data
from teachers import Teacher
from teachers.students import untrained, with_self_conditioning
from teachers.teacher import frozen


@interruptible()
def main(argv: list[str] | None = None) -> None:
    with one_line_errors():
        config = parse(Config, __doc__, PRESETS, argv)
        config.check_precision(config.teacher)
        check_optimizer(config.optimizer)
        data = check_finite_data(sets.load(config.data))
        teacher = None if config.teacher is None else _checked(config, teachers.load(config.teacher), data)
        start = _source(config, data)
        labelled = (teacher is None or teacher.classes is not None) and (start is None or start.lowres is None)
        model = replace(initial_model(config, data, data.classes if labelled else None), source=start)
        BatchSplit(config.batch_size, processes(), microbatch=config.microbatch)
        warning = None if teacher is None else check_denoiser(teacher, data, config.seed, config.force)
        run = Run.open(config)
    if warning:
        run.say(f"warning: {warning}")
    fit(config, run, model, teacher, data)
    run.close()


def fit(config: Config, run: Run, model: Teacher, teacher: Teacher | None, data: Data) -> None:
    """Minimise E w(t) |D(x_t, t) - x0_hat|^2, where x0_hat is the data sample or a teacher's E[x0 | x_t]."""
    target: Target = DataSample()
    if teacher is not None:
        target = Mix(under_autocast(teacher.to(run.device).denoiser, config.autocast_of_teacher))
    weight, draw = config.weight or _weight_name(config.prediction), config.times or _draw_name(config.schedule)
    method: Method = Regression(target, WEIGHTS[weight], draw=DRAWS[draw])
    method = method if model.source is None else Coupled(method, model.source)
    split = BatchSplit(config.batch_size, run.accelerator.num_processes, run.accelerator.process_index, config.microbatch)
    batches = data.batches(split, config.seed, "teacher", run.device, model.condition, model.null, config.label_dropout)
    student = model.parametric
    if config.checkpoint_activations:
        checkpoint_activations(student.net)
    budget = Optimization(
        config.training_images, config.batch_size, config.microbatch, config.lr, constant=0.7, betas=(0.9, 0.99),
        warmup_images=config.warmup_images, ema_halflife_images=config.ema_halflife_images, optimizer=config.optimizer,
    )  # fmt: skip
    x0, cond = next(iter(batches(0)))
    seconds, call = measure_step_time(method, student, x0, cond, budget.steps, run.accelerator.mixed_precision)
    announce(budget, run, student, data, seconds)
    if config.dry_run:
        needed = training_memory(
            method, student, x0, cond, run.accelerator, frozen=0 if teacher is None else size_of(teacher.tensors().values()),
            averaged=bool(budget.ema_halflife_images), adam_bytes=ADAM[config.optimizer],
        )  # fmt: skip
        run.say(f"  memory of training {gigabytes(needed.memory)}; {batches_text(needed, len(x0))} at once in a process")
        raise SystemExit(0)
    file, resumable = run.folder / "teacher.safetensors", Resumable(run.folder / "resume", run.say)
    training = budget.trained_images * seconds / run.accelerator.num_processes
    whole = not (file.exists() or resumable.folder.exists())
    forecast = Forecast(training, 0.0, budget.trained_images, run.device, whole, ending=100 * 64 * call)  # samples.png
    if not file.exists():
        with finishing_steps(), divergence_errors(), compiled(student, method) if config.compile else nullcontext():
            states = train(
                method, student, batches, run.accelerator, budget, seed=config.seed, phase="teacher", resumable=resumable,
                save_every_images=max(1, config.training_images // 16), rollbacks=config.rollbacks, stop=stop_requested,
            )  # fmt: skip
            for state in run.watch(states, "teacher", budget.trained_images, "teacher", left=forecast.left):
                average = state.ema
            if run.main:
                frozen(average.net)
                kind = "diffusion" if teacher is None else "denoise"
                record: dict = {"method": kind, "of": config.teacher, "config": settings_of(config)}
                record["trained_images"] = budget.trained_images
                teachers.save(file, replace(model, denoiser=average, record=record))
    run.accelerator.wait_for_everyone()
    if run.main:
        with finished_file():
            made = source.load(str(file)).to(run.device)
        resumable.clear()
        draw_samples(made, run, config.seed)
    if forecast.whole:
        run.say(forecast.outcome())
    run.say(f"teacher: {file}\nsamples: {run.folder / 'samples.png'}")


def initial_model(config: Config, data: Data, classes: int | None) -> Teacher:
    """Return the untrained network as a denoiser of the configuration's schedule and prediction."""
    model = untrained(data.sample_shape, classes, config.channels, config.layers, config.seed)
    model = with_self_conditioning(model) if config.self_conditioning else model
    default = model.parametric
    schedule: Schedule = default.schedule if config.schedule == "table" else schedule_from(config.schedule)
    time = {"table": default.time, "edm": "thousand_log_sigma"}.get(config.schedule, "thousand_time")
    sigma_data = default.sigma_data
    if config.prediction == "edm":
        sigma_data = float(data.x0(slice(4096)).std()) if config.sigma_data is None else config.sigma_data
        if not sigma_data > 0:
            raise ValueError(f"--sigma-data {sigma_data:g}: accepted are numbers above 0")
    return replace(model, denoiser=Denoiser(default.net, schedule, config.prediction, time, sigma_data), codec=codec_of(data))


def _source(config: Config, data: Data) -> Source | None:
    """Return where paths start; None for noise. Raises ValueError where that does not fit the other flags."""
    if config.source is None:
        return None
    found = source.source_of(config.source, config.data, data)
    if config.schedule != "flow" or config.teacher is not None:
        wrong = "--teacher" if config.teacher is not None else f"--schedule {config.schedule}"
        raise ValueError(f"--source with {wrong}: accepted is --schedule flow, and data as the target")
    return found


def _checked(config: Config, teacher: Teacher, data: Data) -> Teacher:
    """Return the teacher. Raises ValueError where it does not support the labels of this training."""
    check_match(teacher, data, training=True)
    if teacher.embeddings is not None:
        raise ValueError("the new network is conditioned on labels or on nothing, and this teacher on text")
    if config.label_dropout and teacher.classes is not None and teacher.null != data.classes:
        raise ValueError(f"the teacher's null label is {teacher.null}, not {data.classes}: use --label-dropout 0")
    return teacher


def announce(budget: Optimization, run: Run, student: Denoiser, data: Data, seconds: float) -> None:
    """Say what will be trained, how long it should take and how much memory. ``seconds``: per image of a training step."""
    weights, world = sum(p.numel() for p in student.net.parameters()), run.accelerator.num_processes
    run.say(f"a teacher of {weights / 1e6:.2f} M weights on {data.name}, {len(data.images):,} images of {data.shape}")
    run.say(
        f"  {budget.trained_images:,} training images in {budget.steps:,} steps: about {duration(budget.trained_images * seconds / world)}"
    )
    run.say(f"  about {1.2 * peak_memory_gb(run.device):.1f} GB per process, output {run.folder}\n")


def draw_samples(model: Teacher, run: Run, seed: int) -> None:
    """Write samples.png: 100 images of 64 DDIM steps, the classes in turn."""
    sampling = Sampling().on_best_grid(model.denoiser.schedule, 64)
    label_of = None if model.classes is None else lambda i: i % (model.classes or 1)
    (batch,) = images(model, sampling, 64, [range(100)], seed, run.device, label_of=label_of)
    contact_sheet(batch.pixels.cpu(), run.folder / "samples.png")


if __name__ == "__main__":
    main()
