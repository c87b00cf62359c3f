"""The methods of recipes/consistency.py, each with the settings that serve it best. EXPERIMENTS.md compares them with the papers'.

Nothing here imports torch before a method is built, because --help shows the table. `recipes.common.building` builds.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from distill.names import RESIDUALS

MethodFlags = Any  # that of recipes.common.method_flags, which imports this table

if TYPE_CHECKING:
    from distill.jumps import Jumps
    from distill.target import Target
    from distill.train import Method

    Build = Callable[[MethodFlags, Target, dict[str, Any]], Method]

START_LR = 1e-3
SECOND = ("second_period", "second_lr")  # flags of every method that trains a second network
PAIRS = ("weight", "distance", "averaged_target")  # flags of every method of pairs


@dataclass(frozen=True)
class MethodDefaults:
    """One row of `METHODS`.

    ``build``: (flags, target, options) -> method. ``mix``: the teacher weight in the target. ``takes``: the flags that it takes beside
    those of all methods. ``weight``, ``distance``, ``sampler``, ``time_embedding``, ``start``, ``start_part``, ``lr``, ``jumps``,
    ``steps``: its defaults.
    ``two_times``: its student is a two-time network. ``from_data``: whether it can train without a teacher.
    """

    build: Build
    mix: float
    takes: tuple[str, ...]
    weight: str = "one"
    distance: str = "l2"
    sampler: str = "consistency:0.5"
    two_times: bool = False
    from_data: bool = True
    time_embedding: str = "own"
    start: str = "as-is"
    start_part: float = 0.25
    lr: float = 1e-3
    jumps: str = "gap:0,1.5,0.25"
    steps: tuple[int, ...] = (1, 2, 4)


def cd(flags: MethodFlags, target: Target, options: dict[str, Any]) -> Method:
    from distill.consistency import Consistency, Neighbours

    pairs, free = Neighbours(lambda _: flags.grid_steps, grid=flags.grid), flags.data_free
    return Consistency(target, pairs, order=flags.order, substeps=flags.substeps, data_free=free, **options)


def ct(flags: MethodFlags, target: Target, options: dict[str, Any]) -> Method:
    from distill.consistency import Consistency, Neighbours, ct_steps

    return Consistency(target, Neighbours(ct_steps(), grid=flags.grid), **options)


def ict(flags: MethodFlags, target: Target, options: dict[str, Any]) -> Method:
    from distill.consistency import Consistency, Neighbours, ict_steps

    return Consistency(target, Neighbours(ict_steps(), (-1.1, 2.0)), **options)


def ect(flags: MethodFlags, target: Target, options: dict[str, Any]) -> Method:
    from distill.consistency import Consistency, Gap

    return Consistency(target, Gap(constant=flags.gap), **options)


def scm(flags: MethodFlags, target: Target, options: dict[str, Any]) -> Method:
    from distill.scm import ContinuousConsistency

    return ContinuousConsistency(target, warmup=tangent_warmup(flags), jvp=flags.jvp, step=flags.jvp_step)


def cmt(flags: MethodFlags, target: Target, options: dict[str, Any]) -> Method:
    return midtraining(target, data_free=flags.data_free)


def midtraining(target: Target, jumps: bool = False, data_free: bool = False) -> Method:
    from distill.midtraining import MidTraining
    from distill.target import teacher_of

    return MidTraining(teacher_of(target), jumps=jumps, data_free=data_free)


def meanflow(flags: MethodFlags, target: Target, options: dict[str, Any]) -> Method:
    from distill.meanflow import MeanFlow

    distils = bool(teacher_weight(flags))
    warmup = tangent_warmup(flags) if distils else 0.0
    return MeanFlow(target, jumps_of(flags), normalised=distils, warmup=warmup, jvp=flags.jvp, step=flags.jvp_step)


def alpha_flow(flags: MethodFlags, target: Target, options: dict[str, Any]) -> Method:
    from distill.splitting import AlphaFlow, falling, fixed

    if flags.alpha == 0:
        return meanflow(flags, target, options)
    alpha = falling() if flags.alpha is None else fixed(flags.alpha)
    return AlphaFlow(target, alpha, jumps_of(flags), normalised=bool(teacher_weight(flags)))


def psd(flags: MethodFlags, target: Target, options: dict[str, Any]) -> Method:
    from distill.splitting import SelfSplitting

    return SelfSplitting(target, jumps_of(flags), data_free=flags.data_free)


def lmd(flags: MethodFlags, target: Target, options: dict[str, Any]) -> Method:
    from distill.landing import Landing

    return Landing(target, jumps_of(flags), data_free=flags.data_free)


def dmd(flags: MethodFlags, target: Target, options: dict[str, Any]) -> Method:
    from distill.denoiser import network_of
    from distill.matching import Matching
    from distill.second import Second
    from distill.target import teacher_of

    teacher = teacher_of(target)
    second = Second(network_of(teacher), flags.second_lr, flags.second_period)
    return Matching(teacher, second, steps_of(flags)[0], flags.sid_alpha if flags.method == "sid" else None)


def pdd(flags: MethodFlags, target: Target, options: dict[str, Any]) -> Method:
    from distill.decoding import ParallelDecoding

    starts = max(steps_of(flags))
    if wrong := [n for n in (starts, *steps_of(flags)) if flags.heads % n or starts % n]:
        raise ValueError(f"--steps {wrong[0]}: accepted with pdd are divisors of --heads {flags.heads} and of the largest one")
    return ParallelDecoding(target, flags.heads, starts, data_free=flags.data_free)


def denoise(flags: MethodFlags, target: Target, options: dict[str, Any]) -> Method:
    from distill.regression import Regression

    return Regression(target)


def unrolled(flags: MethodFlags, target: Target, options: dict[str, Any]) -> Method:
    from distill.target import teacher_of
    from distill.unrolled import Unrolled

    how = {"distance": options["distance"]} if "distance" in options else {}
    return Unrolled(teacher_of(target), flags.unroll, flags.teacher_steps, **how)


AFTER_CMT: dict[str, Any] = {"start": "cmt", "start_part": 0.5, "lr": 3e-4}  # at 1e-3 continuous-time methods drift off
TO_DATA: dict[str, Any] = {"jumps": "gap:-1,1.4,0,0.5"}  # the target of a jump to s holds errors of shorter jumps to s
METHODS: dict[str, MethodDefaults] = {
    "cd": MethodDefaults(
        cd, 1.0, (*PAIRS, "grid", "grid_steps", "substeps", "order", "data_free"), "truncated_snr", from_data=False
    ),
    "ct": MethodDefaults(ct, 0.0, (*PAIRS, "grid"), "truncated_snr"),
    "ict": MethodDefaults(ict, 0.0, PAIRS, "inverse_gap", "pseudo_huber"),
    "ect": MethodDefaults(ect, 0.0, (*PAIRS, "gap"), "inverse_level"),
    "scd": MethodDefaults(scm, 1.0, ("jvp", "jvp_step"), from_data=False, **AFTER_CMT),
    "sct": MethodDefaults(scm, 0.0, ("jvp", "jvp_step")),
    "cmt": MethodDefaults(cmt, 1.0, ("data_free",), from_data=False),
    "lmd": MethodDefaults(lmd, 1.0, ("jumps", "data_free"), sampler="jump", two_times=True, from_data=False),
    "psd": MethodDefaults(psd, 1.0, ("jumps", "data_free"), sampler="jump", two_times=True),
    "alpha_flow": MethodDefaults(
        alpha_flow, 1.0, ("jvp", "jvp_step", "alpha", "jumps"), sampler="jump", two_times=True, **TO_DATA, **AFTER_CMT
    ),
    "meanflow": MethodDefaults(
        meanflow, 1.0, ("jvp", "jvp_step", "jumps"), sampler="jump", two_times=True, **TO_DATA, **AFTER_CMT
    ),
    "pdd": MethodDefaults(pdd, 1.0, ("heads", "data_free"), sampler="jump", from_data=False),
    "dmd": MethodDefaults(dmd, 1.0, SECOND, sampler="consistency", from_data=False, steps=(1,), lr=2e-4),
    "sid": MethodDefaults(dmd, 1.0, (*SECOND, "sid_alpha"), sampler="consistency", from_data=False, steps=(1,), lr=2e-4),
    "unrolled": MethodDefaults(
        unrolled, 1.0, ("unroll", "teacher_steps", "distance"), sampler="ddim", from_data=False, steps=(1,)
    ),
    "denoise": MethodDefaults(denoise, 1.0, (), sampler="ddim", from_data=False),
}


def steps_of(flags: MethodFlags) -> tuple[int, ...]:
    """Return the step counts of the student."""
    return flags.steps or own_steps(flags.method, flags.unroll)


def own_steps(method: str, unroll: int) -> tuple[int, ...]:
    """Return the step counts of a student where none are given: those of its method, or the steps that it is trained through."""
    return (unroll,) if method == "unrolled" else METHODS[method].steps


def lr_of(flags: MethodFlags, given: float | None) -> float:
    """Return the learning rate of a method: the one that is given, else its own, which is for its own start."""
    defaults = METHODS[flags.method]
    return given or (defaults.lr if start_name(flags) == defaults.start else START_LR)


def tangent_warmup(flags: MethodFlags) -> float:
    """Return the part of the run over which the derivative along the path comes in.

    It is 0 after ``cmt``: without the derivative the target is the denoiser, and what the start has learned would be lost.
    """
    return 0.0 if start_name(flags) == "cmt" else 0.25


def start_name(flags: MethodFlags) -> str:
    """Return the method that the student is trained by first, or as-is."""
    return flags.start or ("as-is" if flags.from_scratch else METHODS[flags.method].start)


def jumps_of(flags: MethodFlags) -> Jumps:
    """Return where the times of a two-time method are drawn. Raises ValueError for anything but gap and sorted with their numbers."""
    from distill.jumps import GapFirst, SortedTimes

    text = flags.jumps or METHODS[flags.method].jumps
    name, _, numbers = text.partition(":")
    try:
        values = [float(number) for number in numbers.split(",")] if numbers else []
        return {"gap": GapFirst, "sorted": SortedTimes}[name](*values)
    except (KeyError, ValueError, TypeError):
        raise ValueError(
            f"--jumps {text}: accepted are gap:MEAN,DEVIATION,PART_FROM_NOISE,PART_TO_DATA and sorted:MEAN,DEVIATION, "
            "numbers may be left out"
        ) from None


def teacher_weight(flags: MethodFlags) -> float | str:
    """Return the teacher weight in the target, or "auto". Raises ValueError for anything else."""
    if flags.target_mix is None:
        return 0.0 if flags.from_scratch else METHODS[flags.method].mix
    if flags.target_mix == "auto":
        return "auto"
    try:
        weight = float(flags.target_mix)
    except ValueError:
        weight = -1.0
    if not 0 <= weight <= 1:
        raise ValueError(f"--target-mix {flags.target_mix}: accepted are auto and numbers from 0 to 1")
    return weight


def terms_of(flags: MethodFlags) -> tuple[tuple[str, float], ...]:
    """Return --regularize as (name, weight). Raises ValueError for anything else."""
    terms = []
    for term in flags.regularize:
        name, _, weight = term.partition("=")
        if name not in RESIDUALS or not re.fullmatch(r"[0-9]{1,9}(\.[0-9]*)?|\.[0-9]+", weight):
            raise ValueError(f"--regularize {term}: accepted is name=weight with a name of {', '.join(RESIDUALS)}")
        terms.append((name, float(weight)))
    return tuple(terms)
