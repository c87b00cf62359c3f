"""Pixels: a UNet2DModel in diffusers' `ConsistencyModelPipeline`, which takes any scheduler.

A `DDIMScheduler` on "trailing" timesteps visits, on a table of T entries, T, T (1 - 1/N), ..., the uniform grid of the ladders. Any
other step times are baked in: the network's time embedding becomes a learned one with an entry for each of them, and the scheduler's
table has these entries alone, so that the pipeline, asked for that many steps, can take no others. Consistency sampling, which adds
noise between its steps, is baked the same way with a `TCDScheduler`, whose own gamma is 0.3: any other is reached by what the table
says of the levels it passes.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
from torch import Tensor

from distill.denoiser import TIMES
from distill.grid import uniform
from distill.schedule import Table
from distill.solver import gamma_of, lower
from teachers.load import Teacher
from teachers.scheduler import NAMES
from teachers.unet import UNet


def check(model: Teacher) -> None:
    """ValueError, in one line, where no stock class carries the model."""
    d = model.parametric
    if not isinstance(d.net, UNet):
        raise ValueError("of models of pixels only those of a UNet2DModel can be exported as a diffusers pipeline")
    check_table(model)
    kind = d.net.unet.config["time_embedding_type"]  # type: ignore[index]
    if kind != "positional" and any(needs_baking(model, n) for n in model.sampler.get("steps", [])):
        raise ValueError(f"step times can be baked into positional time embeddings, not {kind}")


def check_table(model: Teacher) -> None:
    d = model.parametric
    if not isinstance(d.schedule, Table) or d.time != "index" or d.prediction not in NAMES:
        raise ValueError(
            "a diffusers pipeline needs a discrete table, the time convention 'index' and a prediction of "
            f"{', '.join(NAMES)}; this model has {type(d.schedule).__name__}, {d.time!r}, {d.prediction!r} "
            "(--student table makes a student of it that has them)"
        )


def needs_baking(model: Teacher, steps: int) -> bool:
    """Whether this step count takes other times or another scheduler than DDIM on the model's own table."""
    schedule = model.parametric.schedule
    assert isinstance(schedule, Table)
    if model.parametric.net.two_times or (steps > 1 and gamma_of(model.sampler.get("name", "ddim"))):
        return True
    return bool(schedule.steps % steps) or not torch.equal(model.times(steps), uniform(schedule, steps))


def exact_steps(model: Teacher) -> list[int]:
    """Powers of two up to 64 at which a model that takes any step count meets its table exactly."""
    schedule = model.parametric.schedule
    assert isinstance(schedule, Table)
    return [n for n in (1, 2, 4, 8, 16, 32, 64) if schedule.steps % n == 0]


def pipelines(model: Teacher) -> dict[str, tuple[list[int], int | None]]:
    """Which pipelines carry a model: name -> (the step counts it takes, the one whose times are baked in or None)."""
    made = model.sampler.get("steps") or exact_steps(model)
    baking = sorted(n for n in made if needs_baking(model, n))
    plain = [n for n in made if n not in baking]
    out: dict[str, tuple[list[int], int | None]] = {"pipeline": (plain, None)} if plain else {}
    for n in baking:
        out[f"pipeline-{n}" if out else "pipeline"] = ([n], n)
    return out


def stock(model: Teacher, steps: list[int], baked_in: int | None) -> Any:
    """The diffusers pipeline, ready to be saved. ``baked_in``: the one step count whose times are baked in."""
    from diffusers import ConsistencyModelPipeline

    d = model.parametric
    assert isinstance(d.schedule, Table)
    unet, scheduler = baked(model, baked_in) if baked_in else (d.net.unet, scheduler_of(d.schedule, d.prediction))
    return ConsistencyModelPipeline(unet=unet, scheduler=scheduler)  # type: ignore[arg-type]


def call(model: Teacher, labels: list[int] | None, n: int) -> dict[str, Any]:
    """What the pipeline is called with for ``n`` images of these labels, beside steps and generators."""
    return {"batch_size": n, **({} if labels is None else {"class_labels": labels})}


def scheduler_of(schedule: Table, prediction: str):
    """A DDIMScheduler on the table: by its usual name where that gives the same table, else by its betas."""
    from diffusers import DDIMScheduler

    table = torch.tensor(schedule.alphas_cumprod, dtype=torch.float64)
    fixed = {
        "num_train_timesteps": schedule.steps,
        "prediction_type": NAMES[prediction],
        "timestep_spacing": "trailing",
        "clip_sample": False,
    }
    for beta_schedule in ("squaredcos_cap_v2", "linear", "scaled_linear"):
        for zero_snr in (False, True):
            candidate: Any = DDIMScheduler(beta_schedule=beta_schedule, rescale_betas_zero_snr=zero_snr, **fixed)
            if torch.allclose(candidate.alphas_cumprod.double(), table, rtol=0, atol=1e-9):
                return candidate
    return DDIMScheduler(trained_betas=betas(table), **fixed)


@torch.no_grad()
def baked(model: Teacher, steps: int) -> tuple[Any, Any]:
    """The network and the scheduler of exactly these steps: an entry of a new table, and of a learned time embedding, for each."""
    d, grid, name = model.parametric, model.times(steps).flip(0), model.sampler.get("name", "ddim")
    net: Any = d.net
    unet: Any = net.unet
    told = TIMES[d.time](d.schedule, grid).float().to(unet.device)
    times, embedding = grid[1:], net.embedding(told[1:], told[:-1] if name == "jump" else None)
    table = d.schedule.alpha(times).square()
    gamma = gamma_of(name) if steps > 1 else 0.0
    if gamma:
        below = d.schedule.alpha(lower(d.schedule, times[:-1], gamma)).square()
        table, original, place = tcd_table(table, below)
        scheduler = tcd_of(table, original, d.prediction)
        embedding = embedding[place]
    else:
        scheduler = scheduler_of(Table(tuple(table.tolist())), d.prediction)
    twin = type(unet)(**{**unet.config, "time_embedding_type": "learned", "num_train_timesteps": len(embedding)})
    weights = {k: v for k, v in unet.state_dict().items() if not k.startswith("time_proj.")}
    twin.load_state_dict(weights | {"time_proj.weight": embedding})
    return twin.eval(), scheduler


def tcd_table(visited: Tensor, below: Tensor) -> tuple[Tensor, int, Tensor]:
    """A table of alphas_cumprod in which a `TCDScheduler` of n steps goes from entry to entry of ``visited`` [n], from the data on, by
    way of ``below`` [n - 1]; its ``original_inference_steps``; and which visited one each entry belongs to.

    Of M original steps, k entries apart, it visits n; on the way to each but the highest it passes floor((1 - eta) entry), with the eta
    of 0.3 that no stock pipeline can change; and it ends at entry 0, the data. M and k are the first that keep all these apart.
    """
    n = len(visited)
    for original, k in product(range(n, 4 * n), range(1, 40)):
        stops = (original - torch.arange(n) * original // n).flip(0) * k - 1
        passed = torch.floor(0.7 * stops[:-1]).long()
        if len({0, *stops.tolist(), *passed.tolist()}) == 2 * n:
            break
    else:
        raise ValueError(f"{n} steps with fresh noise do not fit a stock scheduler: export fewer")
    last = torch.searchsorted(stops, torch.arange(original * k), right=True) - 1
    place = last.clamp(min=0)  # of entries that are never visited: the last visited one below
    table = visited[place].clone()
    table[passed] = below
    table[0] = 1.0
    return table, original, place


def tcd_of(table: Tensor, original: int, prediction: str) -> Any:
    from diffusers import TCDScheduler

    return TCDScheduler(
        num_train_timesteps=len(table), trained_betas=betas(table), prediction_type=NAMES[prediction], clip_sample=False,
        original_inference_steps=original,
    )  # fmt: skip


def betas(table: Tensor) -> list[float]:
    """1 - alphas_cumprod[k] / alphas_cumprod[k - 1]."""
    return (1 - table / torch.cat([torch.ones(1, dtype=table.dtype), table[:-1]])).tolist()
