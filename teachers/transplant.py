"""Latents: a model in the pipeline it came from, network and scheduler exchanged, autoencoder and text encoders its own.

On a discrete table of T entries the steps are T, T (1 - 1/N), ...: a `DDIMScheduler` on "trailing" timesteps, or with fresh noise
between them a `TCDScheduler`, whose gamma is the ``eta`` of the call (of text pipelines: the others draw noise that no
generator determines). On a flow they are those of a `FlowMatchEulerDiscreteScheduler`
for each step count, whose grid is stretched to end at 1/N. No pipeline of these can be told other times.
"""

from __future__ import annotations

import inspect
import math
from pathlib import Path
from typing import Any

import torch

from distill.grid import uniform
from distill.schedule import Flow, Table
from distill.solver import gamma_of
from teachers.load import Teacher
from teachers.pixels import betas, check_table, exact_steps, scheduler_of
from teachers.scheduler import PREDICTIONS
from teachers.stock import NETWORKS
from teachers.unet import UNet

UNUSED = ("safety_checker", "feature_extractor", "image_encoder")


def check(model: Teacher) -> None:
    """ValueError, in one line, where the pipeline it came from cannot carry the model."""
    d, name = model.parametric, model.sampler.get("name", "ddim")
    if not isinstance(d.net, (UNet, *NETWORKS.values())) or name == "jump":
        raise ValueError("a latent model is exported in the pipeline it came from, and this network or sampler is not of it")
    steps, gamma = steps_of(model), gamma_of(name)
    if isinstance(d.schedule, Flow) and d.prediction == "flow" and d.time == "thousand_time":
        if gamma and max(steps) > 1:
            raise ValueError(
                f"flow pipelines take no noise between their steps, as {name} does: a model made with --sampler ddim"
            )
        return
    check_table(model)
    if gamma and max(steps) > 1 and model.table is None:
        raise ValueError(
            f"a {_class(model).__name__} draws noise by no generator, {name} needs some: a model made with --sampler ddim"
        )
    schedule = d.schedule
    assert isinstance(schedule, Table)
    for n in steps:
        if schedule.steps % n or not torch.equal(model.times(n), uniform(schedule, n)) or not _meets(schedule.steps, n, gamma):
            raise ValueError(
                f"{n} steps of {name} do not meet the {schedule.steps} entries of this model's table: export others"
            )


def _meets(entries: int, steps: int, gamma: float) -> bool:
    """Whether the noise levels from which gamma-sampling goes back are those of `TCDScheduler`, which rounds."""
    stops = [entries // steps * j for j in range(1, steps)]
    return all(math.floor((1 - gamma) * (s - 1)) == round((1 - gamma) * s - 1, 9) for s in stops) if gamma else True


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
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging

    from teachers.pipeline import fetch, read_json

    logging.disable_progress_bar()
    assert model.codec is not None
    net: Any = model.parametric.net
    folder = fetch(model.codec.source["folder"])
    index = read_json(folder / "model_index.json", "no diffusers pipeline")
    parts = {
        "unet" if "unet" in index else "transformer": net.unet if isinstance(net, UNet) else net.net,
        "scheduler": table_scheduler(model, steps) if only is None else flow_scheduler(only),
        model.codec.source["part"]: model.codec.network,
        **{name: None for name in UNUSED if name in index},
    }
    return DiffusionPipeline.from_pretrained(
        folder, **parts, trust_remote_code=False, use_safetensors=True, local_files_only=True
    )


def flow_scheduler(steps: int) -> Any:
    """Of 1, 1 - 1/N, ..., 1/N, 0, whatever shift the teacher's pipeline had."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    options: dict[str, Any] = {} if steps == 1 else {"shift_terminal": 1 / steps}
    return FlowMatchEulerDiscreteScheduler(**options)


def table_scheduler(model: Teacher, steps: list[int]) -> Any:
    from diffusers import TCDScheduler

    d = model.parametric
    assert isinstance(d.schedule, Table)
    if not gamma_of(model.sampler.get("name", "ddim")) or max(steps) == 1:
        return scheduler_of(d.schedule, d.prediction)
    table = torch.tensor(d.schedule.alphas_cumprod, dtype=torch.float64)
    table[0] = 1.0  # where the last step ends: the data
    name = {v: k for k, v in PREDICTIONS.items()}[d.prediction]
    return TCDScheduler(
        num_train_timesteps=len(table), trained_betas=betas(table), prediction_type=name, clip_sample=False,
        original_inference_steps=math.lcm(*steps),
    )  # fmt: skip


def call(model: Teacher, labels: list[int] | None, n: int) -> dict[str, Any]:
    """What the pipeline is called with for ``n`` images of these labels or prompts, beside steps and generators."""
    parameters, gamma = inspect.signature(_class(model).__call__).parameters, gamma_of(model.sampler.get("name", "ddim"))
    usual = {"guidance_scale": 1.0, "eta": gamma, "clean_caption": False, "use_resolution_binning": False}
    if model.table is not None:
        told: dict[str, Any] = {"prompt": [model.record["prompts"][i] for i in labels or []]}
    else:
        told = {"batch_size": n} if labels is None else {"class_labels": labels}
    return told | {name: value for name, value in usual.items() if name in parameters}


def _class(model: Teacher) -> Any:
    import diffusers

    from teachers.pipeline import fetch, read_json

    assert model.codec is not None
    folder = fetch(model.codec.source["folder"])
    return getattr(diffusers, read_json(Path(folder) / "model_index.json", "no diffusers pipeline")["_class_name"])
