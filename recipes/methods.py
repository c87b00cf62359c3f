"""The methods of recipes/consistency.py, each with the settings that serve it best (EXPERIMENTS.md has the papers' beside them),
and what its flags mean."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch

from distill.consistency import Consistency, Gap, Neighbours, ct_steps, ict_steps
from distill.denoise import Denoise
from distill.denoiser import DenoiserLike
from distill.distance import DISTANCES, Distance
from distill.meanflow import MeanFlow
from distill.regularize import RESIDUALS, Regularized
from distill.scm import ContinuousConsistency
from distill.target import Datum, Mix, PosteriorMean, Target, errors
from distill.train import Method
from eval.perceptual import Lpips
from recipes.data import Data
from teachers import Teacher

if TYPE_CHECKING:
    from recipes.consistency import Config

DISTANCE_NAMES = (*DISTANCES, "lpips")
LEVELS = torch.linspace(-9, 13, 45)  # log-SNRs at which --target-mix auto compares datum and teacher
PAIRS = ("weight", "distance", "averaged_target")


@dataclass(frozen=True)
class Usual:
    """A method: ``build(config, target, options)``, the teacher's part in its target, the flags that it takes beside those that
    all take, its own weight, distance and sampler, and whether its student is told where a step ends."""

    build: Callable[[Config, Target, dict[str, Any]], Method]
    mix: float
    takes: tuple[str, ...]
    weight: str = "one"
    distance: str = "l2"
    sampler: str = "consistency:0.5"
    two_times: bool = False


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
    "cd": Usual(cd, 1.0, (*PAIRS, "grid", "grid_steps", "substeps", "order"), "truncated_snr"),
    "ct": Usual(ct, 0.0, (*PAIRS, "grid"), "inverse_level"),
    "ict": Usual(ict, 0.0, PAIRS, "inverse_gap", "pseudo_huber"),
    "ect": Usual(ect, 0.0, PAIRS, "inverse_level"),
    "scd": Usual(scm, 1.0, ("jvp", "jvp_step")),
    "sct": Usual(scm, 0.0, ("jvp", "jvp_step")),
    "meanflow": Usual(meanflow, 1.0, ("jvp", "jvp_step"), sampler="jump", two_times=True),
    "denoise": Usual(denoise, 1.0, (), sampler="ddim"),
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
    if usual.mix and config.method != "meanflow":
        with_data = [name for name, other in METHODS.items() if not other.mix] + ["meanflow"]
        raise ValueError(
            f"--method {config.method} distils a teacher and --from-scratch has none: choose {', '.join(with_data)}"
        )
    if config.target_mix not in (None, "0"):
        raise ValueError(f"--target-mix {config.target_mix} needs a teacher and --from-scratch has none")


def check_levels(teacher: Teacher, student: Teacher) -> None:
    """ValueError where the student would be trained below the noise levels that the teacher knows, or end above them."""
    low = [float(m.denoiser.schedule.level(torch.tensor(m.denoiser.schedule.t_min).double())) for m in (teacher, student)]
    if abs(math.log(low[0] / low[1])) > 0.7:
        raise ValueError(
            f"at t_min the teacher has sigma/alpha {low[0]:.3g} and the student's schedule {low[1]:.3g}: they must agree within a"
            " factor of 2"
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


def target_of(config: Config, teacher: DenoiserLike | None, data: Data) -> Target:
    """What stands for x0 in each step, as --target and --target-mix say."""
    part = part_of(config)
    if config.target == "posterior-mean":
        return PosteriorMean()
    if teacher is None or part == 0:
        return Datum()
    if part != "auto":
        return Mix(teacher, float(part))
    some = torch.randperm(len(data.images), generator=torch.Generator().manual_seed(config.seed))[:4096]
    labels = None if data.labels is None else data.labels[some]
    x0 = data.x0(some)
    found = errors(teacher, teacher.schedule, x0, labels, LEVELS, torch.Generator().manual_seed(config.seed))
    return Mix(teacher, found["best"], LEVELS)


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


def method_of(config: Config, teacher: DenoiserLike | None, data: Data) -> Method:
    """The method that the flags describe, with its regularizers."""
    usual, terms = METHODS[config.method], terms_of(config)
    options: dict[str, Any] = {"averaged": config.averaged_target, "weight": config.weight or usual.weight}
    options["distance"] = distance_of(config.distance or usual.distance, data)
    method = usual.build(config, target_of(config, teacher, data), options)
    return Regularized(method, terms) if terms else method
