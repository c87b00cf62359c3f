"""The end of every recipe: which cells are measured, under which protocol, and the report about them."""

from __future__ import annotations

import shlex
import sys
from dataclasses import asdict, dataclass
from typing import Any

import torch

from distill.schedule import EDM, VE, Schedule
from distill.solver import nfe
from eval import report
from eval.features import Extractor, fingerprint
from eval.metrics import Reference
from eval.sweep import Cell, Protocol, sweep
from recipes.common import Run, device_name, versions
from recipes.data import Data
from teachers import Teacher

OPPONENTS = ("ddim", "heun", "dpm++2m", "dpm++3m", "unipc", "ipndm", "deis")


def check_match(teacher: Teacher, data: Data) -> None:
    """ValueError where the teacher cannot be distilled or measured on these data."""
    if teacher.shape != data.shape:
        raise ValueError(f"the teacher makes images of shape {teacher.shape}, {data.name} holds {data.shape}: they must agree")
    if teacher.classes is not None and data.labels is None:
        raise ValueError(f"the teacher is conditional on {teacher.classes} classes, {data.name} has no labels")
    if teacher.classes is not None and data.classes is not None and data.classes > teacher.classes:
        raise ValueError(f"{data.name} has {data.classes} classes, the teacher knows {teacher.classes}")


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


def own_cells(student: Teacher, label: str, steps: tuple[int, ...] | None = None) -> list[Cell]:
    """A student under the sampler, the grid and the step counts it was made for, or those of them that are in ``steps``."""
    s = student.sampler
    return [Cell(label, "student", student, s["name"], n, s["grid"]) for n in s["steps"] if steps is None or n in steps]


def cost_in_calls(cells: list[Cell]) -> int:
    """Network evaluations an image of each cell, summed."""
    return sum(nfe(cell.sampler, cell.steps) * (2 if cell.guidance != 1 else 1) for cell in cells)


@dataclass(frozen=True)
class Measurement:
    """Extractor, reference and protocol of a run's numbers."""

    extractor: Extractor
    reference: Reference
    protocol: Protocol

    @classmethod
    def of(cls, extractor: Extractor, data: Data, images: int, chunk: int, seed: int, device: torch.device) -> Measurement:
        """Extracts the reference features of all images of ``data``."""
        extractor = extractor.to(device)
        protocol = Protocol(
            images=images,
            seed=seed,
            chunk=chunk,
            features=extractor.name,
            features_sha256=extractor.fingerprint,
            reference=data.name,
            reference_images=len(data.images),
            reference_sha256=fingerprint(data.images),
        )
        return cls(extractor, Reference(extractor.all(data.images, chunk, device)), protocol)

    def report(self, run: Run, title: str, cells: list[Cell], facts: dict[str, Any]) -> dict:
        """Measures the cells that are not finished and writes the report; every process returns it."""
        rows = sweep(cells, self.protocol, self.extractor, self.reference, run.accelerator, run.folder / "cells")
        facts = facts | {
            "command": shlex.join(["python", *sys.argv]),
            "processes": run.accelerator.num_processes,
            "device": device_name(run.accelerator),
            "versions": ", ".join(f"{k} {v}" for k, v in versions().items()),
        }
        out = report.build(title, rows, asdict(self.protocol), self.reference.floor(self.protocol.images), facts)
        if run.main:
            report.write(out, run.folder, run.folder / "cells")
        return out
