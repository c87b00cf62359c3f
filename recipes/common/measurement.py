"""The measurement at the end of a recipe: its cells, its protocol and its report."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from distill import files, reading
from distill.sampling import Sampling
from eval import reference, report, report_page
from eval.cells import picture_path
from eval.features import Extractor
from eval.generate import initial_noise
from eval.machine import commit
from eval.metrics import Reference
from eval.reference import Generated, Identity
from eval.sweep import Cell, Protocol, sweep
from recipes.common.run import Run, device_name, versions
from recipes.data.sets import Data
from teachers import Teacher
from teachers.saved import Stored

Real = Data | tuple[Reference, Identity] | Generated  # what is measured against


def measured_against(path: str | None, data: Data, extractor: Extractor, teacher: Generated | None = None) -> Real:
    """Load the stored reference at ``path``, or return the data where none is named, or ``teacher`` where they have no images.

    Raises ValueError for latents.
    """
    if path is not None:
        return reference.load(Path(path), extractor)
    if data.imageless and teacher is not None:
        return teacher
    data.require_pixels()
    return data


def count_of(real: Real) -> int:
    """Return how many images are measured against; 0 if it is unknown."""
    if isinstance(real, Generated):
        return real.count
    return len(real.images) if isinstance(real, Data) else real[1].images


def baselines(teacher: Teacher, label: str, steps: Iterable[int], samplers: Iterable[str], guidance: float = 1.0) -> list[Cell]:
    """Return the cells of the teacher under its samplers, each on its best grid. With one step all of them are DDIM.

    On a discrete table that the step count does not divide, a uniform grid is rounded to the entries, "trailing" in the report.
    """
    names, schedule = list(samplers), teacher.denoiser.schedule
    return [
        Cell(label, "teacher", teacher, Sampling.parse(name).on_best_grid(schedule, n).on_entries(schedule, n), n, guidance)
        for name in names
        for n in steps
        if n > 1 or name in ("ddim", "ancestral") or "ddim" not in names
    ]


def student_cells(
    student: Teacher,
    label: str,
    steps: tuple[int, ...] | None = None,
    training_seconds: float | None = None,
    run: str = "",
    guidance: float | None = None,
) -> list[Cell]:
    """Return the cells of a student at the step counts that it was made for, or at those of them that are in ``steps``.

    ``run``: the run that it comes from, where one report holds the students of several runs. ``guidance``: of a student that takes the
    scale; None for its own. Any other student is measured as it is.
    """
    made, scale = student.sampling, student.own_scale
    if student.guidance is not None and guidance is not None:
        scale = guidance
    own = {n: {n: made.times[n]} if n in made.times else {} for n in made.steps if steps is None or n in steps}
    return [
        Cell(label, "student", student, replace(made, times=times), n, scale, training_seconds, run) for n, times in own.items()
    ]


def training_seconds(student: Path) -> float | None:
    """Return the seconds of training that went into a student, which its recipe wrote beside the student's file."""
    try:
        return float(reading.read_json(student.parent / "cost.json")["training_seconds"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def first_prompts(cells: list[Cell], seed: int, count: int = 8, longest: int = 60) -> list[str]:
    """Return the prompts of the first images of every cell, cut for people; [] unless all cells share one table of prompts."""
    models: list[Teacher] = [cell.model.origin if isinstance(cell.model, Stored) else cell.model for cell in cells]
    table = models[0].embeddings
    if table is None or not table.prompts or len({model.conditions_sha256 for model in models}) > 1:
        return []
    labels = initial_noise(range(count), (1,), table.count, seed).labels
    assert labels is not None
    return [table.prompts[i][:longest] for i in labels.tolist()]


def _keep_real(data: Data, cells: list[Cell], seed: int, folder: Path, count: int = report_page.IMAGES) -> None:
    """Keep real images for the page, once, with the labels of the first generated ones where both have labels."""
    if picture_path(folder, report_page.REAL).exists():
        return
    model = cells[0].model
    images, classes = data.require_pixels(), (model.origin if isinstance(model, Stored) else model).classes
    labels = initial_noise(range(count), (1,), classes, seed).labels if classes and data.labels is not None else None
    if labels is None or data.labels is None:
        files.save(picture_path(folder, report_page.REAL), {"images": images[:count].clone()}, {})
        return
    found = [(data.labels == label).nonzero().flatten() for label in labels]
    if all(len(places) for places in found):
        chosen = [int(places[column % len(places)]) for column, places in enumerate(found)]
        files.save(picture_path(folder, report_page.REAL), {"images": images[chosen].clone(), "labels": labels}, {})


@dataclass(frozen=True)
class Measurement:
    """Hold the extractor, the reference and the protocol of a run's numbers."""

    extractor: Extractor
    reference: Reference
    protocol: Protocol
    data: Data | None = None  # with the real images that the page shows
    classes: Mapping[str, int] | None = None  # of captions

    @classmethod
    def of(
        cls,
        extractor: Extractor,
        data: Real,
        run: Run,
        *,
        images: int,
        chunk: int,
        seed: int,
        metrics: str = "all",
        folder: Path | None = None,
        classes: Mapping[str, int] | None = None,
    ) -> Measurement:
        """Build the measurement. Extract the features of all images of ``data``, unless it is a reference already.

        ``folder``: where these features are kept, the run's own if None. ``classes``: as in `eval.sweep.sweep`.
        """
        extractor = extractor.to(run.device)
        if isinstance(data, tuple):
            real, known = data
        elif isinstance(data, Generated):
            real, known = data.features(extractor, chunk, run.accelerator, run.folder.absolute().parent)
        else:
            cache = (folder or run.folder) / "reference.safetensors"
            real, known = reference.of_images(data.require_pixels(), data.name, extractor, chunk, run.accelerator, cache)
        protocol = Protocol(
            images=images,
            seed=seed,
            chunk=chunk,
            features=extractor.name,
            features_sha256=extractor.fingerprint,
            reference=known.data,
            reference_images=known.images,
            reference_sha256=known.data_sha256,
            resize=known.resize,
            metrics=metrics,
            distance=extractor.distance,
        )
        return cls(extractor, real, protocol, data if isinstance(data, Data) else None, classes)

    def rows(self, run: Run, cells: list[Cell], folder: Path | None = None) -> list[dict]:
        """Measure the cells that are not finished, in ``folder`` or that of the run. Every process returns the rows of all."""
        place = (folder or run.folder) / "cells"
        return sweep(cells, self.protocol, self.extractor, self.reference, run.accelerator, place, self.classes)

    def report(self, run: Run, title: str, cells: list[Cell], facts: dict[str, Any]) -> dict:
        """Measure the cells that are not finished and write the report. Every process returns it."""
        finished = run.folder / "cells"
        rows = self.rows(run, cells)
        facts = facts | {
            "command": shlex.join(["python", *sys.argv]),
            "processes": run.accelerator.num_processes,
            "device": device_name(run.accelerator),
            "versions": ", ".join(f"{k} {v}" for k, v in versions().items()),
        }
        if (known := commit()) is not None:
            facts["commit"] = known

        def write() -> dict:
            out = report.build(title, rows, self.protocol.described(), self.reference, facts, finished)
            if self.data is not None:
                _keep_real(self.data, cells, self.protocol.seed, finished)
            report.write(out, run.folder, finished, first_prompts(cells, self.protocol.seed))
            run.show(path for name in ("samples", "fid_vs_nfe") if (path := run.folder / f"{name}.png").is_file())
            for warning in out["warnings"]:
                run.say(f"warning: {warning}")
            return out

        return run.from_main(write)
