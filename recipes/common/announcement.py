"""What a distillation says before it starts: its time, memory and disk, measured on a few steps, or counted where networks are hollow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from distill.denoiser import Denoiser
from distill.sampling import Sampling
from distill.train import Method, Optimization
from eval.machine import resident_bytes
from recipes.common.cli import duration, plural
from recipes.common.cost import ADAM, Cost
from recipes.common.footprint import place_of
from recipes.common.forecast import Forecast, sweep_seconds
from recipes.common.guidance import measured
from recipes.common.measurement import count_of
from recipes.common.outline import placed
from recipes.common.plan import (
    batches_text,
    count_operations,
    gigabytes,
    measure_step_time,
    memory_text,
    once,
    size_of,
    training_memory,
    weights_of,
    work_text,
)
from recipes.common.several_sizes import shapes_text
from recipes.data.buckets import Buckets
from teachers.export import deliver

Experiment = Any  # that of recipes.common.training, which imports this


def plan_of(
    e: Experiment, method: Method, budgets: list[Optimization], steps: Sequence[int], more: int, sampling: Sampling
) -> tuple[list[str], Forecast | None]:
    """Return the lines of a plan, and its forecast, where steps could be measured. See `Experiment.plan`."""
    forecast, reason = None, deliver.reason_against(replace(e.student, sampling=sampling))
    student, world = e.student, e.run.accelerator.num_processes
    images, asked = (sum(values) for values in zip(*((b.trained_images, b.images) for b in budgets), strict=True))
    largest = e.data.of_one_shape()
    device = torch.device("cpu") if student.hollow else e.run.device
    batches = largest.batches(e.split(budgets[0]), 0, "rehearsal", device, student.condition)
    x0, cond = placed(student, *next(iter(batches(0))))
    weights, trained = (sum(map(torch.Tensor.numel, ws)) for ws in weights_of(student))
    c, real = e.config, count_of(e.real)
    made = [*steps] * len(measured(c, student))
    if student.hollow:
        step, call = count_operations(method, student.student(), x0, cond, *_networks(e))
        swept = c.images * (sum(cell.cost for cell in e.cells) + sum(made))
        training, sweeping = work_text(images * step + more * call), work_text(swept * call)
        together = "unknown: no step was measured, because the network is large or its weights are not here"
        needed, rest = _memory(e, method, budgets, x0, cond)
    else:
        precision = e.run.accelerator.mixed_precision
        step, call = measure_step_time(method, student.student(), x0, cond, images / budgets[0].batch_size, precision)
        extractor = e.extractor.to(e.run.device)
        sweep = sweep_seconds(e.cells, student, made, extractor, c.images, c.chunk, real, e.run)
        needed, rest = _memory(e, method, budgets, x0, cond)  # after what is loaded once, before the forecast's clock
        whole = not (e.run.folder / "stages").exists()
        forecast = Forecast((images * step + more * call) / world, sweep, images, e.run.device, whole)
        training, sweeping = duration(forecast.training), duration(sweep)
        together = f"about {duration(forecast.total)}, report and pipelines included"
    lines = [
        e.title,
        f"  network   {weights / 1e6:.2f} M weights" + (f", {trained / 1e6:.2f} M trained" if trained < weights else ""),
        f"  data      {e.data.name}: {len(e.data.images):,} {'prompts, samples' if e.data.imageless else 'images'}"
        f" of {shapes_text(e.data)}"
        + ("; time and memory are those of the largest" if isinstance(e.data.images, Buckets) else ""),
        f"  training  {images:,} images{'' if images == asked else f' (whole batches; asked for {asked:,})'}"
        f" in {plural(len(budgets), 'stage')}, batch {budgets[0].batch_size}:"
        f" about {training}",
        f"  sweep     {e.config.images:,} images per cell: about {sweeping}",
        f"  together  {together}",
        f"  memory    about {memory_text(needed, rest)} in each of {plural(world, 'process')}",
        *([f"  fits      {batches_text(needed, len(x0))} at once in a process"] if c.dry_run else []),
        f"  disk      about {gigabytes(e.disk)}",
        *([] if reason is None else [f"  exports   no diffusers pipeline: {reason}"]),
        f"  output    {e.run.folder}\n",
    ]
    return lines, forecast


def _memory(
    e: Experiment, method: Method, budgets: list[Optimization], x0: torch.Tensor, cond: dict[str, torch.Tensor]
) -> tuple[Cost, float]:
    """Return the memory of a process in training, and the bytes that it holds beside it. A ladder also keeps the student of the stage
    before."""
    nets = {id(net): net for net in _networks(e)}
    distinct = {place_of(weight): weight for net in nets.values() for weight in (*net.parameters(), *net.buffers())}
    held = [size_of(distinct.values())]  # a base is shared by the networks with its adapters
    rest = resident_bytes(e.run.device) - (0 if e.student.hollow else sum(held))
    if len(budgets) > 1:
        held.append(size_of(e.student.parametric.net.state_dict().values()))
    student = e.student.student()
    with once(*_networks(e)):  # of which this student is no copy
        needed = training_memory(
            method, student, x0, cond, e.run.accelerator,
            frozen=sum(held), averaged=bool(budgets[0].ema_halflife_images), adam_bytes=ADAM[e.config.optimizer],
        )  # fmt: skip
    return needed, rest


def _networks(e: Experiment) -> list[torch.nn.Module]:
    """Return the networks of a target: the teacher's, and that of a student that teaches the next one."""
    models = [model.denoiser for model in (e.teacher, e.student) if model is not None]
    return [model.net for model in models if isinstance(model, Denoiser)]
