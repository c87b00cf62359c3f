"""The flags of LoRA training, and the models that they make: a teacher, and a student that shares its weights."""

from __future__ import annotations

from dataclasses import replace

from recipes.common.checks import check_unsharded
from recipes.common.flags import LoraFlags
from teachers import Teacher
from teachers.lora import merged, rounded, with_adapter
from teachers.networks.lora import Adapted
from teachers.teacher import require_network


def with_lora(
    flags: LoraFlags, teacher: Teacher | None, student: Teacher, spec: str, seed: int
) -> tuple[Teacher | None, Teacher]:
    """Return teacher and student for --lora-rank, --lora-targets and --base-precision.

    With a rank, the student is the teacher's network with an adapter. Without one, the adapter of a student that has one is merged, so that
    all weights are trained. ``spec``: of the teacher. ``seed``: of the adapter. Raises ValueError where the flags do not fit.
    """
    if not flags.lora_rank:
        if flags.lora_targets or flags.base_precision != "fp32":
            name = "--lora-targets" if flags.lora_targets else "--base-precision bf16"
            raise ValueError(f"{name} needs an adapter: accepted with --lora-rank alone")
        return teacher, merged(student)
    check_unsharded("--lora-rank")
    if teacher is None or require_network(teacher).net is not require_network(student).net:
        raise ValueError(
            "--lora-rank trains an adapter of the teacher's network as it is: accepted are methods with a teacher, without --student and"
            " without new layers (slow time, two times, heads, --guidance-range)"
        )
    if flags.base_precision == "bf16":
        if isinstance(teacher.parametric.net, Adapted):
            raise ValueError(
                "--base-precision bf16: the teacher has an adapter, whose base keeps its precision; accepted is fp32"
            )
        teacher = rounded(teacher)
        student = replace(student, denoiser=replace(student.parametric, net=teacher.parametric.net), network=teacher.network)
    return teacher, with_adapter(student, spec, flags.lora_rank, flags.lora_targets, seed)
