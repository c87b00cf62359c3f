"""Latents: a model in the pipeline it came from, network and scheduler exchanged, autoencoder and text encoders its own.

On a discrete table of T entries the steps are T, T (1 - 1/N), ...: a `DDIMScheduler` on "trailing" timesteps, or with fresh noise
between them a `TCDScheduler`, whose gamma is the ``eta`` of the call (of text pipelines: the others draw noise that no
generator determines). On a flow they are those of a `FlowMatchEulerDiscreteScheduler`
for each step count, whose grid is stretched to end at 1/N.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch

from distill.grid import uniform
from distill.schedule import Flow, Table
from distill.solver import gamma_of
from teachers.load import Teacher
from teachers.pixels import check_table, exact_steps, scheduler_of, tcd_of
from teachers.stock import NETWORKS
from teachers.text import UNUSED
from teachers.unet import UNet


def check(model: Teacher) -> None:
    """ValueError, in one line, where the pipeline it came from cannot carry the model."""
    d, name = model.parametric, model.sampler.get("name", "ddim")
    home, _, kind = origin(model)
    accepted = NETWORKS if kind == "Transformer2DModel" else (kind,)  # what older folders of DiT and PixArt name
    takes_labels = "class_labels" in inspect.signature(home.__call__).parameters
    if type(inner(model)).__name__ not in accepted or name == "jump" or takes_labels != (_told(model) == "labels"):
        raise ValueError(
            f"the autoencoder came with a {home.__name__}, which cannot carry a {type(inner(model)).__name__} that is told "
            f"{_told(model)} and sampled by {name}"
        )
    if model.table is not None and "prompts" not in model.record:
        raise ValueError("this model does not know the prompts it was made with: it can be exported as safetensors only")
    steps, gamma = steps_of(model), gamma_of(name)
    if wrong := [n for n in steps if not torch.equal(model.times(n), uniform(d.schedule, n))]:
        raise ValueError(
            f"{wrong[0]} steps at times of their own, which no pipeline keeps: a model on the uniform grid is accepted"
        )
    if isinstance(d.schedule, Flow) and d.prediction == "flow" and d.time == "thousand_time":
        if gamma and max(steps) > 1:
            raise ValueError(
                f"flow pipelines take no noise between their steps, as {name} does: a model made with --sampler ddim"
            )
        return
    check_table(model)
    if gamma and max(steps) > 1 and model.table is None:
        raise ValueError(f"a {home.__name__} draws noise by no generator, {name} needs some: a model made with --sampler ddim")
    schedule = d.schedule
    assert isinstance(schedule, Table)
    for n in steps:
        if schedule.steps % n or not _meets(schedule.steps, n, gamma):
            raise ValueError(
                f"{n} steps of {name} do not meet the {schedule.steps} entries of this model's table: export others"
            )


def _meets(entries: int, steps: int, gamma: float) -> bool:
    """Whether the noise levels from which gamma-sampling goes back are those of `TCDScheduler`, which rounds."""
    if gamma in (0, 1):  # none, and the data, which stand at entry 0
        return True
    passed = [(1 - gamma) * (entries // steps * j) - 1 for j in range(1, steps)]
    return all(p >= 1 and math.floor((1 - gamma) * (entries // steps * j - 1)) == round(p, 9) for j, p in enumerate(passed, 1))


def steps_of(model: Teacher) -> list[int]:
    given = model.sampler.get("steps")
    return given or (exact_steps(model) if isinstance(model.denoiser.schedule, Table) else [1, 2, 4, 8, 16, 32, 64])


def pipelines(model: Teacher) -> dict[str, tuple[list[int], int | None]]:
    """Name -> (the step counts it takes, the one that it alone takes or None)."""
    steps = steps_of(model)
    if isinstance(model.denoiser.schedule, Table):
        return {"pipeline": (steps, None)}
    return {f"pipeline-{n}" if i else "pipeline": ([n], n) for i, n in enumerate(sorted(steps))}


def stock(model: Teacher, steps: list[int], only: int | None) -> Any:
    """The diffusers pipeline, ready to be saved. ValueError where that of its origin is gone."""
    from diffusers.utils import logging

    from teachers.pipeline import fetch

    logging.disable_progress_bar()
    assert model.codec is not None
    home, part, _ = origin(model)
    unused = {name: None for name in UNUSED if name in inspect.signature(home.__init__).parameters}
    parts = {
        part: inner(model),
        "scheduler": table_scheduler(model, steps) if only is None else flow_scheduler(only),
        model.codec.source["part"]: model.codec.network,
    }
    options = {"trust_remote_code": False, "use_safetensors": True, "local_files_only": True}
    return home.from_pretrained(fetch(model.codec.source["folder"]), **parts, **unused, **options)


def flow_scheduler(steps: int) -> Any:
    """Of 1, 1 - 1/N, ..., 1/N, 0, whatever shift the teacher's pipeline had."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    options: dict[str, Any] = {} if steps == 1 else {"shift_terminal": 1 / steps}
    return FlowMatchEulerDiscreteScheduler(**options)


def table_scheduler(model: Teacher, steps: list[int]) -> Any:
    d = model.parametric
    assert isinstance(d.schedule, Table)
    if not noisy(model):
        return scheduler_of(d.schedule, d.prediction)
    table = torch.tensor(d.schedule.alphas_cumprod, dtype=torch.float64)
    table[0] = 1.0  # where the last step ends: the data
    return tcd_of(table, math.lcm(*steps), d.prediction)


def call(model: Teacher, labels: list[int] | None, n: int) -> dict[str, Any]:
    """What the pipeline is called with for ``n`` images of these labels or prompts, beside steps and generators."""
    usual: dict[str, Any] = {"guidance_scale": 1.0, "clean_caption": False, "use_resolution_binning": False}
    if noisy(model):
        usual["eta"] = gamma_of(model.sampler["name"])
    if model.table is not None:
        told: dict[str, Any] = {"prompt": [model.record["prompts"][i] for i in labels or []]}
    else:
        told = {"batch_size": n} if labels is None else {"class_labels": labels}
    parameters = inspect.signature(origin(model)[0].__call__).parameters
    return told | {name: value for name, value in usual.items() if name in parameters}


def noisy(model: Teacher) -> bool:
    """Whether there is fresh noise between its steps."""
    return gamma_of(model.sampler.get("name", "ddim")) > 0 and max(steps_of(model)) > 1


def inner(model: Teacher) -> Any:
    """diffusers' own network."""
    net: Any = model.parametric.net
    return net.unet if isinstance(net, UNet) else getattr(net, "net", net)


def _told(model: Teacher) -> str:
    return "no label" if model.classes is None else "labels" if model.table is None else "prompts"


def origin(model: Teacher) -> tuple[Any, str, str]:
    """The class of the pipeline that the autoencoder came with, and the name and class of its network. ValueError where it is gone."""
    import diffusers

    from teachers.pipeline import fetch, read_json

    assert model.codec is not None
    if "folder" not in model.codec.source:
        raise ValueError("the autoencoder of this model came from no pipeline, in which it could be exported")
    index = read_json(fetch(model.codec.source["folder"]) / "model_index.json", "no diffusers pipeline")
    part = "unet" if "unet" in index else "transformer"
    return getattr(diffusers, index["_class_name"]), part, index[part][1]
