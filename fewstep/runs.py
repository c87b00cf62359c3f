"""Distillation and evaluation from Python. Both call the recipes' own functions, and write what the recipes write."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from eval.features import Extractor
from fewstep.model import Model
from recipes import consistency, progressive
from recipes import evaluate as evaluation
from recipes.common.methods import METHODS
from recipes.data.sets import Data

C = TypeVar("C")


def distil(
    teacher: Model,
    images: Tensor,
    labels: Tensor | None = None,
    /,
    *,
    method: str = "progressive",
    steps: Sequence[int] = (8, 4, 2, 1),
    out: Path | str,
    **settings: Any,
) -> dict[int, Model]:
    """Distil a teacher and return the students by step count.

    ``images``: uint8 [N, C, H, W], or floats in [-1, 1]; ``labels``: integers [N]. ``method``: "progressive", whose ``steps`` are each half
    of the one before, or a method of recipes/consistency.py such as "cd", which makes one student for all ``steps``. ``out``: the run's
    directory; a run that was killed continues when it is called again. ``settings``: flags of the recipe, such as
    ``images_per_stage=24_000``, ``training_images=256_000``, ``guidance=2.0``, ``features="inception-v3-compat"``.

    The probe runs first. Raises ValueError in one line where the parts do not fit or the teacher is not a denoiser as declared.
    """
    data = Data.of(images, labels)
    common = {
        "teacher": _name(teacher),
        "data": data.name,
        "output_dir": str(out),
        "features": _features(data.shape),
    } | settings
    if method == "progressive":
        ladder = _configured(
            progressive.Config, {"skip": ()} | common | {"start_steps": 2 * max(steps), "end_steps": min(steps)}
        )
        if sorted(progressive.ladder(ladder)) != sorted(steps):
            raise ValueError(f"steps {list(steps)}: accepted are step counts that halve each time, such as 8, 4, 2, 1")
        e = progressive.prepare(ladder, teacher.inner, data)
        progressive.distil(ladder, e)
    elif method in METHODS:
        config = _configured(consistency.Config, common | {"method": method, "steps": tuple(steps)})
        e = consistency.prepare(config, teacher.inner, data)
        consistency.distil(config, e)
    else:
        raise ValueError(f"unknown method {method!r}: accepted are progressive, {', '.join(METHODS)}")
    files = {stored.path: stored for stored in e.students.values()}
    made = {path: Model.of(stored.load().to(e.run.device)) for path, stored in files.items()}
    return {n: made[stored.path] for n, stored in e.students.items()}


@dataclass(frozen=True)
class Report:
    """Hold a finished evaluation: ``data`` is what report.json holds, ``folder`` the directory with all forms of the report."""

    data: dict
    folder: Path

    @property
    def verdict(self) -> str:
        """One or two sentences: up to how many network evaluations a student is the better choice."""
        return self.data["verdict"]

    @property
    def rows(self) -> list[dict]:
        """One row per model, sampler and step count: "fid", "fid_interval", "nfe", "seconds_per_image", ..."""
        return self.data["rows"]

    def plot(self) -> Path:
        """Return the picture of FID against network evaluations; report.html beside it is the whole page."""
        return self.folder / "fid_vs_nfe.png"


def evaluate(
    *models: Model,
    against: Tensor,
    labels: Tensor | None = None,
    n: int = 10_000,
    out: Path | str,
    **settings: Any,
) -> Report:
    """Measure FID and more against step count, for students at their own step counts and for teachers with all samplers.

    ``against``: the real images, with ``labels``, as in `distil`. ``n``: generated images per cell. ``out``: the directory of the report;
    finished cells are kept. ``settings``: flags of recipes/evaluate.py, such as ``steps=(1, 2, 4)`` and ``features``.
    Raises ValueError in one line where the parts do not fit.
    """
    data = Data.of(against, labels)
    distinct = list({model.inner.fingerprint: model for model in models}.values())
    steps = tuple(sorted({n for model in models for n in model.steps})) or (1, 2, 4, 8)
    common = {
        "model": tuple(_name(model) for model in distinct), "data": data.name, "output_dir": str(out), "images": n, "steps": steps,
        "features": _features(data.shape),
    }  # fmt: skip
    config = _configured(evaluation.Config, common | settings)
    extractor = Extractor.create(config.features, config.features_weights)
    named = [(_name(model), [(str(Path(out) / "none"), model.inner)]) for model in distinct]
    run, cells, measurement = evaluation.prepare(config, named, data, extractor)
    report = evaluation.measure(config, run, cells, measurement, data)
    run.close()
    return Report(json.loads((run.folder / "report.json").read_text()) if run.main else report, run.folder)


def _name(model: Model) -> str:
    return f"python-{model.inner.fingerprint[:8]}"


def _features(shape: tuple[int, ...]) -> str:
    """Return the extractor of the embedded digits for images of their shape, else Inception."""
    return "digits" if shape == (1, 8, 8) else "inception-v3-compat"


def _configured(config: type[C], settings: dict[str, Any]) -> C:
    """Build a recipe's configuration. Raises ValueError that names the nearest settings for an unknown one."""
    accepted = [field.name for field in fields(config)]  # type: ignore[arg-type]
    for name in settings:
        if name not in accepted:
            near = difflib.get_close_matches(name, accepted, 3, 0.4) or accepted
            raise ValueError(f"unknown setting {name!r}: accepted are {', '.join(near)}")
    return config(**settings)
