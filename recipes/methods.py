"""The methods of recipes/consistency.py, each with the settings that serve it best (EXPERIMENTS.md has the papers' beside them),
and what its flags mean."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from distill.consistency import Consistency, Gap, Neighbours, ct_steps, ict_steps
from distill.denoise import Denoise
from distill.distance import DISTANCES, Distance
from distill.meanflow import MeanFlow
from distill.regularize import RESIDUALS, Regularized
from distill.scm import ContinuousConsistency
from distill.target import Datum, Judge, Mix, PosteriorMean, Target
from distill.train import Method
from eval.perceptual import Lpips
from recipes.data import Data
from teachers import Teacher

if TYPE_CHECKING:
    from recipes.consistency import Config

DISTANCE_NAMES = (*DISTANCES, "lpips")
LEVELS = torch.linspace(-9, 13, 23)  # log-SNRs at which --target-mix auto compares datum and teacher
PAIRS = ("weight", "distance", "averaged_target")


@dataclass(frozen=True)
class Usual:
    """A method: ``build(config, target, options)``, the teacher's part in its target, the flags that it takes beside those that
    all take, its own weight, distance and sampler, whether its student is told where a step ends, and whether there is anything to
    learn without a teacher."""

    build: Callable[[Config, Target, dict[str, Any]], Method]
    mix: float
    takes: tuple[str, ...]
    weight: str = "one"
    distance: str = "l2"
    sampler: str = "consistency:0.5"
    two_times: bool = False
    from_data: bool = True


def cd(config: Config, target: Target, options: dict[str, Any]) -> Method:
    pairs = Neighbours(lambda _: config.grid_steps, grid=config.grid)
    return Consistency(target, pairs, order=config.order, substeps=config.substeps, **options)


def ct(config: Config, target: Target, options: dict[str, Any]) -> Method:
    return Consistency(target, Neighbours(ct_steps(), grid=config.grid), **options)


def ict(config: Config, target: Target, options: dict[str, Any]) -> Method:
    return Consistency(target, Neighbours(ict_steps(), (-1.1, 2.0)), **options)


def ect(config: Config, target: Target, options: dict[str, Any]) -> Method:
    return Consistency(target, Gap(), **options)


def scm(config: Config, target: Target, options: dict[str, Any]) -> Method:
    return ContinuousConsistency(target, jvp=config.jvp, step=config.jvp_step)


def meanflow(config: Config, target: Target, options: dict[str, Any]) -> Method:
    return MeanFlow(target, power=0.0 if part_of(config) else 1.0, jvp=config.jvp, step=config.jvp_step)


def denoise(config: Config, target: Target, options: dict[str, Any]) -> Method:
    return Denoise(target)


METHODS: dict[str, Usual] = {
    "cd": Usual(cd, 1.0, (*PAIRS, "grid", "grid_steps", "substeps", "order"), "truncated_snr", from_data=False),
    "ct": Usual(ct, 0.0, (*PAIRS, "grid"), "truncated_snr"),
    "ict": Usual(ict, 0.0, PAIRS, "inverse_gap", "pseudo_huber"),
    "ect": Usual(ect, 0.0, PAIRS, "inverse_level"),
    "scd": Usual(scm, 1.0, ("jvp", "jvp_step"), from_data=False),
    "sct": Usual(scm, 0.0, ("jvp", "jvp_step")),
    "meanflow": Usual(meanflow, 1.0, ("jvp", "jvp_step"), sampler="jump", two_times=True),
    "denoise": Usual(denoise, 1.0, (), sampler="ddim", from_data=False),
}


def check(config: Config) -> None:
    """ValueError where the flags contradict each other."""
    usual = METHODS[config.method]
    for field in fields(config):
        takers = [name for name, other in METHODS.items() if field.name in other.takes]
        if takers and config.method not in takers and getattr(config, field.name) != field.default:
            flag = "--" + field.name.replace("_", "-")
            raise ValueError(f"{flag} means nothing to --method {config.method}: accepted with {', '.join(takers)}")
    if config.target == "posterior-mean" and config.target_mix is not None:
        raise ValueError("--target posterior-mean is of the data alone: choose it or --target-mix")
    part_of(config)
    terms_of(config)
    if not config.from_scratch:
        return
    if config.student == "table":
        raise ValueError("--student table starts from the weights of a teacher and --from-scratch has none: choose new")
    if not usual.from_data:
        with_data = [name for name, other in METHODS.items() if other.from_data]
        raise ValueError(
            f"--method {config.method} distils a teacher and --from-scratch has none: choose {', '.join(with_data)}"
        )
    if config.target_mix not in (None, "0"):
        raise ValueError(f"--target-mix {config.target_mix} needs a teacher and --from-scratch has none")


def check_levels(teacher: Teacher, student: Teacher) -> None:
    """ValueError where the student would be trained well below the noise levels that the teacher knows."""
    low = [float(m.denoiser.schedule.level(torch.tensor(m.denoiser.schedule.t_min).double())) for m in (teacher, student)]
    if low[1] < low[0] / 2:
        raise ValueError(
            f"the student's schedule begins at sigma/alpha {low[1]:.3g} (t_min) and the teacher knows none below {low[0]:.3g}: accepted "
            "are schedules that begin at half of that or more"
        )


def part_of(config: Config) -> float | str:
    """The part of the teacher in the target, or "auto". ValueError for anything else."""
    if config.target_mix is None:
        return 0.0 if config.from_scratch else METHODS[config.method].mix
    if config.target_mix == "auto":
        return "auto"
    try:
        part = float(config.target_mix)
    except ValueError:
        part = -1.0
    if not 0 <= part <= 1:
        raise ValueError(f"--target-mix {config.target_mix}: accepted are auto and numbers from 0 to 1")
    return part


def target_of(config: Config, teacher: Teacher | None, model: Teacher, data: Data, device: torch.device | None) -> Target:
    """What stands for x0 in each step of training ``model``, as --target and --target-mix say; without a ``device``, on which the
    teacher is judged, auto is 1/2. ValueError for a posterior mean where the condition is no label."""
    part = part_of(config)
    if config.target == "posterior-mean":
        if model.table is not None:
            raise ValueError("--target posterior-mean goes by labels, and this model is told a text: choose --target mix")
        return PosteriorMean()
    if teacher is None or part == 0:
        return Datum()
    if part != "auto" or device is None:
        return Mix(teacher.denoiser, 0.5 if part == "auto" else float(part))
    schedule, rng = teacher.denoiser.schedule, torch.Generator().manual_seed(config.seed)
    levels = tqdm(LEVELS, desc="judging the teacher", leave=False, disable=None)
    return Mix(teacher.denoiser, judged(teacher, data, 4096, config.seed, device).errors(schedule, levels, rng)["best"], LEVELS)


def judged(teacher: Teacher, data: Data, most: int, seed: int, device: torch.device) -> Judge:
    """The teacher before ``most`` of the data, at random."""
    some = torch.randperm(len(data.images), generator=torch.Generator().manual_seed(seed))[:most]
    labels = None if data.labels is None or teacher.classes is None else data.labels[some].to(device)
    return Judge(teacher.denoiser, data.x0(some, device), labels, teacher.condition)


def distance_of(name: str, data: Data) -> Distance:
    """The distance of this name. ValueError where its package is missing or the images are not of its kind."""
    return Lpips(data.shape[0]) if name == "lpips" else DISTANCES[name]


def terms_of(config: Config) -> tuple[tuple[str, float], ...]:
    """--regularize as names and weights. ValueError for anything else."""
    terms = []
    for term in config.regularize:
        name, _, weight = term.partition("=")
        if name not in RESIDUALS or not weight.replace(".", "", 1).isdigit():
            raise ValueError(f"--regularize {term}: accepted is name=weight with a name of {', '.join(RESIDUALS)}")
        terms.append((name, float(weight)))
    return tuple(terms)


def method_of(
    config: Config, teacher: Teacher | None, model: Teacher, data: Data, device: torch.device | None = None
) -> Method:
    """The method that the flags describe, by which ``model`` is trained, with its regularizers; the one that is meant only with a
    ``device``, see `target_of`."""
    usual, terms = METHODS[config.method], terms_of(config)
    options: dict[str, Any] = {"averaged": config.averaged_target, "weight": config.weight or usual.weight}
    options["distance"] = distance_of(config.distance or usual.distance, data)
    method = usual.build(config, target_of(config, teacher, model, data, device), options)
    return Regularized(method, terms) if terms else method
