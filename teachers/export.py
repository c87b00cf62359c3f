"""A model as a diffusers pipeline of stock classes, and the proof that it gives the same pixels.

A class-conditional or unconditional UNet2DModel goes into `ConsistencyModelPipeline`, which takes any scheduler, with a
`DDIMScheduler` on "trailing" timesteps: on a table of T entries that visits T, T (1 - 1/N), ..., the uniform grid of the ladders.
Any other step times are baked in: the network's time embedding becomes a learned one with an entry for each of them, and the
scheduler's table has these entries alone, so that the pipeline, asked for that many steps, can take no others. Consistency
sampling, which adds noise between its steps, is baked the same way with a `TCDScheduler`, whose own gamma is 0.3: any other is
reached by what the table says of the levels it passes.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.denoiser import TIMES
from distill.grid import uniform
from distill.schedule import Table
from distill.solver import gamma_of, lower, named, stochastic
from teachers.load import Teacher
from teachers.scheduler import PREDICTIONS
from teachers.unet import UNet

TOLERANCE = 1e-4  # of pixels in [0, 1]
VARIANTS = {"fp16": (torch.float16, 0.05), "bf16": (torch.bfloat16, 0.3)}  # and how far rounded weights may move a pixel
EXPORTED = ("ddim", "consistency", "jump")

# What a user runs: nothing of this project. Writes the images of one generator an image, and the count of steps, as .npy.
STOCK = """
import json, sys
import diffusers, numpy, torch
from diffusers import DiffusionPipeline
folder, out, steps, labels, seeds, variant = sys.argv[1], sys.argv[2], *map(json.loads, sys.argv[3:])
diffusers.utils.logging.disable_progress_bar()
pipeline = DiffusionPipeline.from_pretrained(folder, variant=variant)
pipeline.set_progress_bar_config(disable=True)
for n in steps:
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    images = pipeline(len(seeds), class_labels=labels, num_inference_steps=n, generator=generators, output_type="np").images
    numpy.save(f"{out}/{n}.npy", images)
assert not {"distill", "teachers", "eval", "recipes"} & set(sys.modules)
"""


def check_exportable(model: Teacher) -> None:
    """ValueError, in one line, where no stock class carries the model."""
    d = model.parametric
    if not isinstance(d.net, UNet):
        raise ValueError("only a UNet2DModel can be exported as a diffusers pipeline so far")
    if model.sampler.get("name", "ddim").partition(":")[0] not in EXPORTED:
        raise ValueError(
            f"no stock scheduler takes the steps of {model.sampler['name']!r}: {', '.join(EXPORTED)} can be exported"
        )
    if not isinstance(d.schedule, Table) or d.time != "index" or d.prediction not in PREDICTIONS.values():
        raise ValueError(
            "a diffusers pipeline needs a discrete table, the time convention 'index' and a prediction of "
            f"{', '.join(PREDICTIONS.values())}; this model has {type(d.schedule).__name__}, {d.time!r}, {d.prediction!r}"
        )
    kind = d.net.unet.config["time_embedding_type"]  # type: ignore[index]
    if kind != "positional" and any(needs_baking(model, n) for n in model.sampler.get("steps", [])):
        raise ValueError(f"step times can be baked into positional time embeddings, not {kind}")


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


def scheduler_of(schedule: Table, prediction: str):
    """A DDIMScheduler on the table: by its usual name where that gives the same table, else by its betas."""
    from diffusers import DDIMScheduler

    name = {v: k for k, v in PREDICTIONS.items()}[prediction]
    table = torch.tensor(schedule.alphas_cumprod, dtype=torch.float64)
    fixed = {
        "num_train_timesteps": schedule.steps,
        "prediction_type": name,
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
        table, place = tcd_table(table, below)
        scheduler = tcd_of(table, steps, d.prediction)
        embedding = embedding[place]
    else:
        scheduler = scheduler_of(Table(tuple(table.tolist())), d.prediction)
    twin = type(unet)(**{**unet.config, "time_embedding_type": "learned", "num_train_timesteps": len(embedding)})
    weights = {k: v for k, v in unet.state_dict().items() if not k.startswith("time_proj.")}
    twin.load_state_dict(weights | {"time_proj.weight": embedding})
    return twin.eval(), scheduler


def tcd_table(visited: Tensor, below: Tensor) -> tuple[Tensor, Tensor]:
    """A table of alphas_cumprod [n k] in which a `TCDScheduler` of n steps goes from entry to entry of ``visited`` [n], from the
    data on, by way of ``below`` [n - 1]; and which visited one each entry belongs to.

    It visits the entries k - 1, 2 k - 1, ..., n k - 1, passes floor((1 - eta) entry) with the eta of 0.3 that no stock pipeline
    can change, and ends at entry 0, the data. k is the smallest that keeps all these apart.
    """
    n = len(visited)
    for k in range(2, 100):
        stops = torch.arange(1, n + 1) * k - 1
        passed = torch.floor(0.7 * stops[:-1]).long()
        if len({0, *stops.tolist(), *passed.tolist()}) == 2 * n:
            break
    place = ((torch.arange(n * k) + 1) // k - 1).clamp(min=0)  # of entries never visited: the last visited one below
    table = visited[place].clone()
    table[passed] = below
    table[0] = 1.0
    return table, place


def tcd_of(table: Tensor, steps: int, prediction: str) -> Any:
    from diffusers import TCDScheduler

    name = {v: k for k, v in PREDICTIONS.items()}[prediction]
    return TCDScheduler(
        num_train_timesteps=len(table), trained_betas=betas(table), prediction_type=name, clip_sample=False,
        original_inference_steps=steps,
    )  # fmt: skip


def betas(table: Tensor) -> list[float]:
    """1 - alphas_cumprod[k] / alphas_cumprod[k - 1]."""
    return (1 - table / torch.cat([torch.ones(1, dtype=table.dtype), table[:-1]])).tolist()


def pipeline(model: Teacher, folder: Path, steps: int | None = None) -> None:
    """Writes the diffusers pipeline, aside first; an older one in its place is replaced as a whole.

    ``steps``: the one step count whose times are baked in, needed where `needs_baking` says so.
    """
    from diffusers import ConsistencyModelPipeline

    check_exportable(model)
    d = model.parametric
    assert isinstance(d.schedule, Table)
    unet, scheduler = baked(model, steps) if steps else (d.net.unet, scheduler_of(d.schedule, d.prediction))
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".part", dir=folder.parent))
    try:
        stock: Any = ConsistencyModelPipeline(unet=unet, scheduler=scheduler)
        stock.save_pretrained(aside)
        if folder.exists():
            shutil.rmtree(folder)
        aside.chmod(0o755)
        aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def pipelines(model: Teacher) -> dict[str, tuple[list[int], int | None]]:
    """Which pipelines carry a model: name -> (the step counts it takes, the one whose times are baked in or None)."""
    made = model.sampler.get("steps") or exact_steps(model)
    baking = sorted(n for n in made if needs_baking(model, n))
    plain = [n for n in made if n not in baking]
    out: dict[str, tuple[list[int], int | None]] = {"pipeline": (plain, None)} if plain else {}
    for n in baking:
        out[f"pipeline-{n}" if out else "pipeline"] = ([n], n)
    return out


def deliver(model: Teacher, folder: Path) -> dict[str, float]:
    """``folder``/pipeline, and ``folder``/pipeline-<steps> for each step count whose times have to be baked in (where all have, the
    lowest is in pipeline), each compared with our sampler: {name: largest difference of a pixel}. ValueError where no stock class
    carries the model."""
    check_exportable(model)
    out = {}
    for name, (steps, baked_in) in pipelines(model).items():
        pipeline(model, folder / name, baked_in)
        out[name] = verify(model, folder / name, steps)
    return out


def add_variant(model: Teacher, folder: Path, variant: str) -> float:
    """Adds the weights in half precision to a delivered pipeline, for ``from_pretrained(..., variant=)``; the largest difference of
    a pixel to our sampler when they are computed with in float32. RuntimeError where that is more than the rounding can do."""
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging

    logging.disable_progress_bar()
    dtype, tolerance = VARIANTS[variant]
    stock: Any = DiffusionPipeline.from_pretrained(folder)
    stock.to(dtype)
    stock.save_pretrained(folder, variant=variant)
    return verify(model, folder, pipelines(model)[folder.name][0], variant, tolerance)


@torch.inference_mode()
def own_pixels(model: Teacher, steps: int, labels: list[int] | None, seeds: list[int]) -> Tensor:
    """Our sampler's images [n, H, W, C] in [0, 1] from the noise that the pipeline draws for these seeds."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def fresh(shape: tuple[int, ...]) -> Tensor:
        return torch.cat([torch.randn((1, *shape), generator=generator) for generator in generators])

    name = model.sampler.get("name", "ddim")
    extra = {"noise": lambda x: fresh(x.shape[1:])} if stochastic(name) else {}
    cond = model.condition(None if labels is None else torch.tensor(labels))
    x0 = named(name)(model.denoiser, fresh(model.shape), model.times(steps), **extra, **cond)
    return (x0 / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)


def verify(model: Teacher, folder: Path, steps: list[int], variant: str | None = None, tolerance: float = TOLERANCE) -> float:
    """The largest difference of a pixel between the pipeline, run in a process that knows only diffusers, and our sampler.

    RuntimeError where it is more than ``tolerance``.
    """
    import numpy as np

    seeds = list(range(8))
    labels = None if model.classes is None else [i % model.classes for i in seeds]
    with tempfile.TemporaryDirectory() as out:
        arguments = [str(folder.resolve()), out, json.dumps(steps), json.dumps(labels), json.dumps(seeds), json.dumps(variant)]
        subprocess.run([sys.executable, "-c", STOCK, *arguments], check=True, cwd=out)
        worst = max(
            float((torch.from_numpy(np.load(f"{out}/{n}.npy")) - own_pixels(model, n, labels, seeds)).abs().max())
            for n in steps
        )
    if not worst <= tolerance:
        raise RuntimeError(f"the pipeline in {folder} differs from our sampler by {worst:.2g}, more than {tolerance:g}")
    return worst
