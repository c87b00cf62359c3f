"""The flags of a method of recipes/consistency.py. Defaults that differ between methods are in `recipes.common.methods.METHODS`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from distill.names import DISTANCES, GAP_WEIGHTS, GRIDS, RESIDUALS
from recipes.common.accepted import LEARNING_RATE, STEPS, Checked
from recipes.common.cli import flag, method_flag, model_flag
from recipes.common.methods import METHODS, START_LR, own_steps

DISTANCE_NAMES = (*DISTANCES, "lpips")
TIME_EMBEDDINGS = ("own", "slow")
STARTS = ("as-is", "denoise", "cmt")


def _own(name: str) -> Callable[[Mapping[str, Any]], str]:
    """Return the function of the flags' values that shows a default of the method."""
    return lambda values: getattr(METHODS[values["method"]], name)


@dataclass(frozen=True)
class MethodFlags(Checked):
    """The flags that describe a method. Flags that a method does not take are refused with it."""

    method: str = flag(
        "cd",
        "cd, scd, cmt, lmd, psd, pdd, meanflow, alpha_flow, unrolled, denoise distil a teacher, dmd, sid refine a student;"
        " ct, ict, ect, sct train on data",
        choices=METHODS,
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
        None, "distance of the two ends", choices=DISTANCE_NAMES, short=False, own=_own("distance")
    )
    weight: str | None = method_flag(
        None, "weight by the two noise levels", choices=GAP_WEIGHTS, short=False, own=_own("weight")
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
        own=_own("time_embedding"),
    )
    start: str | None = method_flag(
        None,
        "train the student by another method first, or begin with it as it is",
        choices=STARTS,
        short=False,
        own=_own("start"),
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
        "two-time methods: the length of a jump is drawn first (gap:MEAN,DEVIATION,PART_FROM_NOISE,PART_TO_DATA), or two times"
        " are sorted (sorted:MEAN,DEVIATION)",
        short=False,
        own=_own("jumps"),
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
    second_lr: float = method_flag(
        1e-3, "dmd, sid: learning rate of the fake denoiser; it falls to 0", short=False, **LEARNING_RATE
    )
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
        own=_own("sampler"),
    )
