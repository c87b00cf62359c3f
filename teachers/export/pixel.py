"""Pixel-space students: a UNet2DModel in diffusers' `ConsistencyModelPipeline`, which accepts any scheduler.

On a table of T entries, a `DDIMScheduler` with "trailing" timesteps visits T, T (1 - 1/N), ...: the uniform grid. Any other time grid
is baked in. The network gets a learned time embedding with one entry per step, and the scheduler's table has these entries only, so
that the pipeline accepts this step count alone. A guidance scale is baked in likewise. Consistency sampling adds noise between its
steps. It is baked in with a `TCDScheduler`, whose gamma is fixed at 0.3; other gammas are reached through the noise levels that the
table has at the entries between.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
from torch import Tensor

from distill.denoiser import TIMES
from distill.grid import uniform
from distill.samplers import partial_noise_time
from distill.schedule import Table
from teachers.diffusers_scheduler import NAMES
from teachers.networks.unet import UNet
from teachers.teacher import Teacher


def check(model: Teacher) -> None:
    """Raise ValueError if no stock pipeline can hold the model."""
    d = model.parametric
    if not isinstance(d.net, UNet):
        raise ValueError("accepted for export as a diffusers pipeline are pixel-space models with a UNet2DModel")
    check_table(model)
    kind = d.net.unet.config["time_embedding_type"]  # type: ignore[index]
    if kind != "positional" and any(needs_baking(model, n) for n in model.sampling.steps):
        raise ValueError(f"this time grid can be exported only with positional time embeddings, not {kind} ones")


def check_table(model: Teacher) -> None:
    """Raise ValueError unless the model has a discrete table, and the time input and prediction of diffusers."""
    d = model.parametric
    if not isinstance(d.schedule, Table) or d.time != "index" or d.prediction not in NAMES:
        raise ValueError(
            f"a diffusers pipeline needs a discrete table, time 'index' and a prediction among {', '.join(NAMES)}; this model has "
            f"{type(d.schedule).__name__}, {d.time!r}, {d.prediction!r} (--student table distils it into a student that fits)"
        )


def needs_baking(model: Teacher, steps: int) -> bool:
    """Return whether a step count needs other times or another scheduler than DDIM on the model's own table."""
    schedule = model.parametric.schedule
    assert isinstance(schedule, Table)
    net: Any = model.parametric.net
    if net.two_times or net.guided or net.slow is not None or (steps > 1 and model.sampling.fresh):
        return True
    return bool(schedule.steps % steps) or not torch.equal(model.times(steps), uniform(schedule, steps))


def steps_of(model: Teacher) -> list[int]:
    """Return the step counts to export: a student's own, else the powers of two up to 64 that divide a discrete table."""
    schedule = model.denoiser.schedule
    powers = [2**k for k in range(7)]
    return list(model.sampling.steps) or [n for n in powers if not isinstance(schedule, Table) or schedule.steps % n == 0]


def pipelines(model: Teacher) -> dict[str, tuple[list[int], int | None]]:
    """Return the pipelines of a model, {name: (accepted step counts, the one that is baked in or None)}.

    Raises ValueError for a student with heads that takes several steps only: stock networks have one last layer for all steps.
    """
    made = steps_of(model)
    if getattr(model.parametric.net, "heads", False):
        if 1 not in made:
            raise ValueError(f"a student with heads has a stock pipeline for 1 step, and this one takes {made} steps")
        made = [1]
    baking = sorted(n for n in made if needs_baking(model, n))
    plain = [n for n in made if n not in baking]
    out: dict[str, tuple[list[int], int | None]] = {"pipeline": (plain, None)} if plain else {}
    for n in baking:
        out[f"pipeline-{n}" if out else "pipeline"] = ([n], n)
    return out


def stock(model: Teacher, steps: list[int], baked_in: int | None) -> Any:
    """Return the diffusers pipeline. ``baked_in``: the step count whose times are baked in, or None."""
    from diffusers import ConsistencyModelPipeline

    d = model.parametric
    assert isinstance(d.schedule, Table)
    unet, scheduler = baked(model, baked_in) if baked_in else (d.net.unet, scheduler_of(d.schedule, d.prediction))
    return ConsistencyModelPipeline(unet=unet, scheduler=scheduler)  # type: ignore[arg-type]


def call(model: Teacher, labels: list[int] | None, n: int) -> dict[str, Any]:
    """Return the arguments of the pipeline for ``n`` images of these labels, other than steps and generators."""
    return {"batch_size": n, **({} if labels is None else {"class_labels": labels})}


def scheduler_of(schedule: Table, prediction: str) -> Any:
    """Return a DDIMScheduler with this table, by a named beta schedule if one gives it, else by its betas."""
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
    """Return the network and the scheduler of one time grid, with one entry per step in the table and in a learned embedding."""
    d, grid, sampling = model.parametric, model.times(steps).flip(0), model.sampling
    net: Any = d.net
    unet: Any = net.unet
    c_noise = TIMES[d.time](d.schedule, grid).float().to(unet.device)
    scale = None if model.guidance is None else torch.full_like(c_noise[1:], model.guidance.scale)
    times, embedding = grid[1:], net.embedding(c_noise[1:], c_noise[:-1] if sampling.two_times else None, scale)
    table = d.schedule.alpha(times).square()
    if sampling.fresh and steps > 1:
        below = d.schedule.alpha(partial_noise_time(d.schedule, times[:-1], sampling.fresh)).square()
        table, original, place = tcd_table(table, below)
        scheduler = tcd_of(table, original, d.prediction)
        embedding = embedding[place]
    else:
        scheduler = scheduler_of(Table(tuple(table.tolist())), d.prediction)
    twin = type(unet)(**{**unet.config, "time_embedding_type": "learned", "num_train_timesteps": len(embedding)})
    weights = {k: v for k, v in unet.state_dict().items() if not k.startswith("time_proj.")} | {"time_proj.weight": embedding}
    if net.heads:
        weights = {k: v for k, v in weights.items() if not k.startswith("conv_out.")}
        fused = unet.conv_out.fused(unet.conv_out.weights_of(c_noise[1:], c_noise[:-1], None)[0])
        weights |= dict(zip(("conv_out.weight", "conv_out.bias"), fused, strict=True))
    twin.load_state_dict(weights)
    return twin.eval(), scheduler


def tcd_table(visited: Tensor, below: Tensor) -> tuple[Tensor, int, Tensor]:
    """Return a table with which a `TCDScheduler` of n steps visits the wanted noise levels, all as alphas_cumprod.

    ``visited`` [n]: the entries at which the network is evaluated, the cleanest first. ``below`` [n - 1]: the entries from which fresh
    noise is added to reach ``visited[:-1]``. Also returns the scheduler's ``original_inference_steps`` and, for each entry of the table,
    the index of the visited one that it belongs to.

    Of M original steps, k entries apart, the scheduler visits n. On the way to each but the highest it passes floor((1 - eta) entry),
    where eta is 0.3 and no stock pipeline can change it. It ends at entry 0, the data. M and k are the smallest that keep all these
    entries distinct. Raises ValueError if there are none.
    """
    n = len(visited)
    for original, k in product(range(n, 4 * n), range(1, 40)):
        stops = (original - torch.arange(n) * original // n).flip(0) * k - 1
        passed = torch.floor(0.7 * stops[:-1]).long()
        if len({0, *stops.tolist(), *passed.tolist()}) == 2 * n:
            break
    else:
        raise ValueError(f"{n} steps with fresh noise do not fit a stock scheduler; accepted are fewer steps")
    last = torch.searchsorted(stops, torch.arange(original * k), right=True) - 1
    place = last.clamp(min=0)  # an entry that is not visited belongs to the visited one below it
    table = visited[place].clone()
    table[passed] = below
    table[0] = 1.0
    return table, original, place


def tcd_of(table: Tensor, original: int, prediction: str) -> Any:
    """Return a `TCDScheduler` with this table of alphas_cumprod."""
    from diffusers import TCDScheduler

    return TCDScheduler(
        num_train_timesteps=len(table), trained_betas=betas(table), prediction_type=NAMES[prediction], clip_sample=False,
        original_inference_steps=original,
    )  # fmt: skip


def betas(table: Tensor) -> list[float]:
    """Return 1 - alphas_cumprod[k] / alphas_cumprod[k - 1]."""
    return (1 - table / torch.cat([torch.ones(1, dtype=table.dtype), table[:-1]])).tolist()
