"""Latent and text-to-image students: the teacher's own diffusers pipeline, with network and scheduler replaced.

On a discrete table of T entries the times are T, T (1 - 1/N), ...: a `DDIMScheduler` with "trailing" timesteps. With fresh noise
between the steps it is a `TCDScheduler`, whose gamma is the ``eta`` of the call. Only text-to-image pipelines pass ``eta`` and the
generators on. On a flow each step count has its `FlowMatchEulerDiscreteScheduler`, with a grid stretched to end at 1/N.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch

from distill.grid import uniform
from distill.schedule import Flow, Table
from teachers.diffusers_pipeline import SCALES
from teachers.export.pixel import check_table, scheduler_of, steps_of, tcd_of
from teachers.hub import assemble, fetch, read_json
from teachers.networks.records import RECORDS
from teachers.networks.unet import UNet
from teachers.teacher import Teacher


def check(model: Teacher) -> None:
    """Raise ValueError if the pipeline of the model's autoencoder cannot hold the model."""
    d, sampling = model.parametric, model.sampling
    home, _, kind = origin(model)
    accepted = RECORDS if kind == "Transformer2DModel" else (kind,)  # as older folders of DiT and PixArt have it
    takes_labels = "class_labels" in inspect.signature(home.__call__).parameters
    conditions = "nothing" if model.classes is None else "labels" if model.embeddings is None else "prompts"
    if type(inner(model)).__name__ not in accepted or sampling.two_times or takes_labels != (conditions == "labels"):
        raise ValueError(
            f"the autoencoder's pipeline is a {home.__name__}, which cannot hold a {type(inner(model)).__name__} conditioned on "
            f"{conditions} and sampled by {sampling.label}"
        )
    if model.embeddings is not None and not model.embeddings.prompts:
        raise ValueError("this model has no prompts to compare a pipeline on: accepted is MODEL,prompts=FILE")
    steps = steps_of(model)
    if wrong := [n for n in steps if not torch.equal(model.times(n), uniform(d.schedule, n))]:
        raise ValueError(f"no pipeline supports the time grid of {wrong[0]} steps; accepted is a model on the uniform grid")
    flow = isinstance(d.schedule, Flow) and d.prediction == "flow" and d.time == "thousand_time"
    if not flow:
        check_table(model)
    if noisy(model) and (flow or model.embeddings is None):
        reason = "flow pipelines add no noise between steps" if flow else f"a {home.__name__} draws noise without a generator"
        raise ValueError(f"{reason}, but {sampling.label} needs it; accepted is a model made with --sampler ddim")
    if isinstance(d.schedule, Table):
        entries = d.schedule.steps
        if wrong := [n for n in steps if entries % n or not _on_entries(entries, n, sampling.fresh)]:
            raise ValueError(
                f"{wrong[0]} steps of {sampling.label} do not meet the {entries} entries of the table; accepted are other step counts"
            )


def _on_entries(entries: int, steps: int, gamma: float) -> bool:
    """Return whether `TCDScheduler`, which rounds, adds fresh noise from the same entries as gamma-sampling."""
    if gamma in (0, 1):  # no fresh noise, or from the data, which are at entry 0
        return True
    passed = [(1 - gamma) * (entries // steps * j) - 1 for j in range(1, steps)]
    return all(p >= 1 and math.floor((1 - gamma) * (entries // steps * j - 1)) == round(p, 9) for j, p in enumerate(passed, 1))


def pipelines(model: Teacher) -> dict[str, tuple[list[int], int | None]]:
    """Return the pipelines of a model, {name: (accepted step counts, the only one or None)}."""
    steps = steps_of(model)
    if isinstance(model.denoiser.schedule, Table):
        return {"pipeline": (steps, None)}
    return {f"pipeline-{n}" if i else "pipeline": ([n], n) for i, n in enumerate(sorted(steps))}


def stock(model: Teacher, steps: list[int], only: int | None) -> Any:
    """Return the diffusers pipeline. ``only``: its only step count, on a flow. Raises ValueError if the original is gone."""
    from diffusers.utils import logging

    logging.disable_progress_bar()
    assert model.codec is not None
    home, part, _ = origin(model)
    network = inner(model)
    if model.guidance is not None:
        network.register_to_config(**{SCALES: model.guidance.describe()})
    parts = {
        part: network,
        "scheduler": table_scheduler(model, steps) if only is None else flow_scheduler(only),
        model.codec.source["part"]: model.codec.network,
    }
    variant = model.codec.source.get("variant")
    return assemble(home, fetch(model.codec.source["folder"], variant), parts, variant)


def flow_scheduler(steps: int) -> Any:
    """Return a scheduler of the times 1, 1 - 1/N, ..., 1/N, 0, without the shift of the teacher's pipeline."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    options: dict[str, Any] = {} if steps == 1 else {"shift_terminal": 1 / steps}
    return FlowMatchEulerDiscreteScheduler(**options)


def table_scheduler(model: Teacher, steps: list[int]) -> Any:
    """Return the scheduler of a model on a discrete table, for all of its step counts.

    Its ``steps_offset`` is 1, as Stable Diffusion's pipelines want it; they warn of another one. No time depends on it here.
    """
    d = model.parametric
    assert isinstance(d.schedule, Table)
    if noisy(model):
        table = torch.tensor(d.schedule.alphas_cumprod, dtype=torch.float64)
        table[0] = 1.0  # the last step ends here, at the data
        scheduler = tcd_of(table, math.lcm(*steps), d.prediction)
    else:
        scheduler = scheduler_of(d.schedule, d.prediction)
    scheduler.register_to_config(steps_offset=1)
    return scheduler


def call(model: Teacher, labels: list[int] | None, n: int) -> dict[str, Any]:
    """Return the arguments of the pipeline for ``n`` images of these labels or prompts, other than steps and generators."""
    record, fixed = RECORDS.get(type(inner(model)).__name__), getattr(model.parametric.net, "guidance", None)
    unguided = record.unguided if record and model.guidance is None else model.own_scale
    height, width = model.image_shape[1:]
    scale = unguided if fixed is None else fixed
    options: dict[str, Any] = {"guidance_scale": scale, "clean_caption": False, "use_resolution_binning": False}
    options |= {"true_cfg_scale": 1.0, "height": height, "width": width}
    if noisy(model):
        options["eta"] = model.sampling.fresh
    if model.embeddings is not None:
        images: dict[str, Any] = {"prompt": [model.embeddings.prompts[i] for i in labels or []]}
    else:
        images = {"batch_size": n} if labels is None else {"class_labels": labels}
    parameters = inspect.signature(origin(model)[0].__call__).parameters
    return images | {name: value for name, value in options.items() if name in parameters}


def noisy(model: Teacher) -> bool:
    """Return whether any step count draws fresh noise between its steps."""
    return model.sampling.fresh > 0 and max(steps_of(model)) > 1


def inner(model: Teacher) -> Any:
    """Return the diffusers network inside the model's network."""
    net: Any = model.parametric.net
    return net.unet if isinstance(net, UNet) else getattr(net, "net", net)


def origin(model: Teacher) -> tuple[Any, str, str]:
    """Return the class of the autoencoder's pipeline, and the component name and class of its network.

    Raises ValueError if the pipeline is gone.
    """
    import diffusers

    assert model.codec is not None
    if "folder" not in model.codec.source:
        raise ValueError("this model's autoencoder has no source; accepted for export is one from a diffusers pipeline")
    folder = fetch(model.codec.source["folder"], model.codec.source.get("variant"))
    index = read_json(folder / "model_index.json", "no diffusers pipeline")
    part = "unet" if "unet" in index else "transformer"
    return getattr(diffusers, index["_class_name"]), part, index[part][1]
