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

import teachers
from distill import solver
from distill.schedule import EDM, VE, Schedule, Table
from eval import reference, report
from eval.features import Extractor
from eval.metrics import Reference
from eval.reference import Identity
from eval.sweep import Cell, Protocol, sweep
from recipes.common import Run, device_name, versions
from recipes.data import Data
from recipes.stored import codec_sha256
from teachers import Teacher
from teachers.codec import Codec

OPPONENTS = ("ddim", "heun", "dpm++2m", "dpm++3m", "unipc", "ipndm", "deis")


def check_match(teacher: Teacher, data: Data, training: bool = False) -> Data:
    """The data, by their captions where the teacher is told prompts. ValueError where the teacher cannot be measured on them or,
    ``training``, distilled."""
    if teacher.table is not None and data.captions is not None:
        data = data.captioned(teacher.record.get("prompts", []))
    if data.latents is not None:
        _check_latents(teacher, data)
    elif training and teacher.codec is not None:
        raise ValueError(f"the teacher works on latents, {data.name} holds images: recipes/latents.py makes latents of them")
    elif teacher.image_shape != data.shape:
        raise ValueError(
            f"the teacher makes images of shape {teacher.image_shape}, {data.name} holds {data.shape}: they must agree"
        )
    if teacher.classes is not None and data.labels is None:
        raise ValueError(f"the teacher is conditional on {teacher.classes} classes, {data.name} has no labels")
    if teacher.classes is not None and data.classes is not None and data.classes > teacher.classes:
        raise ValueError(f"{data.name} has {data.classes} classes, the teacher knows {teacher.classes}")
    return data


def _check_latents(teacher: Teacher, data: Data) -> None:
    index, codec = data.latents or {}, teacher.codec
    if codec is None or teacher.shape != data.shape:
        works = "images" if codec is None else "latents"
        raise ValueError(
            f"{data.name} holds latents of {index['model']} and shape {data.shape}, the teacher works on {works} of"
            f" {teacher.shape}: they must agree"
        )
    here = {"scale": codec.scale, "shift": codec.shift, "codec_sha256": codec_sha256(codec)}
    if wrong := [key for key, value in here.items() if index[key] != value]:
        key = wrong[0]
        raise ValueError(
            f"{data.name}: latents with {key} {index[key]!r:.14}, the teacher's has {here[key]!r:.14}: make them with its own"
        )


def codec_of(data: Data) -> Codec | None:
    """The autoencoder of the model that the latents were made with; None for images."""
    return None if data.latents is None else teachers.load(data.latents["model"]).codec


def measured_against(path: str | None, data: Data, extractor: Extractor) -> Data | tuple[Reference, Identity]:
    """The stored reference at ``path``, or the data where none is named. ValueError for latents, which cannot be one."""
    if path is not None:
        return reference.load(Path(path), extractor)
    data.pixels  # noqa: B018
    return data


def check_steps(teacher: Teacher, steps: tuple[int, ...]) -> None:
    """ValueError where a step count is more than the model's discrete table has entries."""
    schedule = teacher.denoiser.schedule
    most = schedule.steps if isinstance(schedule, Table) else 100_000
    if wrong := [n for n in steps if not 1 <= n <= most]:
        raise ValueError(f"{wrong[0]} steps on a grid of {most:,}: accepted are 1 to {most}")


def check_sampler(teacher: Teacher, name: str) -> None:
    """ValueError for an unknown sampler, and for jumps by a network that cannot be told where they end."""
    solver.named(name)
    net = getattr(teacher.denoiser, "net", None)
    if name == "jump" and not getattr(net, "two_times", True):
        raise ValueError("sampler 'jump' needs a network of two times (--method meanflow makes them): this one knows one")


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
