"""The teacher of --dry-run, which needs no weights: hollow networks (`teachers.hollow`), unless steps of real ones can be measured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import teachers
from teachers import Teacher
from teachers.hollow import META, has_weights
from teachers.hub import fetch

SMALL = 100_000_000  # weights of a network whose steps are measured on a CPU
LOOKING = ("QwenImage", "ZImage", "Lumina2")  # networks that cut their text by the values of a mask, and run with weights alone


def teacher_of(config: Any, load: Callable[..., Teacher] = teachers.load) -> Teacher:
    """Load the model of --teacher. With --dry-run a pipeline's networks are hollow where they are large, or have no weights here.

    A GPU measures large ones too. ``load``: `teachers.load`, or one that takes more models. Raises ValueError as it does, and for a
    network of `LOOKING` without weights.
    """
    if not config.dry_run:
        return load(config.teacher)
    model = load(config.teacher, weights=False)
    if not model.hollow:
        return model
    count = sum(weight.numel() for weight in model.parametric.net.parameters())
    complete = has_weights(fetch(model.record["source"], download=False, weights=False))
    looks = str((model.network or {})["config"].get("class")).startswith(LOOKING)
    if looks and not complete:
        raise ValueError(
            f"{config.teacher}: a network that cuts its text by the values of a mask is planned with weights alone"
        )
    return load(config.teacher) if complete and (looks or count <= SMALL or torch.cuda.is_available()) else model


def placed(model: Teacher, x0: Tensor, cond: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Return samples and conditions of a trial where the model is: on the meta device for a hollow one."""
    return (x0.to(META), {name: rows.to(META) for name, rows in cond.items()}) if model.hollow else (x0, cond)
