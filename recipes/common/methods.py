"""The methods of recipes/consistency.py, each with the settings that serve it best. EXPERIMENTS.md compares them with the papers'.

Nothing here imports torch before a method is built, because --help shows the table. `recipes.common.building` builds.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, TypeVar

from distill.names import DISTANCES, GAP_WEIGHTS, GRIDS, RESIDUALS
from recipes.common.accepted import LEARNING_RATE, STEPS, Checked
from recipes.common.cli import flag, method_flag, model_flag

if TYPE_CHECKING:
    from distill.jumps import Jumps
    from distill.target import Target
    from distill.train import Method

    Build = Callable[["MethodFlags", Target, dict[str, Any]], Method]

F = TypeVar("F", bound="MethodFlags")
DISTANCE_NAMES = (*DISTANCES, "lpips")
TIME_EMBEDDINGS = ("own", "slow")
STARTS = ("as-is", "denoise", "cmt")
START_LR = 1e-3


@dataclass(frozen=True)
class MethodFlags(Checked):
    """The flags that describe a method. Flags that a method does not take are refused with it."""

    method: str = flag(
        "cd",
        "cd, scd, cmt, lmd, psd, pdd, meanflow, alpha_flow, unrolled, denoise distil a teacher, dmd, sid refine a student;"
        " ct, ict, ect, sct train on data",
        choices=lambda: METHODS,
    )
    steps: tuple[int, ...] | None = flag(
        None, "step counts of the student", own=lambda v: " ".join(map(str, own_steps(v["method"], v["unroll"]))), **STEPS
    )
    from_scratch: bool = model_flag(False, "start from new weights and use no teacher")
    target_mix: str | None = method_flag(
        None, "teacher weight in the target: a number from 0 to 1, or auto", own=lambda v: f"{METHODS[v['method']].mix:g}"
    )
    target: str = method_flag(
        "mix",
        "mix of data sample and teacher, or posterior mean over the batch",
        choices=("mix", "posterior-mean"),
        short=False,
    )
    distance: str | None = method_flag(
        None, "distance of the two ends", choices=DISTANCE_NAMES, short=False, own=lambda v: METHODS[v["method"]].distance
    )
    weight: str | None = method_flag(
        None, "weight by the two noise levels", choices=GAP_WEIGHTS, short=False, own=lambda v: METHODS[v["method"]].weight
    )
    grid: str = method_flag("uniform", "cd, ct: time grid of the pairs; the papers use karras", choices=GRIDS, short=False)
    grid_steps: int = method_flag(4, "cd: steps of the grid; the paper uses 18", short=False, **STEPS)
    substeps: int = method_flag(2, "cd: teacher steps within one step of the grid", short=False, at_least=1, at_most=1000)
    order: int = method_flag(
        2, "cd: order of the teacher steps, 1 for Euler and 2 for Heun", choices=(1, 2), short=False, at_least=1, at_most=2
    )
    regularize: tuple[str, ...] = method_flag((), f"terms to add, as name=weight: {', '.join(RESIDUALS)}", short=False)
    averaged_target: bool = method_flag(False, "take the cleaner end from the EMA of the student", short=False)
    jvp: str = method_flag(
        "finite", "scd, sct, meanflow: tangents by finite differences or exact", choices=("finite", "exact"), short=False
    )
    jvp_step: float = method_flag(
        0.02, "step of the finite differences in t; 0.02 averages over fast time embeddings", short=False, above=0, at_most=1
    )
    time_embedding: str | None = method_flag(
        None,
        "the network's own, or slow waves, for methods that differentiate along time",
        choices=TIME_EMBEDDINGS,
        short=False,
        own=lambda v: METHODS[v["method"]].time_embedding,
    )
    start: str | None = method_flag(
        None,
        "train the student by another method first, or begin with it as it is",
        choices=STARTS,
        short=False,
        own=lambda v: METHODS[v["method"]].start,
    )
    start_part: float | None = method_flag(
        None,
        "part of --training-images that --start takes",
        short=False,
        above=0,
        below=1,
        own=lambda v: f"{METHODS[v['method']].start_part:g}",
    )
    start_lr: float | None = method_flag(
        None,
        "learning rate of --start",
        short=False,
        own=lambda v: f"--lr where it is given, else {START_LR:g}",
        **LEARNING_RATE,
    )
    jumps: str | None = method_flag(
        None,
        "two-time methods: the length of a jump is drawn first (gap:MEAN,DEVIATION,PART_FROM_NOISE), or two times are sorted"
        " (sorted:MEAN,DEVIATION)",
        short=False,
        own=lambda v: METHODS[v["method"]].jumps,
    )
    gap: float | None = method_flag(
        None,
        "ect: a constant gap, as part of the noise level; otherwise it shrinks over the run",
        short=False,
        above=0,
        at_most=1,
    )
    alpha: float | None = method_flag(
        None, "alpha_flow: a fixed alpha, 1 is flow matching; otherwise it falls from 1", short=False, at_least=0, at_most=1
    )
    second_period: int = method_flag(
        5, "dmd, sid: steps of the fake denoiser per step of the student", short=False, at_least=1, at_most=1000
    )
    second_lr: float = method_flag(1e-3, "dmd, sid: learning rate of the fake denoiser", short=False, **LEARNING_RATE)
    sid_alpha: float = method_flag(1.0, "sid: alpha of its loss, 1 to 1.2 in the paper", short=False, at_least=0, at_most=2)
    heads: int = method_flag(
        16, "pdd: last layers of the student, one for each step of its grid", short=False, at_least=2, at_most=256
    )
    unroll: int = method_flag(
        1, "unrolled: steps of the student's sampler that it is trained through, its own --steps", short=False, **STEPS
    )
    teacher_steps: int = method_flag(
        16, "unrolled: steps of the teacher's DDIM sampler, whose end is the target", short=False, **STEPS
    )
    data_free: bool = method_flag(False, "begin at pure noise and use no training image", short=False)
    sampler: str | None = method_flag(
        None,
        "sampler for several steps: ddim, consistency:GAMMA (GAMMA of the noise is fresh), jump",
        short=False,
        own=lambda v: METHODS[v["method"]].sampler,
    )


IMAGELESS = ("dmd", "sid", "unrolled")  # methods that take only the shape of the data
CARRYING = ("cd", "ct", "ict", "ect", "unrolled", "denoise")  # methods that train a self-conditioned student
FROM_IMAGES = ("cd", "ct", "ict", "ect", "denoise")  # methods whose paths may start from images, `distill.source`
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
            f"--jumps {text}: accepted are gap:MEAN,DEVIATION,PART_FROM_NOISE and sorted:MEAN,DEVIATION, numbers may be left out"
        ) from None


def denoise(flags: MethodFlags, target: Target, options: dict[str, Any]) -> Method:
    from distill.regression import Regression

    return Regression(target)


def unrolled(flags: MethodFlags, target: Target, options: dict[str, Any]) -> Method:
    from distill.target import teacher_of
    from distill.unrolled import Unrolled

    how = {"distance": options["distance"]} if "distance" in options else {}
    return Unrolled(teacher_of(target), flags.unroll, flags.teacher_steps, **how)


AFTER_CMT: dict[str, Any] = {"start": "cmt", "start_part": 0.5, "lr": 3e-4}  # at 1e-3 continuous-time methods drift off
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
        alpha_flow, 1.0, ("jvp", "jvp_step", "alpha", "jumps"), sampler="jump", two_times=True, **AFTER_CMT
    ),
    "meanflow": MethodDefaults(meanflow, 1.0, ("jvp", "jvp_step", "jumps"), sampler="jump", two_times=True, **AFTER_CMT),
    "pdd": MethodDefaults(pdd, 1.0, ("heads", "data_free"), sampler="jump", from_data=False),
    "dmd": MethodDefaults(dmd, 1.0, SECOND, sampler="consistency", from_data=False, steps=(1,), lr=2e-4),
    "sid": MethodDefaults(dmd, 1.0, (*SECOND, "sid_alpha"), sampler="consistency", from_data=False, steps=(1,), lr=2e-4),
    "unrolled": MethodDefaults(
        unrolled, 1.0, ("unroll", "teacher_steps", "distance"), sampler="ddim", from_data=False, steps=(1,)
    ),
    "denoise": MethodDefaults(denoise, 1.0, (), sampler="ddim", from_data=False),
}


def check_flags(flags: MethodFlags, student: str | None) -> None:
    """Raise ValueError where the flags contradict each other. ``student``: the value of --student."""
    for field in fields(flags):
        takers = [name for name, other in METHODS.items() if field.name in other.takes]
        if takers and flags.method not in takers and getattr(flags, field.name) != field.default:
            name = "--" + field.name.replace("_", "-")
            raise ValueError(f"{name} means nothing to --method {flags.method}: accepted with {', '.join(takers)}")
    if start_name(flags) == "as-is" and (flags.start_lr or flags.start_part):
        raise ValueError("--start-part and --start-lr describe a first training: give --start denoise or cmt too")
    if flags.target == "posterior-mean" and flags.target_mix is not None:
        raise ValueError("--target posterior-mean uses the data alone: choose it or --target-mix")
    teacher_weight(flags)
    terms_of(flags)
    if flags.data_free and (teacher_weight(flags) != 1 or flags.target != "mix" or flags.regularize):
        raise ValueError(
            "without images the target is the teacher alone: accepted are --target mix, --target-mix 1 and no --regularize"
        )
    if flags.method in ("dmd", "sid") and len(steps_of(flags)) > 1:
        raise ValueError(f"--method {flags.method} trains a student for one step count: accepted is one number in --steps")
    if not flags.from_scratch:
        return
    if student == "table":
        raise ValueError("--student table starts from the weights of a teacher and --from-scratch has none: choose new")
    if not METHODS[flags.method].from_data:
        with_data = [name for name, other in METHODS.items() if other.from_data]
        raise ValueError(
            f"--method {flags.method} distils a teacher and --from-scratch has none: choose {', '.join(with_data)}"
        )
    if flags.target_mix not in (None, "0"):
        raise ValueError(f"--target-mix {flags.target_mix} needs a teacher and --from-scratch has none")


def check_carrying(flags: MethodFlags) -> None:
    """Raise ValueError where the method, or its start, cannot train a self-conditioned student."""
    for name, value in (("--method", flags.method), ("--start", start_name(flags))):
        if value not in (*CARRYING, "as-is"):
            raise ValueError(
                f"{name} {value} does not carry the previous estimate of a self-conditioned student: accepted are --method"
                f" {', '.join(CARRYING)}, and --start as-is or denoise"
            )


def check_range(flags: MethodFlags) -> None:
    """Raise ValueError where the method cannot train a student that takes the guidance scale: it needs the guided teacher alone."""
    if flags.method in ("dmd", "sid"):
        raise ValueError(f"--method {flags.method} trains for one guidance scale: accepted is --guidance, or another method")
    if flags.target == "posterior-mean" or teacher_weight(flags) != 1:
        raise ValueError("data have no guidance scale: accepted with a guidance range are --target mix and --target-mix 1")


def without_images(flags: F) -> F:
    """Return the flags for data that have prompts and no images. Raises ValueError for a method that trains on images."""
    accepted = [name for name, other in METHODS.items() if "data_free" in other.takes or name in IMAGELESS]
    if flags.method not in accepted:
        raise ValueError(
            f"--method {flags.method} trains on images, and the data have none: accepted are {', '.join(accepted)}"
        )
    return flags if flags.method in IMAGELESS else replace(flags, data_free=True)


def from_images(flags: F) -> F:
    """Return the flags for a teacher whose paths start from images. Raises ValueError for what assumes Gaussian noise."""
    refused = {
        f"--method {flags.method}": flags.method not in FROM_IMAGES,
        f"--start {start_name(flags)}": start_name(flags) == "cmt",
        "--target posterior-mean": flags.target != "mix",
        "--target-mix auto": flags.target_mix == "auto",
        "--regularize": bool(flags.regularize),
    }
    if wrong := [name for name, given in refused.items() if given]:
        raise ValueError(
            f"{wrong[0]} assumes Gaussian noise, and the teacher's paths start from images: accepted are --method"
            f" {', '.join(FROM_IMAGES)}, --start as-is or denoise, and --target-mix with a number"
        )
    return replace(flags, sampler=flags.sampler or "ddim")


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
