"""What recipes do with --guidance and --guidance-range: the teacher's guidance, the student's input, and the scales that are measured."""

from __future__ import annotations

from distill.denoiser import DenoiserLike
from distill.guidance import GuidanceRange
from recipes.common.flags import GuidanceFlags
from teachers import Teacher
from teachers.students import with_guidance


def taking_scale(flags: GuidanceFlags, teacher: Teacher | None, student: Teacher) -> Teacher:
    """Return the student as a network that takes the guidance scale, where --guidance-range is given, or the teacher takes the scale.

    Raises ValueError for a range that is none, that the teacher cannot be guided over, or that contradicts another flag.
    """
    over = None if flags.guidance_range is None else GuidanceRange.of(flags.guidance_range)
    if over is None and teacher is not None:
        over = teacher.guidance or student.guidance
    if over is None:
        if flags.sweep_guidance is not None:
            raise ValueError("--sweep-guidance measures a student that takes the guidance scale: add --guidance-range LOW HIGH")
        if teacher is not None:
            teacher.guided(flags.guidance)  # raises where it has no null label
        elif flags.guidance != 1:
            raise ValueError(f"--guidance {flags.guidance:g} needs a teacher, and this run has none: leave it out")
        return student
    if teacher is None:
        raise ValueError("--guidance-range needs a teacher to guide, and this run has none: leave it out")
    if flags.guidance != 1:
        raise ValueError(f"--guidance {flags.guidance:g} is one scale, and the student takes a range: accepted is one of both")
    teacher.guided_over(over)  # raises where it cannot be
    if wrong := [scale for scale in flags.sweep_guidance or () if scale not in over]:
        raise ValueError(f"--sweep-guidance {wrong[0]:g}: the student takes scales of {over}; accepted are scales within")
    return with_guidance(student, over)


def guided(flags: GuidanceFlags, teacher: Teacher, student: Teacher) -> DenoiserLike:
    """Return the teacher with the guidance that the student learns: of one scale, or of each sample's own."""
    return teacher.guided(flags.guidance) if student.guidance is None else teacher.guided_over(student.guidance)


def measured(flags: GuidanceFlags, student: Teacher) -> dict[str, float]:
    """Return the guidance scales at which models are measured, by the ending that it gives their names in the report."""
    if student.guidance is None:
        return {"": flags.guidance}
    ends = (student.guidance.low, student.guidance.high)
    return {f" w={scale:g}": scale for scale in flags.sweep_guidance or ends}


def outside(model: Teacher, scale: float | None) -> str | None:
    """Return a warning for a scale that the model was not trained for; None where it was, or where any is accepted."""
    if scale is None or model.guidance is None or scale in model.guidance:
        return None
    return f"guidance {scale:g} is outside of {model.guidance}, the scales that this student was trained for"
