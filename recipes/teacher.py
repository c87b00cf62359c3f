"""Trains a diffusion teacher, a diffusers UNet2DModel on any schedule; or, by --probe and --nll, examines any teacher.

    accelerate launch recipes/teacher.py --output-dir runs/teacher-digits          the embedded teacher, 10 minutes on two cores
    python recipes/teacher.py --prediction edm --schedule edm                      as Karras et al. 2022
    python recipes/teacher.py --teacher SPEC --channels 16 32                      a smaller network that learns E[x0 | x_t] of SPEC
    python recipes/teacher.py --probe SPEC --nll SPEC --data DATA                  is it a denoiser, read rightly? bits a dimension

The default is v prediction on a discrete cosine table with zero terminal SNR, of 1024 entries, so that every ladder of powers of two
meets it exactly, in our samplers and in diffusers'.
Writes teacher.safetensors, which every --teacher accepts, samples.png, metrics.jsonl and config.json.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import ClassVar

import torch

import teachers
from distill.checkpoint import Resumable
from distill.denoise import DRAWS, Denoise
from distill.denoiser import PREDICTIONS, Denoiser
from distill.distance import WEIGHTS
from distill.grid import GRIDS
from distill.schedule import Schedule, schedule_from
from distill.target import Datum, Mix
from distill.train import Optimization, Shares, train
from eval.generate import generate, peak_memory_gb, start, to_uint8
from eval.sheet import contact_sheet
from recipes import data as datasets
from recipes.common import NOT_OF_THE_RUN, Run, duration, flag, one_line_errors, parse, processes, rehearse
from recipes.matching import check_match, codec_of
from recipes.measure import best_grid
from recipes.probing import check_denoiser, examine
from teachers import Teacher
from teachers.load import frozen
from teachers.unet import untrained

PRESETS: dict[str, dict] = {"default": {}, "smoke": {"images": 4096, "channels": (16, 32)}}
SCHEDULES = ("table", "cosine", "linear_vp", "flow", "edm")


@dataclass(frozen=True)
class Config:
    preset: str = flag("default", "default, or smoke (everything in less than a minute)", choices=PRESETS)
    probe: str | None = flag(
        None, "train nothing; is this a denoiser, and which reading fits it best? " + teachers.ACCEPTED.replace("%", "%%")
    )
    nll: str | None = flag(
        None, "train nothing; negative log-likelihood of the data under this, as --probe, in bits a dimension"
    )
    teacher: str | None = flag(
        None, "learn E[x0 | x_t] of this, as --probe, and not from the data alone: denoiser distillation, of any schedule"
    )
    force: bool = flag(False, "learn from a teacher that the probe finds to be no denoiser, with a warning")
    data: str = flag("digits", "what it is trained on: " + datasets.ACCEPTED)
    output_dir: str = flag("runs/teacher-digits", "a new directory, or one that holds the same run, which is continued")
    images: int = flag(800_000, "training images")
    batch_size: int = flag(128, "images a step, over all processes")
    microbatch: int | None = flag(None, "most images at once in a process; more accumulate")
    lr: float = flag(2e-3, "learning rate; it falls linearly to 0 over the last 30 %% of the run")
    warmup_images: int = flag(25_000, "images over which the learning rate rises first")
    ema_halflife_images: float = flag(50_000, "half-life of the average of the weights that is kept")
    prediction: str = flag(
        "v", "what the network predicts; eps and score need --schedule linear_vp or edm", choices=PREDICTIONS
    )
    schedule: str = flag("table", "noise schedule; table is cosine, 1024 entries, zero terminal SNR", choices=SCHEDULES)
    sigma_data: float | None = flag(None, "deviation of the data, which prediction edm scales by; measured where not given")
    times: str | None = flag(
        None,
        "where training draws t: uniform, or lognormal in sigma (Karras et al. 2022), which edm takes if not given",
        choices=DRAWS,
    )
    weight: str | None = flag(
        None, "weight of the x0 error; not given: snr for eps and score, min_snr for x0, else snr_plus_one", choices=WEIGHTS
    )
    channels: tuple[int, ...] = flag((32, 48), "channels of the UNet, one a resolution")
    layers: int = flag(1, "residual blocks a resolution")
    label_dropout: float = flag(0.1, "part of the labels replaced by the null class, for guidance")
    mixed_precision: str = flag("no", "autocast of the network", choices=("no", "bf16", "fp16"))
    seed: int = flag(0, "seed of everything")
    log_with: str | None = flag(None, "an Accelerate tracker", choices=("tensorboard", "wandb"))
    threads: int = flag(0, "CPU threads a process; 0 shares the cores out evenly")
    resume: bool = flag(True, "continue a run of the same configuration in the output directory")

    MAY_CHANGE: ClassVar = ("force",)

    @property
    def draws(self) -> str:
        return self.times or ("lognormal" if self.schedule == "edm" else "uniform")

    @property
    def weighed(self) -> str:
        return self.weight or {"eps": "snr", "score": "snr", "x0": "min_snr"}.get(self.prediction, "snr_plus_one")


def deviation(data: datasets.Data) -> float:
    """Of all values of up to 4096 samples, as denoisers see them."""
    return float(data.x0(slice(4096)).std())


def started(config: Config, data: datasets.Data, classes: int | None) -> Teacher:
    """The untrained network as a denoiser of the configuration's schedule and prediction."""
    model = untrained(data.shape, classes, config.channels, config.layers, config.seed)
    usual = model.parametric
    schedule: Schedule = usual.schedule if config.schedule == "table" else schedule_from(config.schedule)
    time = {"table": usual.time, "edm": "thousand_log_sigma"}.get(config.schedule, "thousand_time")
    sigma_data = usual.sigma_data
    if config.prediction == "edm":
        sigma_data = deviation(data) if config.sigma_data is None else config.sigma_data
        if not sigma_data > 0:
            raise ValueError(f"--sigma-data {sigma_data:g}: accepted are numbers above 0")
    denoiser = Denoiser(usual.net, schedule, config.prediction, time, sigma_data)
    return replace(model, denoiser=denoiser, codec=codec_of(data))


def learnt_from(config: Config, data: datasets.Data) -> Teacher | None:
    """The model of --teacher. ValueError where it does not know the labels that training gives it."""
    if config.teacher is None:
        return None
    teacher = teachers.load(config.teacher)
    check_match(teacher, data, training=True)
    if teacher.table is not None:
        raise ValueError("a new network here is told labels or nothing, and this teacher a text")
    if config.label_dropout and teacher.classes is not None and teacher.null != data.classes:
        raise ValueError(f"the teacher's label for none is {teacher.null}, not {data.classes}: use --label-dropout 0")
    return teacher


def main(argv: list[str] | None = None) -> None:
    with one_line_errors():
        config = parse(Config, __doc__.splitlines()[0], PRESETS, argv)
        data = datasets.load(config.data)
        if config.probe or config.nll:
            return examine(config.probe, config.nll, data, config.seed, config.threads)
        teacher = learnt_from(config, data)
        classes = data.classes if teacher is None or teacher.classes is not None else None
        model = started(config, data, classes)
        student = model.parametric
        Shares(config.batch_size, processes(), microbatch=config.microbatch)
        warning = None if teacher is None else check_denoiser(teacher, data, config.seed, config.force)
        run = Run.open(config, config.mixed_precision)
    if warning:
        run.say(f"warning: {warning}")
    device, world = run.accelerator.device, run.accelerator.num_processes
    shares = Shares(config.batch_size, world, run.accelerator.process_index, config.microbatch)
    batches = data.batches(shares, config.seed, "teacher", device, classes is not None, classes, config.label_dropout)
    target = Datum() if teacher is None else Mix(teacher.to(device).denoiser)
    method = Denoise(target, config.weighed, times=config.draws)
    x0, cond = next(iter(batches(0)))
    seconds, _ = rehearse(method, student, x0, cond)
    weights = sum(p.numel() for p in student.net.parameters())
    run.say(f"a teacher of {weights / 1e6:.2f} M weights on {data.name}, {len(data.images):,} images of {data.shape}")
    run.say(f"  {config.images:,} training images: about {duration(config.images * seconds / world)}, output {run.folder}")
    run.say(f"  about {1.2 * peak_memory_gb(device):.1f} GB a process\n")

    optimization = Optimization(
        config.images, config.batch_size, config.microbatch, config.lr, constant=0.7, betas=(0.9, 0.99),
        warmup_images=config.warmup_images, ema_halflife_images=config.ema_halflife_images,
    )  # fmt: skip
    file = run.folder / "teacher.safetensors"
    if not file.exists():
        states = train(
            method, student, batches, run.accelerator, optimization,
            seed=config.seed, phase="teacher", resumable=Resumable(run.folder / "resume"), save_every_images=config.images // 16,
        )  # fmt: skip
        for state in run.watch(states, "teacher", config.images, "teacher"):
            ema = state.ema
        if run.main:
            record = {
                "method": "diffusion" if teacher is None else "denoise",
                "of": config.teacher,
                "config": {k: v for k, v in asdict(config).items() if k not in NOT_OF_THE_RUN},
            }
            frozen(ema.net)
            teachers.save(file, replace(model, denoiser=ema, record=record))
    run.accelerator.wait_for_everyone()
    if run.main:
        Resumable(run.folder / "resume").clear()
        trained = teachers.load_file(file).to(device)
        begin = start(range(100), trained.shape, None, config.seed)
        begin.labels = None if classes is None else torch.arange(100) % classes
        schedule = trained.denoiser.schedule
        times = GRIDS[best_grid(schedule, "ddim", 64)](schedule, 64)
        x0 = generate(trained.denoiser, "ddim", times, begin, trained.condition, device)
        contact_sheet(to_uint8(trained.decode(x0)).cpu(), run.folder / "samples.png")
    run.say(f"teacher: {file}\nsamples: {run.folder / 'samples.png'}")
    run.close()


if __name__ == "__main__":
    main()
