"""The end of every recipe: which cells are measured, under which protocol, and the report about them."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from distill.schedule import EDM, VE, Schedule
from eval import reference, report
from eval.features import Extractor
from eval.metrics import Reference
from eval.reference import Identity
from eval.sweep import Cell, Protocol, sweep
from recipes.common import Run, device_name, versions
from recipes.data import Data
from teachers import Teacher

OPPONENTS = ("ddim", "heun", "dpm++2m", "dpm++3m", "unipc", "ipndm", "deis")


def measured_against(path: str | None, data: Data, extractor: Extractor) -> Data | tuple[Reference, Identity]:
    """The stored reference at ``path``, or the data where none is named. ValueError for latents, which cannot be one."""
    if path is not None:
        return reference.load(Path(path), extractor)
    data.pixels  # noqa: B018
    return data


def best_grid(schedule: Schedule, sampler: str, steps: int) -> str:
    """The time grid on which a training-free sampler does best, as far as we know (figures in EXPERIMENTS.md).

    In sigma, Karras' with rho 7. Elsewhere equal steps in t, but equal steps in log-SNR for the samplers of higher order from
    8 steps on, which is where these stop starving the middle of the path.
    """
    if isinstance(schedule, EDM | VE):
        return "karras"
    return "logsnr" if steps >= 8 and sampler in ("dpm++2m", "dpm++3m", "unipc", "ipndm") else "uniform"


def opponents(
    teacher: Teacher, label: str, steps: tuple[int, ...], samplers: tuple[str, ...], guidance: float = 1.0
) -> list[Cell]:
    """The teacher under its samplers. At one step they are all DDIM, which alone is kept there."""
    return [
        Cell(label, "teacher", teacher, sampler, n, best_grid(teacher.denoiser.schedule, sampler, n), guidance)
        for sampler in samplers
        for n in steps
        if n > 1 or sampler in ("ddim", "ancestral") or "ddim" not in samplers
    ]


def own_cells(
    student: Teacher, label: str, steps: tuple[int, ...] | None = None, training_seconds: float | None = None
) -> list[Cell]:
    """A student under the sampler, the grid and the step counts it was made for, or those of them that are in ``steps``."""
    made = student.sampler
    times = {n: tuple(t) for n, t in made.get("times", {}).items()}
    return [
        Cell(
            label, "student", student, made["name"], n, made["grid"], times=times.get(str(n)), training_seconds=training_seconds
        )
        for n in made["steps"]
        if steps is None or n in steps
    ]


def training_seconds(student: Path) -> float | None:
    """What a recipe noted beside a student's file: the seconds of training that went into it."""
    try:
        return json.loads((student.parent / "cost.json").read_text())["training_seconds"]
    except (OSError, json.JSONDecodeError, KeyError):
        return None


def cost_in_calls(cells: list[Cell]) -> int:
    """Network evaluations an image of each cell, summed."""
    return sum(cell.cost for cell in cells)


@dataclass(frozen=True)
class Measurement:
    """Extractor, reference and protocol of a run's numbers."""

    extractor: Extractor
    reference: Reference
    protocol: Protocol

    @classmethod
    def of(
        cls,
        extractor: Extractor,
        data: Data | tuple[Reference, Identity],
        run: Run,
        *,
        images: int,
        chunk: int,
        seed: int,
        metrics: str = "all",
    ) -> Measurement:
        """Extracts the features of all images of ``data``, where it is not a reference already."""
        accelerator: Accelerator = run.accelerator
        extractor = extractor.to(accelerator.device)
        if isinstance(data, tuple):
            real, known = data
        else:
            cache = run.folder / "reference.safetensors"
            real, known = reference.of_images(data.pixels, data.name, extractor, chunk, accelerator, cache)
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
        )
        return cls(extractor, real, protocol)

    def report(self, run: Run, title: str, cells: list[Cell], facts: dict[str, Any]) -> dict:
        """Measures the cells that are not finished and writes the report; every process returns it."""
        rows = sweep(cells, self.protocol, self.extractor, self.reference, run.accelerator, run.folder / "cells")
        facts = facts | {
            "command": shlex.join(["python", *sys.argv]),
            "processes": run.accelerator.num_processes,
            "device": device_name(run.accelerator),
            "versions": ", ".join(f"{k} {v}" for k, v in versions().items()),
        }
        out: list = [None]
        if run.main:
            finished = run.folder / "cells"
            out = [report.build(title, rows, asdict(self.protocol), self.reference, facts, finished)]
            report.write(out[0], run.folder, finished)
            for warning in out[0]["warnings"]:
                run.say(f"warning: {warning}")
        return broadcast_object_list(out)[0]
