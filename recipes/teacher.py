"""Trains a diffusion teacher: a diffusers UNet2DModel with v prediction on a discrete cosine table with zero terminal SNR.

    accelerate launch recipes/teacher.py --output-dir runs/teacher-digits          the embedded teacher, 10 minutes on two cores

The table has 1024 entries, so that every ladder of powers of two meets it exactly, in our samplers and in diffusers'.
Writes teacher.safetensors, which every --teacher accepts, samples.png, metrics.jsonl and config.json.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

import torch

import teachers
from distill.checkpoint import Resumable
from distill.denoise import Denoise
from distill.distance import WEIGHTS
from distill.grid import uniform
from distill.train import Optimization, Shares, train
from eval.generate import generate, peak_memory_gb, start, to_uint8
from eval.plots import contact_sheet
from recipes import data as datasets
from recipes.common import NOT_OF_THE_RUN, Run, duration, flag, one_line_errors, parse, processes, rehearse
from teachers.load import frozen
from teachers.unet import untrained

PRESETS: dict[str, dict] = {"default": {}, "smoke": {"images": 4096, "channels": (16, 32)}}


@dataclass(frozen=True)
class Config:
    preset: str = flag("default", "default, or smoke (everything in less than a minute)", choices=PRESETS)
    data: str = flag("digits", "what it is trained on: " + datasets.ACCEPTED)
    output_dir: str = flag("runs/teacher-digits", "a new directory, or one that holds the same run, which is continued")
    images: int = flag(800_000, "training images")
    batch_size: int = flag(128, "images a step, over all processes")
    microbatch: int | None = flag(None, "most images at once in a process; more accumulate")
    lr: float = flag(2e-3, "learning rate; it falls linearly to 0 over the last 30 %% of the run")
    warmup_images: int = flag(25_000, "images over which the learning rate rises first")
    ema_halflife_images: float = flag(50_000, "half-life of the average of the weights that is kept")
    weight: str = flag("snr_plus_one", "weight of the x0 error", choices=WEIGHTS)
    channels: tuple[int, ...] = flag((32, 48), "channels of the UNet, one a resolution")
    layers: int = flag(1, "residual blocks a resolution")
    label_dropout: float = flag(0.1, "part of the labels replaced by the null class, for guidance")
    mixed_precision: str = flag("no", "autocast of the network", choices=("no", "bf16", "fp16"))
    seed: int = flag(0, "seed of everything")
    log_with: str | None = flag(None, "an Accelerate tracker", choices=("tensorboard", "wandb"))
    threads: int = flag(0, "CPU threads a process; 0 shares the cores out evenly")
    resume: bool = flag(True, "continue a run of the same configuration in the output directory")


def main(argv: list[str] | None = None) -> None:
    with one_line_errors():
        config = parse(Config, __doc__.splitlines()[0], PRESETS, argv)
        data = datasets.load(config.data)
        model = untrained(data.shape, data.classes, config.channels, config.layers, config.seed)
        student = model.parametric
        Shares(config.batch_size, processes(), microbatch=config.microbatch)
        run = Run.open(config, config.mixed_precision)
    device, world = run.accelerator.device, run.accelerator.num_processes
    shares = Shares(config.batch_size, world, run.accelerator.process_index, config.microbatch)
    batches = data.batches(shares, config.seed, "teacher", device, True, data.classes, config.label_dropout)
    x0, cond = next(iter(batches(0)))
    seconds, _ = rehearse(Denoise(weight=config.weight), student, x0, cond)
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
            Denoise(weight=config.weight), student, batches, run.accelerator, optimization,
            seed=config.seed, phase="teacher", resumable=Resumable(run.folder / "resume"), save_every_images=config.images // 16,
        )  # fmt: skip
        for state in run.watch(states, "teacher", config.images, "teacher"):
            ema = state.ema
        if run.main:
            record = {
                "method": "diffusion",
                "config": {k: v for k, v in asdict(config).items() if k not in NOT_OF_THE_RUN},
            }
            frozen(ema.net)
            teachers.save(file, replace(model, denoiser=ema, record=record))
            Resumable(run.folder / "resume").clear()
    run.accelerator.wait_for_everyone()
    if run.main:
        trained = teachers.load_file(file).to(device)
        begin = start(range(100), trained.shape, None, config.seed)
        begin.labels = None if data.classes is None else torch.arange(100) % data.classes
        schedule = trained.denoiser.schedule
        images = generate(trained.denoiser, "ddim", uniform(schedule, 64), begin, trained.condition, device)
        contact_sheet(to_uint8(images).cpu(), run.folder / "samples.png")
    run.say(f"teacher: {file}\nsamples: {run.folder / 'samples.png'}")
    run.close()


if __name__ == "__main__":
    main()
