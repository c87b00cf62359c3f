"""Find the settings that a few-step model was made for, by the distance to the images of its base model from the same noise.

    python recipes/audit.py --model FEW_STEP_PIPELINE --teacher BASE
    python recipes/audit.py --model TURBO,prompts=FILE --teacher BASE,prompts=FILE --steps 1 2 4 8 --guidance 1 3 5 7.5

Step counts, time grids, shifts of a flow and guidance scales of the base are tried, each with steps of DDIM (Euler's method in sigma /
alpha). A distilled model that keeps the base's map from noise to image is nearest to it where it is sampled as in its training. What
is found is written as passport.json, which loading obeys. A model that has a passport is compared with its images instead.
Distances are in standard deviations of the base's samples, and the five smallest are printed. Above 0.5 no passport is written, nor for a
model that is hardly nearer than the base itself at the same setting: it was not distilled, or not for one of the step counts.
A model that learnt a distribution and not the map (adversarial, distribution matching) is nearest only by chance; the distances tell.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

from recipes.common import flags
from recipes.common.accepted import BATCH, GUIDANCE, SEED, STEPS, Checked
from recipes.common.cli import (
    REQUIRED,
    flag,
    flags_first,
    machine_flag,
    measuring_flag,
    model_flag,
    one_line_errors,
    parse,
    plural,
)

PRESETS: dict[str, dict] = {"default": {}, "smoke": {"steps": (1, 2, 4), "samples": 16, "base_steps": 16}}
ACCEPTED = 0.5  # largest distance of a found setting, in standard deviations of the base's samples
GAIN = 0.95  # largest distance of a found setting by that of the base itself
TIE = 0.1  # distances that differ by this part are nearly the same


@dataclass(frozen=True, kw_only=True)
class Config(Checked):
    """What is searched."""

    preset: str = flag("default", "smoke searches little", choices=PRESETS)
    model: str = model_flag(REQUIRED, "the few-step model (accepted: --help teacher)")
    teacher: str = model_flag(REQUIRED, "the model that it was distilled from (accepted: --help teacher)")
    steps: tuple[int, ...] = flag((1, 2, 3, 4, 6, 8), "step counts to try", **STEPS)
    guidance: tuple[float, ...] = flag((1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.5), "guidance scales of the base to try", **GUIDANCE)
    shifts: tuple[float, ...] = flag((1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0), "shifts to try on a flow", above=0, at_most=100)
    samples: int = measuring_flag(64, "samples of each setting", at_least=2, at_most=100_000)
    base_steps: int = measuring_flag(64, "steps of the base, by Heun's method", **STEPS)
    chunk: int = measuring_flag(64, "samples generated at once", short=False, **BATCH)
    force: bool = flag(False, "write a passport even if the model is far from its base")
    seed: int = machine_flag(0, "seed of noise and labels", **SEED)
    output: str | None = machine_flag(
        None, "where the passport goes", path="new", own=lambda v: "passport.json in the model's folder"
    )

    TOPICS: ClassVar = {"teacher": flags.TOPICS["teacher"]}


flags_first(__name__, Config, __doc__, PRESETS)

import torch
from torch import Tensor

import teachers
from distill.denoiser import DenoiserLike, on_schedule
from distill.grid import GRIDS
from distill.sampling import SEARCHED, Sampling
from distill.schedule import Flow, Schedule, Table
from eval.generate import chunks, generate, initial_noise
from eval.machine import default_device
from eval.progress import progress
from teachers import Teacher, passport
from teachers.encoder import with_examples


@dataclass(frozen=True)
class Setting:
    """A way to sample a model, and the guidance scale of the base that its samples are compared with."""

    steps: int
    grid: str
    shift: float
    times: tuple[float, ...]
    guidance: float = 1.0

    def __str__(self) -> str:
        shift = "" if self.shift == 1 else f", shift {self.shift:g}"
        return f"{plural(self.steps, 'step')}, {self.grid}{shift}, guidance {self.guidance:g}"


def linspace(schedule: Schedule, steps: int) -> Tensor:
    """Return equal steps in t from t_max to t_min, then the data: "linspace" timesteps, and a flow pipeline without its own sigmas."""
    times = torch.linspace(schedule.t_max, schedule.t_min, steps, dtype=torch.float64)
    return torch.cat([times, times.new_tensor([schedule.t_clean])])


def leading(schedule: Schedule, steps: int) -> Tensor:
    """Return the entries 1 + i T // steps of a table in falling order, then the data (2305.08891, Table 2).

    They begin below pure noise: diffusers starts there with noise of variance 1, our samplers with sigma^2.
    """
    assert isinstance(schedule, Table)
    entries = torch.arange(steps - 1, -1, -1, dtype=torch.float64) * (schedule.steps // steps) + 2
    return torch.cat([entries / schedule.steps, entries.new_zeros(1)])


def linear_sigmas(schedule: Schedule, steps: int) -> Tensor:
    """Return equal steps in sigma / alpha, then the data. For schedules whose largest level is finite."""
    first, last = schedule.level(schedule.ends()).tolist()
    levels = torch.linspace(first, last, steps, dtype=torch.float64)
    return torch.cat([schedule.time_of(levels), levels.new_tensor([schedule.t_clean])])


def grids(schedule: Schedule, steps: int, shifts: tuple[float, ...]) -> Iterator[tuple[str, float, Tensor]]:
    """Yield name, shift and times [steps + 1] of the grids of a schedule that are in use; equal ones may come twice.

    A shift s multiplies sigma / alpha of a flow: sigma -> s sigma / (1 + (s - 1) sigma) (2403.03206, eq. 23).
    """
    for name, make in {**GRIDS, "linspace": linspace}.items():
        yield name, 1.0, make(schedule, steps)
    if isinstance(schedule, Table):
        yield "leading", 1.0, leading(schedule, steps)
    if float(schedule.level(schedule.ends()[0])) < 1e6:
        yield "linear-sigmas", 1.0, linear_sigmas(schedule, steps)
    for name in ("uniform", "linspace") if isinstance(schedule, Flow) else ():
        for shift in shifts:
            times = (GRIDS | {"linspace": linspace})[name](schedule, steps)
            yield name, shift, shift * times / (1 + (shift - 1) * times)


def settings(schedule: Schedule, steps: tuple[int, ...], shifts: tuple[float, ...]) -> list[Setting]:
    """Return the different settings of a model on ``schedule``, those of common names first. Grids that do not fall are left out."""
    found: dict[tuple[float, ...], Setting] = {}
    most = schedule.steps if isinstance(schedule, Table) else max(steps)
    for n in (n for n in steps if n <= most):
        for name, shift, times in grids(schedule, n, shifts):
            rounded = tuple(round(t, 9) for t in times.tolist())
            if all(t > s for t, s in pairwise(rounded)):
                found.setdefault(rounded, Setting(n, name, shift, tuple(times.tolist())))
    return list(found.values())


def samples(
    model: Teacher, denoiser: DenoiserLike, sampling: Sampling, steps: int, classes: int | None, config: Config
) -> Tensor:
    """Return samples x0 [n, ...]. Sample i has the same noise, and label below ``classes``, for every model and setting."""
    device, made = default_device(), []
    for part in chunks(config.samples, min(config.chunk, config.samples)):
        noise = initial_noise(part, model.shape, classes, config.seed, device)
        made.append(generate(denoiser, sampling, sampling.times_for(denoiser.schedule, steps), noise, model.condition, device))
    return torch.cat(made)[: config.samples]


def search(
    model: Teacher, base: Teacher, config: Config, show: Callable[[list], object] = lambda tried: tried
) -> list[tuple[float, Setting]]:
    """Return all settings with their distances, the nearest first, and before it the one of fewest steps that is nearly as near.

    Many grids with one step more are the same but for a last step near the data, which changes little.

    The distance is the root mean square of the difference to the base's samples, in units of the standard deviation among these.
    Raises ValueError for models of other shapes or classes.
    """
    counts = classes_of(model, base)
    null = base.embeddings is None and base.null == counts[1]  # a pipeline counts the null label as a class
    if model.shape != base.shape or (counts[0] != counts[1] and not (null and counts[0] == counts[1] + 1)):
        raise ValueError(
            f"the model makes {model.shape} of {model.conditions}, its base {base.shape} of {base.conditions}: they must agree"
        )
    classes = min(counts) or None
    scales = [w for w in config.guidance if w == 1 or base.null is not None]
    aims = {w: aim(base, w, classes, config) for w in scales}
    ranked = []
    for setting in show(settings(model.denoiser.schedule, config.steps, config.shifts)):  # type: ignore[attr-defined]
        sampling = Sampling(grid=SEARCHED, times={setting.steps: setting.times})
        made = samples(model, model.denoiser, sampling, setting.steps, classes, config)
        ranked += [(apart(made, samples_of_base), replace(setting, guidance=w)) for w, samples_of_base in aims.items()]
    ranked.sort(key=lambda pair: pair[0])
    near = [pair for pair in ranked if pair[0] <= (1 + TIE) * ranked[0][0]]
    best = min(near, key=lambda pair: pair[1].steps)
    return [best, *(pair for pair in ranked if pair is not best)]


def aim(base: Teacher, guidance: float, classes: int | None, config: Config) -> Tensor:
    """Return the samples of the base with many steps."""
    many = Sampling("heun").on_best_grid(base.denoiser.schedule, config.base_steps)
    return samples(base, base.guided(guidance), many, config.base_steps, classes, config)


def classes_of(*models: Teacher) -> list[int]:
    """Return how many classes models have, 0 for none."""
    return [model.classes or 0 for model in models]


def apart(made: Tensor, aimed: Tensor) -> float:
    """Return the distance of samples in standard deviations of the second ones; infinity where it is not a number."""
    distance = float(((made - aimed).square().mean() / (aimed - aimed.mean(0)).square().mean()).sqrt())
    return distance if distance == distance else float("inf")


def distance_of_base(model: Teacher, base: Teacher, setting: Setting, config: Config) -> float:
    """Return how far the base itself is from its samples of many steps, at a setting of the model."""
    classes = min(classes_of(model, base)) or None
    guided = on_schedule(base.guided(setting.guidance), model.denoiser.schedule)
    sampling = Sampling(grid=SEARCHED, times={setting.steps: setting.times})
    return apart(samples(base, guided, sampling, setting.steps, classes, config), aim(base, setting.guidance, classes, config))


def passport_of(model: Teacher, base: Teacher, ranked: list[tuple[float, Setting]], source: str) -> passport.Passport:
    """Return the passport of a model whose best setting is the first of ``ranked``. ``source``: the base, as a user names it."""
    distance, best = ranked[0]
    other, second = next((pair for pair in ranked if pair[1].times != best.times), ranked[0])
    grid = best.grid if best.grid in GRIDS and best.shift == 1 else SEARCHED
    sampling = Sampling(grid=grid, steps=(best.steps,), times={best.steps: best.times} if grid == SEARCHED else {})
    record = {"guidance": best.guidance, "of": source, "teacher_sha256": base.fingerprint}
    found = {"distance": distance, "next": {"distance": other, "setting": str(second)}, "name": best.grid}
    made = passport.of(replace(model, sampling=sampling, record=record))
    return replace(made, shift=best.shift if isinstance(model.denoiser.schedule, Flow) else None, found=found)


def place(config: Config) -> Path:
    """Return where the passport goes. Raises ValueError where there is no folder for it, or a file already."""
    folder = Path(config.model.partition(",")[0])
    path = Path(config.output) if config.output else folder / passport.NAME
    if config.output is None and not folder.is_dir():
        raise ValueError(f"{config.model} is no folder that a passport could be in: name a file with --output")
    if path.exists():
        raise ValueError(f"{path} exists: delete it, or name another --output")
    return path


def loaded(spec: str) -> Teacher:
    """Load a model. A text-to-image pipeline without prompts gets a few."""
    model = teachers.load(spec)
    return model if model.embeddings is None or model.classes else with_examples(model)


def main(argv: list[str] | None = None) -> None:
    with one_line_errors():
        config = parse(Config, __doc__, PRESETS, argv)
        model, device = loaded(config.model), default_device()
        if (known := passport.beside(config.model)) is not None:
            print(
                f"{config.model} has a passport, for {plural(known.steps[0], 'step')}: it makes {passport.recognises(known, model)}"
            )
            return
        path, base = place(config), loaded(config.teacher)
        model.to(device), base.to(device)
        ranked = search(model, base, config, lambda tried: progress(tried, desc="settings", unit="setting"))
        for distance, setting in ranked[:5]:
            print(f"distance {distance:.4f}: {setting}")
        if ranked[0][0] > ACCEPTED and not config.force:
            raise ValueError(
                f"{config.model} is {ranked[0][0]:.2f} standard deviations from its base at best, more than {ACCEPTED}: name its true base, "
                "try more --steps and --guidance, or use --force"
            )
        if (own := distance_of_base(model, base, ranked[0][1], config)) * GAIN < ranked[0][0] and not config.force:
            raise ValueError(
                f"{config.model} is {ranked[0][0]:.2f} standard deviations from its base at best, and the base itself {own:.2f} there"
                f" ({ranked[0][1]}): it was not distilled for these --steps; try others, or use --force"
            )
    found = passport_of(model, base, ranked, config.teacher)
    passport.write(path, found)
    print(f"{path}: {ranked[0][1]}")


if __name__ == "__main__":
    main()
