"""How long a run takes: measured on its own steps, network calls, extraction and metrics, and corrected by the stages as they end.

training = images (seconds of a step / batch) + further teacher calls
sweep = cells (chunks (noise + calls + extraction) + metrics) + rounds of timing
run = training + sweep + `ENDING`
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import median

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor

from distill.images import to_uint8
from eval import timing
from eval.arithmetic import arithmetic
from eval.cells import Cell
from eval.features import Extractor
from eval.generate import initial_noise
from eval.machine import clock
from eval.metrics import Features, Reference, measure
from recipes.common.cli import duration
from recipes.common.run import Run
from teachers import Teacher

ENOUGH = 0.4  # seconds of calls whose median counts, unless the run makes so few of them that a fiftieth takes less
ENDING = 10.0  # seconds of report and pipelines on one x86-64 core, most of it a process that imports diffusers
METRIC_IMAGES, METRIC_FEATURES = 2_000, 512  # metrics are measured at these at most, and scaled


def seconds_of(work: Callable[[], object], device: torch.device, calls: float = math.inf) -> float:
    """Return the median seconds of ``work``, after a warm-up. ``calls``: how many the run will make.

    Every process makes equally many calls, because some are collective.
    """
    work()
    first = _timed(work, device)
    count = min(ENOUGH / max(first, 1e-6), calls / 50)
    (count,) = broadcast_object_list([int(count)])
    return median([first, *(_timed(work, device) for _ in range(count))])


def _timed(work: Callable[[], object], device: torch.device) -> float:
    began = clock(device)
    work()
    return clock(device) - began


@dataclass
class Forecast:
    """Hold the seconds that a run should take, from its plan to its end. ``images``: of training; ``done``: those of finished stages.

    ``began``: when the plan was made. ``whole``: whether nothing of the run was finished then. ``ending``: report and pipelines.
    """

    training: float
    sweep: float
    images: int
    device: torch.device
    whole: bool = True
    ending: float = ENDING
    done: int = 0
    began: float = field(init=False)

    def __post_init__(self):
        self.began = clock(self.device)

    @property
    def total(self) -> float:
        return self.training + self.sweep + self.ending

    def left(self, images: int, rate: float) -> float:
        """Return the seconds to the end of the run, ``images`` into a stage that trains ``rate`` images per second."""
        return max(0, self.images - self.done - images) / rate + self.sweep + self.ending

    def outcome(self) -> str:
        """Return how long the run took since its plan, and what the plan said."""
        return f"took {duration(clock(self.device) - self.began)}, forecast {duration(self.total)}"


def sweep_seconds(
    cells: Sequence[Cell],
    student: Teacher,
    steps: Sequence[int],
    extractor: Extractor,
    images: int,
    chunk: int,
    real: int,
    run: Run,
) -> float:
    """Return the seconds of a sweep of ``images`` over ``cells`` and over the student, once with each number of ``steps``.

    ``real``: how many real images the metrics compare with.
    """
    device = run.device
    cells = list({arithmetic(cell): cell for cell in cells}.values())
    calls = {id(cell.model): 0 for cell in cells} | {id(student): sum(steps)}
    for cell in cells:
        calls[id(cell.model)] += cell.cost
    chunks = math.ceil(math.ceil(images / chunk) / run.accelerator.num_processes)
    batch, seconds, number = timing.batch_of(images, chunk), 0.0, len(cells) + len(steps)
    for model in {id(model): model for model in (*(cell.model for cell in cells), student)}.values():
        for size, times in ((chunk, chunks), (batch, timing.ROUNDS)):
            made = calls[id(model)] * times
            seconds += made * seconds_of(_call(model, size, device), device, made) if made else 0

    def around() -> Features:
        """Make all of a chunk but its network calls."""
        noise = initial_noise(range(chunk), student.shape, student.classes, 0, device).noise
        return extractor(to_uint8(student.decode(noise)))

    every_chunk = seconds_of(around, device, number * chunks)
    return seconds + number * (chunks * every_chunk + metric_seconds(around(), images, real, run))


def _call(model: Teacher, size: int, device: torch.device) -> Callable[[], Tensor]:
    """Return a function that evaluates a model on ``size`` samples of noise."""
    labels = None if model.classes is None else torch.arange(size, device=device) % model.classes
    x, t = torch.randn(size, *model.shape, device=device), torch.tensor(model.denoiser.schedule.t_max)
    return torch.inference_mode()(partial(model.denoiser, x, t, **model.condition(labels)))


def metric_seconds(known: Features, images: int, real: int, run: Run) -> float:
    """Return the seconds of all metrics of one cell, on random features like ``known``.

    They are linear in the images and cubic in the features where there are more than are measured here.
    """

    def measured() -> float:
        width = min(known.fid.shape[1], METRIC_FEATURES)
        made, other = (torch.randn(max(40, min(n, METRIC_IMAGES)), width) for n in (images, real))
        logits = None if known.logits is None else torch.randn(len(made), known.logits.shape[1])
        began = clock(run.device)
        measure(Features(made, logits), Reference(other))
        scale = max(1.0, images / METRIC_IMAGES) * (known.fid.shape[1] / width) ** 3
        return scale * (clock(run.device) - began)

    return run.from_main(measured)
