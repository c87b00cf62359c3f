"""Which flags of recipes/consistency.py go together, and with which students and data. Each error is one line."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import TypeVar

from recipes.common.method_flags import MethodFlags
from recipes.common.methods import METHODS, start_name, steps_of, teacher_weight, terms_of

F = TypeVar("F", bound=MethodFlags)
IMAGELESS = ("dmd", "sid", "unrolled")  # methods that take only the shape of the data
CARRYING = ("cd", "ct", "ict", "ect", "unrolled", "denoise")  # methods that train a self-conditioned student
FROM_IMAGES = ("cd", "ct", "ict", "ect", "denoise")  # methods whose paths may start from images, `distill.source`


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
