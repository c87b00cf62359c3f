"""A model as a diffusers pipeline of stock classes, and the proof that it gives the same pixels.

A class-conditional or unconditional UNet2DModel goes into `ConsistencyModelPipeline`, which takes any scheduler, with a
`DDIMScheduler` on "trailing" timesteps: on a table of T entries that visits T, T (1 - 1/N), ..., the uniform grid of the ladders.
Any other step times are baked in: the network's time embedding becomes a learned one with an entry for each of them, and the
scheduler's table has these entries alone, so that the pipeline, asked for that many steps, can take no others. Consistency
sampling of several steps, which adds fresh noise, is baked the same way with an `LCMScheduler`, whose boundary scaling is set so
that it vanishes.
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
from distill.solver import SAMPLERS, STOCHASTIC
from teachers.load import Teacher
from teachers.unet import PREDICTIONS, UNet

TOLERANCE = 1e-4  # of pixels in [0, 1]

# What a user runs: nothing of this project. Writes the images of one generator an image, and the count of steps, as .npy.
STOCK = """
import json, sys
import diffusers, numpy, torch
from diffusers import DiffusionPipeline
folder, out, steps, labels, seeds = sys.argv[1], sys.argv[2], *map(json.loads, sys.argv[3:])
diffusers.utils.logging.disable_progress_bar()
pipeline = DiffusionPipeline.from_pretrained(folder)
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
    if model.sampler.get("name", "ddim") not in ("ddim", "consistency"):
        raise ValueError(
            f"no stock scheduler takes the steps of {model.sampler['name']!r}: ddim and consistency can be exported"
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
    if steps > 1 and model.sampler.get("name") == "consistency":
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
    return DDIMScheduler(trained_betas=betas(schedule), **fixed)


def baked(model: Teacher, steps: int) -> tuple[Any, Any]:
    """The network and the scheduler of exactly these steps; entry k of the table, counted from the data, is the k-th time from
    the end. An `LCMScheduler` takes every second entry of a table, never the first: the others are never visited."""
    d, times = model.parametric, model.times(steps)[:-1].flip(0)
    consistency = model.sampler.get("name") == "consistency" and steps > 1
    noise = TIMES[d.time](d.schedule, times).float()
    table = d.schedule.alpha(times).square()
    if consistency:
        above = torch.cat([torch.ones(1, dtype=torch.float64), table[:-1]])
        table, noise = torch.stack([(above + table) / 2, table], 1).flatten(), noise.repeat_interleave(2)
    unet: Any = d.net.unet
    twin = type(unet)(**{**unet.config, "time_embedding_type": "learned", "num_train_timesteps": len(noise)})
    twin.load_state_dict(unet.state_dict() | {"time_proj.weight": unet.time_proj(noise.to(unet.device))})
    entries = Table(tuple(table.tolist()))
    return twin.eval(), lcm_of(entries, d.prediction) if consistency else scheduler_of(entries, d.prediction)


def lcm_of(table: Table, prediction: str) -> Any:
    from diffusers import LCMScheduler

    name = {v: k for k, v in PREDICTIONS.items()}[prediction]
    return LCMScheduler(
        num_train_timesteps=table.steps, trained_betas=betas(table), prediction_type=name, clip_sample=False,
        original_inference_steps=table.steps // 2, timestep_scaling=1e9,
    )  # fmt: skip


def betas(table: Table) -> list[float]:
    """1 - alphas_cumprod[k] / alphas_cumprod[k - 1]."""
    entries = torch.tensor(table.alphas_cumprod, dtype=torch.float64)
    return (1 - entries / torch.cat([torch.ones(1, dtype=torch.float64), entries[:-1]])).tolist()


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
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        stock: Any = ConsistencyModelPipeline(unet=unet, scheduler=scheduler)
        stock.save_pretrained(aside)
        if folder.exists():
            shutil.rmtree(folder)
        aside.chmod(0o755)
        aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def deliver(model: Teacher, folder: Path) -> dict[str, float]:
    """``folder``/pipeline, or ``folder``/pipeline-<steps> for each step count whose times have to be baked in, each compared with
    our sampler: {name: largest difference of a pixel}. ValueError where no stock class carries the model."""
    check_exportable(model)
    made = model.sampler.get("steps") or exact_steps(model)
    baking = [n for n in made if needs_baking(model, n)]
    plain = [n for n in made if n not in baking]
    out = {}
    if plain:
        pipeline(model, folder / "pipeline")
        out["pipeline"] = verify(model, folder / "pipeline", plain)
    for n in baking:
        name = "pipeline" if made == [n] else f"pipeline-{n}"
        pipeline(model, folder / name, n)
        out[name] = verify(model, folder / name, [n])
    return out


@torch.inference_mode()
def own_pixels(model: Teacher, steps: int, labels: list[int] | None, seeds: list[int]) -> Tensor:
    """Our sampler's images [n, H, W, C] in [0, 1] from the noise that the pipeline draws for these seeds."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def fresh(shape: tuple[int, ...]) -> Tensor:
        return torch.cat([torch.randn((1, *shape), generator=generator) for generator in generators])

    name = model.sampler.get("name", "ddim")
    extra = {"noise": lambda x: fresh(x.shape[1:])} if name in STOCHASTIC else {}
    cond = model.condition(None if labels is None else torch.tensor(labels))
    x0 = SAMPLERS[name](model.denoiser, fresh(model.shape), model.times(steps), **extra, **cond)
    return (x0 / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)


def verify(model: Teacher, folder: Path, steps: list[int]) -> float:
    """The largest difference of a pixel between the pipeline, run in a process that knows only diffusers, and our sampler.

    RuntimeError where it is more than `TOLERANCE`.
    """
    import numpy as np

    seeds = list(range(8))
    labels = None if model.classes is None else [i % model.classes for i in seeds]
    with tempfile.TemporaryDirectory() as out:
        arguments = [str(folder.resolve()), out, json.dumps(steps), json.dumps(labels), json.dumps(seeds)]
        subprocess.run([sys.executable, "-c", STOCK, *arguments], check=True, cwd=out)
        worst = max(
            float((torch.from_numpy(np.load(f"{out}/{n}.npy")) - own_pixels(model, n, labels, seeds)).abs().max())
            for n in steps
        )
    if not worst <= TOLERANCE:
        raise RuntimeError(f"the pipeline in {folder} differs from our sampler by {worst:.2g}, more than {TOLERANCE:g}")
    return worst
