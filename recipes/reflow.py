"""Straighten the paths of a model: pairs of noise and the samples made of it are a coupling, and a network is trained on it, k times.

    accelerate launch recipes/reflow.py                          digits: the teacher's 2-rectified and 3-rectified flow, and the report
    python recipes/reflow.py --teacher SPEC --rounds 1 --pairs 50000

Rectified Flow, arXiv 2209.03003. Round k trains on E[x0 | x_t] with x_t = alpha x0 + sigma eps, where (eps, x0) are pairs of the model
before. The network keeps its schedule: this mean depends on the log-SNR and the scale of x_t alone, and paths are compared on `Flow`.
Writes runs/reflow-digits: pairs/, stages/reflow-k/student.safetensors, reflow.json with the straightness of each flow, report.html.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from recipes.common import flags
from recipes.common.accepted import STEPS, TRAINED
from recipes.common.cli import flag, flags_first, method_flag, one_line_errors, parse, training_flag

PRESETS: dict[str, dict] = {
    "default": {},
    "smoke": {"rounds": 1, "pairs": 256, "pair_steps": 8, "training_images": 1024, "images": 200, "sweep_steps": (1, 2)},
}


@dataclass(frozen=True)
class Config(flags.DistillationFlags):
    preset: str = flag("default", "smoke is a trial run of about a minute", choices=PRESETS)
    output_dir: str = flags.output_dir("runs/reflow-digits")
    rounds: int = flag(2, "how often pairs are made and a network is trained on them", at_least=1, at_most=100)
    pairs: int = method_flag(16_384, "pairs of each round, made once and held in memory", at_least=2, at_most=100_000_000)
    pair_steps: int = method_flag(64, "DDIM steps of the model that makes the pairs", **STEPS)
    training_images: int = training_flag(100_000, "training images of each round", **TRAINED)


flags_first(__name__, Config, __doc__, PRESETS)

from distill.denoiser import DenoiserLike
from distill.files import write_json
from distill.regression import Regression
from distill.rng import seed_of
from distill.sampling import Sampling
from distill.straightness import straightness
from distill.train import Optimization
from eval.generate import chunks, initial_noise
from recipes.common.checks import check_match, check_steps, conditioned
from recipes.common.guidance import taking_scale
from recipes.common.interrupts import interruptible
from recipes.common.lora import with_lora
from recipes.common.outline import teacher_of
from recipes.common.run import finished_file
from recipes.common.training import Experiment
from recipes.data import sets
from recipes.data.pairs import Pairs, read_pairs, write_pairs
from teachers import Teacher
from teachers.teacher import require_network

MEASURED = 256  # paths whose straightness is measured


@interruptible()
def main(argv: list[str] | None = None) -> None:
    with one_line_errors():
        config = parse(Config, __doc__, PRESETS, argv)
        e = prepare(config, teacher_of(config), sets.load(config.data))
    with e:
        e.add_baselines(config.pair_steps)
        rectify(config, e)


def rectify(config: Config, e: Experiment) -> None:
    """Liu et al. 2209.03003, Alg. 1: (eps, x0) <- pairs of the flow before, then regression on them."""
    assert e.teacher is not None
    method, real = Regression(), e.data
    budget = Optimization(
        config.training_images, config.batch_size, config.microbatch, config.lr, betas=(0.9, 0.99),
        warmup_images=config.warmup_images, optimizer=config.optimizer,
    )  # fmt: skip
    more = config.rounds * config.pairs * config.pair_steps
    e.plan(method, [budget] * config.rounds, config.sweep_steps, more=more)
    model, student, denoiser = e.teacher, e.student, e.teacher.guided(config.guidance)
    found = {"teacher": bend(config, e, model, denoiser)}
    for number in range(1, config.rounds + 1):
        name = f"reflow-{number}"
        e.data = pairs_of(config, e, model, denoiser, number)
        model = student = e.stage(name, student, method, budget, Sampling(steps=config.sweep_steps), label=name)
        denoiser = model.denoiser
        found[name] = bend(config, e, model, denoiser)
    e.data = real
    if e.run.main:
        write_json(e.run.folder / "reflow.json", {"straightness": found})
    e.run.say("straightness, 0 is straight: " + ", ".join(f"{name} {value:.4f}" for name, value in found.items()))


def pairs_of(config: Config, e: Experiment, model: Teacher, denoiser: DenoiserLike, number: int) -> Pairs:
    """Return the pairs of a round from their file, which the main process makes where there is none."""
    path, device = e.run.folder / "pairs" / f"{number}.safetensors", e.run.device
    if e.run.main and not path.exists():
        sampling = Sampling().on_best_grid(denoiser.schedule, config.pair_steps)
        parts = [range(part.start, min(part.stop, config.pairs)) for part in chunks(config.pairs, config.chunk)]
        seed = seed_of(config.seed, "pairs", number)
        write_pairs(path, model, denoiser, sampling, config.pair_steps, seed, parts, device)
    e.run.accelerator.wait_for_everyone()
    with finished_file():
        return read_pairs(path)


def bend(config: Config, e: Experiment, model: Teacher, denoiser: DenoiserLike) -> float:
    """Return the mean `straightness` of the paths of the first images of the seed."""
    drawn = initial_noise(range(MEASURED), model.shape, model.classes, config.seed, e.run.device)
    cond: dict[str, Any] = model.condition(drawn.labels)
    return float(straightness(denoiser, drawn.noise, **cond).mean())


def prepare(config: Config, teacher: Teacher, data: sets.Data) -> Experiment:
    """Check that teacher, data and configuration fit together, and claim the output directory. Raises ValueError where they do not."""
    teacher, data = conditioned(teacher, data, config)
    data = check_match(teacher, data, training=True)
    prediction = require_network(teacher).prediction
    if prediction in ("eps", "score"):
        raise ValueError(
            f"a network of prediction {prediction!r} cannot give x0 at pure noise: accepted are v, x0, flow and edm"
        )
    if taking_scale(config, teacher, teacher).guidance is not None:
        raise ValueError(
            "reflow has one guidance scale: accepted are --guidance, and teachers that do not take the scale as an input"
        )
    check_steps(teacher, (config.pair_steps,))
    shared, student = with_lora(config, teacher, teacher, config.teacher, config.seed)
    record = {"method": "reflow", "of": config.teacher, "data": data.name, "guidance": config.guidance}
    title = f"Reflow of {config.teacher}: {config.rounds} rounds"
    return Experiment.open(config, shared or teacher, student, data, title=title, record=record, stages=config.rounds)


if __name__ == "__main__":
    main()
