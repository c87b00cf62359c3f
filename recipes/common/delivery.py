"""The files of a finished student for other programs: stock diffusers pipelines, and the LoRA file of an adapter."""

from __future__ import annotations

import subprocess

from recipes.common.run import Run
from teachers import Teacher
from teachers.encoder import with_examples
from teachers.export import deliver
from teachers.export.lora import export_lora


def export_pipelines(run: Run, model: Teacher) -> None:
    """Write the diffusers pipelines of a student, compared with our sampler, or say why no stock class can carry it.

    A LoRA student also gets the file of its adapter.
    """
    if not run.main:
        return
    for write in (_export_pipelines, _export_lora):
        try:
            write(run, model)
        except (ValueError, RuntimeError, OSError, subprocess.CalledProcessError) as error:  # the student itself is saved
            if isinstance(error, OSError) and error.errno is not None:
                raise  # of the disk; those of diffusers have no number
            run.say(f"no {'LoRA file' if write is _export_lora else 'diffusers pipeline'}: {error}")


def _export_pipelines(run: Run, model: Teacher) -> None:
    for name, worst in deliver.export_pipelines(with_examples(model), run.folder).items():
        run.say(f"{name}/ gives the same pixels through diffusers alone (largest difference {worst:.1g})")


def _export_lora(run: Run, model: Teacher) -> None:
    if (worst := export_lora(with_examples(model), run.folder)) is not None:
        run.say(f"lora/ gives the same pixels in the teacher's own pipeline (largest difference {worst:.1g})")
