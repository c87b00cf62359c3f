"""The passport of a few-step model: what it was made for, and images by which it is recognised.

It is ``passport.json`` in a pipeline, and "passport" in the description of a student's file. Levels of noise are stated as
sigma / (alpha + sigma), which is 1 at pure noise and 0 at the data on every schedule: the ``sigmas`` of a flow. A loaded pipeline with
a passport is sampled as the passport says; one that contradicts it is refused.

The images are made from torch.Generator().manual_seed(seed) on the CPU, as diffusers draws noise: of the classes in turn, or for a
text-to-image model of the empty prompt.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill import files
from distill.denoiser import TIMES, Denoiser
from distill.grid import GRIDS
from distill.reading import malformed, read_json
from distill.sampling import SEARCHED, Sampling
from distill.schedule import Flow, Schedule, prior_std
from teachers.teacher import Teacher

FORMAT, NAME = "fewstep-passport/1", "passport.json"
SEEDS = (0, 1, 2, 3)
NEAR = 0.01  # largest difference of a thumbnail's pixels in [0, 1] that other hardware explains


@dataclass(frozen=True)
class Passport:
    """State how a model is sampled, what it predicts and what it was distilled from.

    ``sigmas``: {step count: [steps + 1]}, sigma / (alpha + sigma) at each time. ``timesteps``: {step count: [steps]}, the time input of
    the network. ``shift``: of a flow's grid; None on other schedules. ``guidance``: {"rule": "none"}; {"rule": "distilled", "scale"}, the
    teacher's guidance, which the student has learnt; {"rule": "input", "range"} of a network that takes the scale. ``teacher``:
    {"source", "sha256"}. ``images``: of `reference`. ``found``: how `recipes/audit.py` found the settings, for a foreign model.
    """

    sampler: str
    steps: tuple[int, ...]
    grid: str
    sigmas: dict[str, list[float]]
    timesteps: dict[str, list[float]] = field(default_factory=dict)
    shift: float | None = None
    guidance: dict[str, Any] = field(default_factory=lambda: {"rule": "none"})
    prediction: str | None = None
    boundary: str | None = None
    teacher: dict[str, Any] = field(default_factory=dict)
    images: dict[str, Any] = field(default_factory=dict)
    found: dict[str, Any] = field(default_factory=dict)
    format: str = FORMAT

    def sampling(self, schedule: Schedule) -> Sampling:
        """Return the sampling of a model on ``schedule``. A grid that this schedule has under the same name keeps it."""
        named = Sampling.parse(self.sampler, grid=self.grid if self.grid in GRIDS else "uniform", steps=self.steps)
        stated = {n: torch.tensor(self.sigmas[str(n)], dtype=torch.float64) for n in self.steps}
        if self.grid in GRIDS and all(
            torch.allclose(sigmas_of(schedule, named.times_for(schedule, n)), s) for n, s in stated.items()
        ):
            return named
        times = {n: tuple(schedule.time_of(s / (1 - s)).tolist()) for n, s in stated.items()}
        return replace(named, grid=SEARCHED, times=times)

    def describe(self) -> dict:
        """Return the passport as JSON data."""
        return json.loads(json.dumps(asdict(self)))


def sigmas_of(schedule: Schedule, times: Tensor) -> Tensor:
    """Return sigma / (alpha + sigma) of times [n], as float64."""
    alpha, sigma = schedule.at(times.double())
    return sigma / (alpha + sigma)


def of(model: Teacher, steps: Sequence[int] = (), stock: bool = False) -> Passport:
    """Return the passport of a student. ``steps``: those of its step counts that matter; default all.

    ``stock``: of its diffusers pipeline, in which the jumps of a two-time network are steps of DDIM. Raises ValueError for a model that
    takes any step count.
    """
    sampling, schedule, record = model.sampling, model.denoiser.schedule, model.record
    steps = tuple(steps) or sampling.steps
    if not steps:
        raise ValueError("a model that takes any step count has no passport: accepted are students")
    times = {str(n): model.times(n) for n in steps}
    return Passport(
        "ddim" if stock and sampling.two_times else sampling.label,
        steps,
        sampling.grid,
        {n: sigmas_of(schedule, grid).tolist() for n, grid in times.items()},
        timesteps=_timesteps(model.denoiser, times),
        shift=1.0 if isinstance(schedule, Flow) else None,
        guidance=_guidance(record.get("guidance")),
        prediction=getattr(model.denoiser, "prediction", None),
        boundary=record.get("boundary"),
        teacher={"source": record.get("of"), "sha256": record.get("teacher_sha256")},
        images=reference(model, min(steps)),
    )


def _timesteps(denoiser: Any, times: dict[str, Tensor]) -> dict[str, list[float]]:
    if not isinstance(denoiser, Denoiser):
        return {}
    inputs = {n: TIMES[denoiser.time](denoiser.schedule, grid[:-1]).tolist() for n, grid in times.items()}
    return {n: c for n, c in inputs.items() if all(map(math.isfinite, c))}


def _guidance(recorded: Any) -> dict[str, Any]:
    """Return the rule of what a student's record says of guidance: a scale, or the range of a network that takes the scale."""
    if isinstance(recorded, int | float):
        return {"rule": "none"} if recorded == 1 else {"rule": "distilled", "scale": float(recorded)}
    return {"rule": "none"} if recorded is None else {"rule": "input", "range": recorded}


def reference(model: Teacher, steps: int) -> dict[str, Any]:
    """Return the sha256 of the images of `SEEDS` as uint8 [C, H, W], and thumbnails [C, 4, 4] that survive other rounding.

    {} for a model whose samples are no images, whose paths do not start from noise, or whose autoencoder is gone: a student is saved all
    the same.
    """
    labels = _labels(model)
    if model.source is not None:
        return {}
    try:
        made = [pixels(model, steps, labels and [labels[i]], [seed])[0].permute(2, 0, 1) for i, seed in enumerate(SEEDS)]
    except (ValueError, OSError):
        return {}
    quantised = [(255 * image).round().to(torch.uint8).contiguous() for image in made]
    return {
        "steps": steps,
        "seeds": list(SEEDS),
        "labels": None if model.embeddings is not None else labels,
        "sha256": [hashlib.sha256(image.numpy().data).hexdigest() for image in quantised],
        "thumbnails": [_thumbnail(image) for image in made],
    }


def _thumbnail(image: Tensor) -> list:
    small = torch.nn.functional.adaptive_avg_pool2d(image, 4)
    return (1e4 * small.double()).round().div(1e4).tolist()


def _labels(model: Teacher) -> list[int] | None:
    if model.classes is None:
        return None
    return [i % model.classes if model.embeddings is None else int(model.null or 0) for i in range(len(SEEDS))]


@torch.inference_mode()
def pixels(model: Teacher, steps: int, labels: list[int] | None, seeds: list[int]) -> Tensor:
    """Return our sampler's images [n, H, W, C] in [0, 1], from the noise that a pipeline draws with these seeds.

    Raises ValueError for samples that are no images.
    """
    if len(model.shape) != 3:
        raise ValueError(f"samples of shape {model.shape} are no images; accepted is [C, H, W]")
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    net = getattr(model.denoiser, "net", None)
    device = next((p.device for p in net.parameters()), torch.device("cpu")) if net is not None else torch.device("cpu")

    def noise(shape: tuple[int, ...]) -> Tensor:
        return torch.cat([torch.randn((1, *shape), generator=generator) for generator in generators]).to(device)

    times = model.times(steps)
    cond = model.condition(None if labels is None else torch.tensor(labels, device=device))
    x = prior_std(model.denoiser.schedule, times[0]) * noise(model.shape)
    x0 = model.sampling.run(model.denoiser, x, times, lambda x: noise(x.shape[1:]), **cond)
    decode = (
        model.decode if model.codec is None else replace(model.codec, how="plain").decode
    )  # a copy keeps nothing that it loads
    return (decode(x0) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).cpu()


def recognises(passport: Passport, model: Teacher) -> str:
    """Return "the same images", "near images" (of other hardware or number format), "other images", or "no images"."""
    stated, made = passport.images, {}
    if stated:
        made = reference(replace(model, sampling=passport.sampling(model.denoiser.schedule)), stated["steps"])
    if not made:
        return "no images"
    if stated["sha256"] == made["sha256"]:
        return "the same images"
    one, two = (torch.tensor(each["thumbnails"]) for each in (stated, made))
    return "near images" if one.shape == two.shape and (one - two).abs().max() <= NEAR else "other images"


def write(path: Path, passport: Passport) -> None:
    """Write a passport as JSON, complete or not at all."""
    files.write_json(path, passport.describe())


def beside(spec: str) -> Passport | None:
    """Return the passport of a model's spec: a pipeline, a student's file or a run; None where it has none."""
    where = Path(spec if Path(spec).exists() else spec.partition(",")[0])
    if (where / NAME).is_file():
        return read(where / NAME)
    file = where / "student.safetensors" if where.is_dir() else where
    if file.suffix != ".safetensors" or not file.is_file():
        return None
    described = files.load(file)[1].get("passport")
    return None if described is None else from_description(described, file)


def read(path: Path) -> Passport:
    """Read a passport.json. Raises ValueError, in one line, for anything else."""
    return from_description(read_json(path), path)


def from_description(description: dict, where: Path) -> Passport:
    """Read the result of `Passport.describe`. Raises ValueError, beginning with ``where``, for anything else."""
    if description.get("format") != FORMAT:
        raise ValueError(f"{where}: format {str(description.get('format'))[:40]!r}; this version reads {FORMAT!r}")
    with malformed(where):
        passport = Passport(**{**description, "steps": tuple(description["steps"])})
        for n in passport.steps:
            grid = passport.sigmas[str(n)]
            falls = all(isinstance(s, int | float) and 0 <= s < before <= 1 for before, s in pairwise(grid))
            if type(n) is not int or len(grid) != n + 1 or not falls:
                raise ValueError(
                    f"the sigmas of {n} steps are {str(grid)[:60]}; accepted are {n} + 1 numbers that fall within [0, 1]"
                )
        Sampling.parse(passport.sampler, steps=passport.steps)
    return passport


def obeyed(folder: Path, denoiser: Denoiser, otherwise: Sampling) -> Sampling:
    """Return the sampling that the passport of a pipeline states; ``otherwise`` where the pipeline has none.

    Raises ValueError where the network is declared to predict something else.
    """
    path = folder / NAME
    if not path.exists():
        return otherwise
    passport = read(path)
    if passport.prediction not in (None, denoiser.prediction):
        raise ValueError(
            f"{path}: the model was made to predict {passport.prediction!r}, its scheduler says {denoiser.prediction!r}: "
            "accepted is the scheduler that it was exported with"
        )
    with malformed(path):
        return passport.sampling(denoiser.schedule)
