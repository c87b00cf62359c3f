"""Train tiny text-to-image pipelines of stock diffusers classes on captioned digits: a latent UNet and a flow transformer.

    python recipes/text_teacher.py                                          both, 15 minutes on two CPU cores
    accelerate launch recipes/text_teacher.py --families unet --output-dir runs/text-unet

An autoencoder is trained first, then each network on its latents, with captions such as "a handwritten seven" as conditions. The text
encoders have random weights that stay. What it writes is loaded by plain diffusers and by every --teacher:

    DiffusionPipeline.from_pretrained("runs/text-digits/unet")              StableDiffusionPipeline
    DiffusionPipeline.from_pretrained("runs/text-digits/flow", text_encoder_3=None, tokenizer_3=None)      StableDiffusion3Pipeline
    --teacher runs/text-digits/unet --data prompts:runs/text-digits/prompts.txt

Beside them are unet.png and flow.png, pictures by prompt, and quality.json: FID and class agreement of each guidance scale.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes.common import flags
from recipes.common.accepted import BATCH, CHANNELS, GENERATED, GUIDANCE, LEARNING_RATE, STEPS, TRAINED
from recipes.common.cli import duration, flag, flags_first, measuring_flag, model_flag, one_line_errors, parse, training_flag

FAMILIES = ("unet", "flow")
PRESETS: dict[str, dict] = {
    "default": {},  # of one CPU core 3 minutes for the autoencoder, 12 for unet, 7 for flow; two cores are 1.5 times as fast
    "smoke": {
        "autoencoder_images": 2048,
        "training_images": 2048,
        "channels": (16, 32),
        "images": 40,
        "steps": 4,
        "guidance": (2.0,),
    },
}


@dataclass(frozen=True)
class Config(flags.RunFlags):
    preset: str = flag("default", "smoke is a trial run of less than a minute", choices=PRESETS)
    families: tuple[str, ...] = flag(FAMILIES, "the pipelines to train", choices=FAMILIES, distinct=True)
    output_dir: str = flags.output_dir("runs/text-digits")
    autoencoder_images: int = training_flag(200_000, "training images of the autoencoder", **TRAINED)
    training_images: int = training_flag(400_000, "training images of each network", **TRAINED)
    batch_size: int = training_flag(128, "images per step, over all processes", **BATCH)
    lr: float = training_flag(2e-3, "learning rate; it falls linearly to 0 over the last half of the run", **LEARNING_RATE)
    label_dropout: float = training_flag(
        0.1, "part of the captions replaced by the empty one", short=False, at_least=0, at_most=1
    )
    channels: tuple[int, ...] = model_flag((48, 64), "channels of the UNet; the transformer has the last", **CHANNELS)
    guidance: tuple[float, ...] = measuring_flag((1.0, 1.5, 2.0, 3.0), "guidance scales to measure", **GUIDANCE)
    steps: int = measuring_flag(32, "steps of DDIM that make the measured images", **STEPS)
    images: int = measuring_flag(1000, "images of each measurement", **GENERATED)


flags_first(__name__, Config, __doc__, PRESETS)

import tempfile

import numpy as np
import torch
from torch import Tensor

import teachers
from distill.denoiser import Denoiser
from distill.distance import snr_plus_one
from distill.files import replacing, replacing_folder, write_json, write_text
from distill.images import from_uint8
from distill.reading import read_json
from distill.regression import Regression
from distill.resume import Resumable, whole
from distill.sampling import Sampling
from distill.train import BatchSplit, Method, Optimization, train
from eval.features import Extractor
from eval.generate import chunks, images
from eval.image_grid import sample_grid
from eval.machine import clock
from eval.metrics import Reference, fid_with_interval
from eval.progress import progress
from recipes.common.interrupts import finishing_steps, interruptible, stop_requested
from recipes.common.plan import measure_step_time
from recipes.common.run import Run, processes
from recipes.common.training import divergence_errors
from recipes.data.sets import Data
from teachers import Teacher, autoencoder, tiny_text
from teachers.digits import captions, digits
from teachers.teacher import frozen

SHOWN = 8  # pictures of a prompt


@dataclass(frozen=True)
class Phase:
    """A training: what is minimised, for which network, on which data, and how long. ``model``: gives the conditions of labels."""

    name: str
    method: Method
    student: Denoiser
    data: Data
    images: int
    model: Teacher | None = None


@interruptible()
def main(argv: list[str] | None = None) -> None:
    with one_line_errors():
        config = parse(Config, __doc__, PRESETS, argv)
        BatchSplit(config.batch_size, processes())
        tiny_text.prepare()
        run = Run.open(config)
    began, data = clock(run.device), captioned_digits(run)
    known = run.folder / "quality.json"
    quality = read_json(known) if known.exists() else {}
    planned = plan(config, run, data, quality)
    vae = trained_autoencoder(config, run, data)
    for family in config.families:
        model = trained_pipeline(config, run, family, vae, data).to(run.device)
        if run.main and family not in quality:
            quality[family] = measure(config, run, family, model, data)
            write_json(known, quality)
        run.accelerator.wait_for_everyone()
    run.say(f"took {duration(clock(run.device) - began)}, forecast {duration(planned)}")
    run.close()


def captioned_digits(run: Run) -> Data:
    """Return the digits with the number of their caption as label, and write prompts.txt and digits.npz."""
    pixels, classes = digits()
    lines, numbers = captions.prompts(), torch.tensor(captions.captioned(classes))
    data = Data("digits", pixels, numbers, [lines[n] for n in numbers])
    if run.main:
        write_text(run.folder / "prompts.txt", "".join(line + "\n" for line in lines))
        with replacing(run.folder / "digits.npz") as aside, open(aside, "wb") as file:
            np.savez_compressed(file, images=pixels.permute(0, 2, 3, 1), labels=classes, captions=np.array(data.captions))
    run.accelerator.wait_for_everyone()
    return data


def plan(config: Config, run: Run, data: Data, measured: Container[str]) -> float:
    """Say what is still to be done and how long it should take, measured on a few steps. Return the seconds."""
    vae, total = tiny_text.autoencoder(config.seed), 0.0
    phases = [autoencoder_phase(config, vae, data), *(pipeline_phase(config, run, f, vae, data)[0] for f in config.families)]
    for phase in phases:
        step, call = measure_step_time(phase.method, phase.student, *next(iter(batches(config, run, phase)(0))))
        calls = (
            0
            if phase.model is None or phase.name in measured
            else config.images * config.steps * sum(1 + (w != 1) for w in config.guidance)
        )
        seconds = 0.0 if (run.folder / phase.name).exists() else phase.images * step / run.accelerator.num_processes
        weights = sum(p.numel() for p in phase.student.net.parameters())
        run.say(
            f"{phase.name}: {weights / 1e6:.2f} M weights, {phase.images:,} images, about {duration(seconds + calls * call)}"
        )
        total += seconds + calls * call
    run.say(f"together about {duration(total)}, output {run.folder}\n")
    return total


def autoencoder_phase(config: Config, vae: Any, data: Data) -> Phase:
    method = autoencoder.Autoencoder(tiny_text.LATENTS)
    return Phase("autoencoder", method, autoencoder.as_student(vae), data, config.autoencoder_images)


def pipeline_phase(config: Config, run: Run, family: str, vae: Any, data: Data) -> tuple[Phase, Any]:
    """Return the training of a family's network on the latents of the data, and the diffusers pipeline that holds this network."""
    with tempfile.TemporaryDirectory() as folder:
        words = tiny_text.tokenizer(captions.prompts(), Path(folder))
        stock = tiny_text.PIPELINES[family](vae, words, config.seed, config.channels)
        stock.save_pretrained(Path(folder) / family)
        model = tiny_text.merged(load(run, Path(folder) / family))
        assert model.codec is not None
        latents = model.codec.encode(from_uint8(data.images)).clone()
    tiny_text.network_of(stock).load_state_dict(tiny_text.inner(model).state_dict())
    encoded = Data("latents of digits", latents, data.labels, latents={"model": family})
    method = Regression(weight=snr_plus_one)
    return Phase(family, method, model.student(), encoded, config.training_images, model.to(run.device)), stock


def trained_autoencoder(config: Config, run: Run, data: Data) -> Any:
    """Return the autoencoder from its folder. It is trained first if it is not there."""
    folder, vae = run.folder / "autoencoder", tiny_text.autoencoder(config.seed)
    if not folder.exists():
        weights = learn(config, run, autoencoder_phase(config, vae, data))
        vae.load_state_dict({name.removeprefix("vae."): value for name, value in weights.items()})
        autoencoder.set_scale(frozen(vae), from_uint8(data.images))
        finish(run, "autoencoder", vae)
    return frozen(tiny_text.load_autoencoder(folder))


def trained_pipeline(config: Config, run: Run, family: str, vae: Any, data: Data) -> Teacher:
    """Return the model of a family's pipeline from its folder. Its network is trained first if it is not there."""
    if not (run.folder / family).exists():
        phase, stock = pipeline_phase(config, run, family, vae, data)
        weights = learn(config, run, phase)
        tiny_text.network_of(stock).load_state_dict({name.removeprefix("net."): value for name, value in weights.items()})
        finish(run, family, stock)
    return tiny_text.merged(load(run, run.folder / family))


def load(run: Run, folder: Path) -> Teacher:
    """Load a pipeline with all captions as its prompts."""
    return teachers.load(f"{folder},prompts={run.folder / 'prompts.txt'}")


def batches(config: Config, run: Run, phase: Phase) -> Any:
    """Return the batches of a training, in which a part of the captions is empty."""
    accelerator, model = run.accelerator, phase.model
    split = BatchSplit(config.batch_size, accelerator.num_processes, accelerator.process_index)
    if model is None:
        return phase.data.batches(split, config.seed, phase.name, run.device, lambda labels: {})
    return phase.data.batches(split, config.seed, phase.name, run.device, model.condition, model.null, config.label_dropout)


def learn(config: Config, run: Run, phase: Phase) -> dict[str, Tensor]:
    """Train a network and return the average of its weights."""
    budget = Optimization(
        phase.images, config.batch_size, lr=config.lr, constant=0.5, betas=(0.9, 0.99), warmup_images=phase.images // 16,
        ema_halflife_images=phase.images / 16,
    )  # fmt: skip
    with finishing_steps(), divergence_errors():
        states = train(
            phase.method, phase.student, batches(config, run, phase), run.accelerator, budget, seed=config.seed, phase=phase.name,
            resumable=Resumable(run.folder / "resume" / phase.name, run.say), save_every_images=max(1, phase.images // 16),
            stop=stop_requested,
        )  # fmt: skip
        for state in run.watch(states, phase.name, budget.trained_images, phase.name):
            average = state.ema
    weights = {name: whole(value) for name, value in run.accelerator.unwrap_model(average.net).state_dict().items()}
    run.accelerator.free_memory()
    return weights


def finish(run: Run, name: str, made: Any) -> None:
    """Write a trained part into its folder, complete or not at all, and remove its checkpoints."""
    if run.main:
        with replacing_folder(run.folder / name) as aside:
            made.save_pretrained(aside)
        Resumable(run.folder / "resume" / name).clear()
    run.accelerator.wait_for_everyone()


def measure(config: Config, run: Run, family: str, model: Teacher, data: Data) -> list[dict]:
    """Return FID and class agreement of each guidance scale, and write the picture of the one with the lowest FID."""
    extractor, rows, sampling = Extractor.create("digits").to(run.device), [], Sampling()
    reference = Reference(extractor(data.images).fid)
    for scale in config.guidance:
        parts = progress(chunks(config.images, min(250, config.images)), desc=f"{family}, guidance {scale:g}")
        drawn = list(images(model, sampling, config.steps, parts, config.seed, run.device, denoiser=model.guided(scale)))
        known = extractor(torch.cat([batch.pixels for batch in drawn])[: config.images])
        wanted = torch.cat([batch.labels for batch in drawn if batch.labels is not None])[: config.images]
        assert known.logits is not None
        right = known.logits.argmax(1).cpu() == captions.class_of(wanted.cpu())
        fid = fid_with_interval(known.fid, reference)
        rows.append(
            {
                "guidance": scale,
                "fid": fid["fid"],
                "fid_interval": fid["fid_interval"],
                "agreement": float(right.float().mean()),
            }
        )
        run.say(f"{family}, guidance {scale:g}, {config.steps} steps, n = {config.images:,}: "
                f"FID {fid['fid']:.3f}, class agreement {rows[-1]['agreement']:.3f}")  # fmt: skip
    best = min(rows, key=lambda row: row["fid"])["guidance"]
    assert model.embeddings is not None
    lines, wordings, sheet = model.embeddings.prompts, len(captions.WORDINGS), []
    for prompt in (
        digit * wordings + digit % wordings for digit in range(len(captions.WORDS))
    ):  # every digit and every wording
        label_of = dict.fromkeys(range(SHOWN), prompt).__getitem__
        (batch,) = images(
            model,
            sampling,
            config.steps,
            [range(SHOWN)],
            config.seed,
            run.device,
            denoiser=model.guided(best),
            label_of=label_of,
        )
        sheet.append((lines[prompt], batch.pixels.cpu()))
    sample_grid(sheet, run.folder / f"{family}.png")
    return rows


if __name__ == "__main__":
    main()
