"""What a run will take: time and memory from a measured training step, and disk from the sizes of its files."""

from __future__ import annotations

import copy
import math
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from distill.denoiser import Denoiser
from distill.rng import Rng
from distill.train import Method
from eval.features import Extractor
from eval.sweep import KEPT, KEPT_BYTES
from recipes.common.forecast import seconds_of
from recipes.data.sets import Data
from teachers import Teacher

PAGE = 8_000_000  # bytes of report, pictures, metrics and configuration


def measure_step_time(
    method: Method, student: Denoiser, x0: Tensor, cond: dict[str, Tensor], steps: float = math.inf
) -> tuple[float, float]:
    """Return the seconds per image of a training step with its update, and of a network call, measured on a copy of the student.

    ``steps``: how many the run takes.
    """
    student = replace(student, net=copy.deepcopy(student.net).to(x0.device).train())
    rng = Rng.seeded(0, x0.device, len(x0))
    adam = torch.optim.AdamW(student.net.parameters(), lr=0.0, fused=True)

    def training() -> None:
        method(student, x0, rng=rng, progress=0.0, **cond).mean().backward()
        adam.step()
        adam.zero_grad()

    def calling() -> None:
        with torch.inference_mode():
            student(x0, torch.tensor(student.schedule.t_max), **cond)

    seconds = [seconds_of(training, x0.device, steps), seconds_of(calling, x0.device, 0)]
    return seconds[0] / len(x0), seconds[1] / len(x0)


def size_of(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def disk_bytes(
    student: Teacher, data: Data, extractor: Extractor, *, stages: int, cells: int, images: int, averaged: bool
) -> int:
    """Return about how many bytes a run writes, at its fullest.

    They are the students of all ``stages`` and the last one again, three checkpoints of weights, Adam's state and average, two
    pipelines, the pictures of ``cells`` of ``images`` images each, and the features of the data.
    """
    net = student.parametric.net
    file, weights, trained = size_of(student.tensors().values()), size_of(net.state_dict().values()), size_of(net.parameters())
    codec = 0 if student.codec is None else size_of(student.codec.network.state_dict().values())
    checkpoint = weights * (2 if averaged else 1) + 2 * trained
    picture = int(torch.Size(student.image_shape).numel())
    kept = min(images, max(16, min(KEPT, KEPT_BYTES // picture))) * picture
    known = torch.zeros(1, *student.image_shape, dtype=torch.uint8)
    features = 0 if data.latents is not None else len(data.images) * size_of([extractor(known).fid])
    return (stages + 1) * file + 3 * checkpoint + 2 * (weights + codec) + cells * kept + features + PAGE


def check_disk(folder: Path, needed: int) -> None:
    """Raise ValueError where the disk of ``folder`` has fewer bytes free than a run still needs beside what it has written."""
    written = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    free = shutil.disk_usage(next(path for path in (folder, *folder.absolute().parents) if path.is_dir())).free
    if free + written < needed:
        raise ValueError(
            f"{folder}: the run needs about {gigabytes(needed - written)} of disk and {gigabytes(free)} are free: free some, or choose"
            " another --output-dir"
        )


def gigabytes(number: float) -> str:
    """Return a number of bytes in MB or GB, for people."""
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{max(number, 0) / 1e6:.0f} MB"
