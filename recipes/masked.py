"""Train a masked diffusion model of images with few levels, or distil one to fewer steps by self-distillation through time.

    python recipes/masked.py                                                         a model of digits with 4 levels
    python recipes/masked.py --teacher runs/masked-digits/teacher.safetensors --output-dir runs/masked-students

The model is E[onehot(x0) | x_t] over categories (`distill.masked`), trained with the bound of MDLM (2406.07524). Distillation is SDTT
(2410.21035): each round makes a student of half as many steps. Writes teacher.safetensors or stages/STEPS/student.safetensors,
samples.png, fid.json with the FID against the real images of as many levels, metrics.jsonl and config.json.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from distill.names import MASKED_SAMPLERS
from recipes.common import flags
from recipes.common.accepted import BATCH, CHANNELS, GENERATED, LAYERS, LEARNING_RATE, STEPS, TRAINED
from recipes.common.cli import flag, flags_first, measuring_flag, method_flag, model_flag, one_line_errors, parse, training_flag

PRESETS: dict[str, dict] = {
    "default": {},
    "smoke": {"training_images": 2048, "channels": (16, 32), "images": 100, "start_steps": 8, "steps": (4,)},  # no quality
}


@dataclass(frozen=True)
class Config(flags.RunFlags):
    preset: str = flag("default", "smoke is a trial run of some seconds", choices=PRESETS)
    teacher: str | None = model_flag(None, "distil this model, a file of this recipe; default is to train one", path="file")
    data: str = model_flag("digits,bits=2", "the training data, a set with the option bits (accepted: --help data)")
    output_dir: str = flags.output_dir("runs/masked-digits")
    channels: tuple[int, ...] = model_flag((32, 48), "channels of a new UNet, one per resolution", **CHANNELS)
    layers: int = model_flag(1, "residual blocks per resolution of a new UNet", short=False, **LAYERS)
    start_steps: int = method_flag(64, "steps of the teacher", at_least=1, at_most=100_000)
    steps: tuple[int, ...] = method_flag(
        (32, 16, 8, 4), "steps of the students of the rounds, each a divisor of those before", **STEPS
    )
    reverse: bool = method_flag(False, "minimise KL(student || target) instead of KL(target || student)", short=False)
    batch_size: int = training_flag(128, "images per step, over all processes", **BATCH)
    training_images: int = training_flag(300_000, "training images, in each round with --teacher", **TRAINED)
    lr: float = training_flag(2e-3, "learning rate; it falls linearly to 0", **LEARNING_RATE)
    ema_halflife_images: float = training_flag(
        10_000, "half-life of the average of the weights that is kept", short=False, **TRAINED
    )
    images: int = measuring_flag(2_000, "generated images per FID", **GENERATED)
    sweep_steps: tuple[int, ...] = measuring_flag(
        (64, 8, 4), "step counts at which the teacher is measured", short=False, **STEPS
    )
    sampler: str = measuring_flag("ancestral", "sampler of samples and FID", choices=MASKED_SAMPLERS)

    TOPICS = flags.TOPICS


flags_first(__name__, Config, __doc__, PRESETS)

import torch

from distill.bits import pixels_to_tokens
from distill.files import write_json
from distill.masked import MaskedRegression, bound, linear_times
from distill.resume import Resumable
from distill.rng import Rng
from distill.sdtt import SelfDistillation
from distill.train import BatchSplit, Optimization, train
from eval import reference
from eval.features import Extractor
from eval.generate import chunks
from eval.image_grid import sample_grid
from eval.metrics import fid_with_interval
from eval.tokens import token_images
from recipes.common.checks import check_finite_data
from recipes.common.interrupts import finishing_steps, interruptible, stop_requested
from recipes.common.run import Run, finished_file, processes, settings_of
from recipes.common.training import divergence_errors
from recipes.data import sets
from recipes.data.sets import Data
from teachers import masked
from teachers.masked import MaskedModel
from teachers.teacher import frozen

CHUNK = 250  # images generated together


def fit(config: Config, run: Run, model: MaskedModel, data: Data, method: object, phase: str, file: Path) -> MaskedModel:
    """Train a copy of ``model`` by ``method`` on the tokens of the data, and return it from its file."""
    if not file.exists():
        split = BatchSplit(config.batch_size, run.accelerator.num_processes, run.accelerator.process_index)
        bits, student = data.bits or 0, model.student()
        drawn = data.batches(split, config.seed, phase, run.device, model.condition)
        budget = Optimization(
            config.training_images, config.batch_size, lr=config.lr, constant=0.5, betas=(0.9, 0.99),
            warmup_images=min(25_000, config.training_images // 10), ema_halflife_images=config.ema_halflife_images,
        )  # fmt: skip
        states = train(
            method, student, lambda step: ((pixels_to_tokens(x0, bits), cond) for x0, cond in drawn(step)),  # type: ignore[arg-type]
            run.accelerator, budget, seed=config.seed, phase=phase, resumable=Resumable(run.folder / "resume" / phase, run.say),
            save_every_images=max(1, config.training_images // 16), stop=stop_requested,
        )  # fmt: skip
        with finishing_steps(), divergence_errors():
            for state in run.watch(states, phase, budget.trained_images, phase):
                student = state.ema  # type: ignore[assignment]
        if run.main:
            frozen(student.net)
            record = {
                "method": phase,
                "of": config.teacher,
                "config": settings_of(config),
                "trained_images": budget.trained_images,
            }
            masked.save(file, replace(model, denoiser=student, record=record))
        run.accelerator.free_memory()
    run.accelerator.wait_for_everyone()
    with finished_file():
        made = masked.load(file)
    if run.main:
        Resumable(run.folder / "resume" / phase).clear()
    made.denoiser.net.to(run.device)
    return made


def distilled(config: Config, run: Run, teacher: MaskedModel, data: Data) -> list[MaskedModel]:
    """Return the students of all rounds. The student of a round is the teacher of the next one."""
    made, before = [teacher], config.start_steps
    for steps in config.steps:
        method = SelfDistillation(made[-1].denoiser, steps, before // steps, config.reverse)
        file = run.folder / "stages" / str(steps) / "student.safetensors"
        made.append(fit(config, run, replace(made[-1], steps=steps), data, method, f"sdtt-{steps}", file))
        before = steps
    return made[1:]


def measured(config: Config, run: Run, cells: list[tuple[str, MaskedModel, int]], data: Data) -> None:
    """Write and print the FID of each cell (label, model, steps), and a picture of all."""
    extractor = Extractor.create("digits").to(run.device)
    real, _ = reference.of_images(
        data.images, data.name, extractor, CHUNK, run.accelerator, run.folder / "reference.safetensors"
    )
    if not run.main:
        return
    rows, pictures = [], []
    for label, model, steps in cells:
        drawn = token_images(model, steps, config.sampler, chunks(config.images, CHUNK), config.seed, run.device)
        features = torch.cat([extractor(images).fid for images in drawn])[: config.images]
        row = {k: v for k, v in fid_with_interval(features, real).items() if k in ("fid", "fid_interval")}
        rows.append({"label": label, "steps": steps, "sampler": config.sampler, "images": config.images, **row})
        run.say(f"{label:<12} {steps:4d} steps  FID {row['fid']:.3f}  {[round(v, 3) for v in row['fid_interval']]}")
        (shown,) = token_images(model, steps, config.sampler, [range(20)], config.seed, run.device, classes_in_turn=True)
        pictures.append((f"{label} {steps}", shown.cpu()))
    write_json(run.folder / "fid.json", rows)
    sample_grid(pictures, run.folder / "samples.png", columns=20)


def bits_per_token(model: MaskedModel, data: Data, device: torch.device, seed: int, most: int = 128) -> float:
    """Return the bound on -log2 p of images of the data, in bits per token, on 64 steps."""
    index = torch.randperm(len(data.images), generator=torch.Generator().manual_seed(seed))[:most]
    tokens = pixels_to_tokens(data.x0(index, device), data.bits or 0)
    cond = model.condition(None if data.labels is None else data.labels[index].to(device))
    uniform = Rng(torch.Generator(device).manual_seed(seed), len(tokens)).uniform
    with torch.inference_mode():
        nats = bound(model.denoiser, tokens, linear_times(64), uniform, **cond)
    return float(nats.mean()) / tokens[0].numel() / torch.tensor(2.0).log().item()


def checked(config: Config) -> tuple[Data, MaskedModel]:
    """Return the data, and the model that is trained or distilled. Raises ValueError where they or the steps do not fit."""
    BatchSplit(config.batch_size, processes())
    data = check_finite_data(sets.load(config.data))
    if data.bits is None:
        raise ValueError(f"--data {config.data}: categories need a set with the option bits, such as digits,bits=2")
    values = 2**data.bits
    if config.teacher is None:
        return data, masked.new(data.shape, values, data.classes, config.channels, config.layers, config.seed)
    before = config.start_steps
    for steps in config.steps:
        if before % steps or before == steps:
            raise ValueError(f"--steps {' '.join(map(str, config.steps))}: {steps} must divide {before}, the steps before it")
        before = steps
    teacher = masked.load(config.teacher)
    if (teacher.shape, teacher.denoiser.values, teacher.classes) != (data.shape, values, data.classes):
        raise ValueError(
            f"the teacher makes {teacher.denoiser.values} levels of {teacher.shape} in {teacher.classes} classes, {data.name} has"
            f" {values} of {data.shape} in {data.classes}: they must agree"
        )
    return data, teacher


@interruptible()
def main(argv: list[str] | None = None) -> None:
    with one_line_errors():
        config = parse(Config, __doc__, PRESETS, argv)
        data, model = checked(config)
        Extractor.create("digits").fits(data.shape)
        run = Run.open(config)
    model.denoiser.net.to(run.device)
    if config.teacher is None:
        model = fit(config, run, model, data, MaskedRegression(), "teacher", run.folder / "teacher.safetensors")
        students = []
    else:
        students = distilled(config, run, model, data)
    run.say(f"bound on -log2 p: {bits_per_token(model, data, run.device, config.seed):.3f} bits per token")
    cells = [("teacher", model, n) for n in config.sweep_steps]
    measured(config, run, cells + [(f"student@{s.steps}", s, s.steps or 1) for s in students], data)
    run.say(f"output: {run.folder}")
    run.close()


if __name__ == "__main__":
    main()
