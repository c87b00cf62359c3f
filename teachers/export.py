"""A model as a diffusers pipeline of stock classes, and the proof that it gives the same pixels.

A class-conditional or unconditional UNet2DModel goes into `ConsistencyModelPipeline`, which takes any scheduler, with a
`DDIMScheduler` on "trailing" timesteps: on a table of T entries that visits T, T (1 - 1/N), ..., the uniform grid of the ladders.
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

from distill.grid import uniform
from distill.schedule import Table
from distill.solver import ddim
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
    if not isinstance(d.schedule, Table) or d.time != "index" or d.prediction not in PREDICTIONS.values():
        raise ValueError(
            "a diffusers pipeline needs a discrete table, the time convention 'index' and a prediction of "
            f"{', '.join(PREDICTIONS.values())}; this model has {type(d.schedule).__name__}, {d.time!r}, {d.prediction!r}"
        )
    if steps := inexact(model):
        raise ValueError(
            f"{steps} steps do not divide the {d.schedule.steps} entries of the table: diffusers would round the times"
        )


def inexact(model: Teacher) -> list[int]:
    """The step counts the model was made for whose uniform grid misses the entries of its table."""
    schedule = model.denoiser.schedule
    assert isinstance(schedule, Table)
    return [n for n in model.sampler.get("steps", []) if schedule.steps % n]


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
    betas = 1 - table / torch.cat([torch.ones(1, dtype=torch.float64), table[:-1]])
    return DDIMScheduler(trained_betas=betas.tolist(), **fixed)


def pipeline(model: Teacher, folder: Path) -> None:
    """Writes the diffusers pipeline, aside first; an older one in its place is replaced as a whole."""
    from diffusers import ConsistencyModelPipeline

    check_exportable(model)
    d = model.parametric
    assert isinstance(d.net, UNet) and isinstance(d.schedule, Table)
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        stock = ConsistencyModelPipeline(unet=d.net.unet, scheduler=scheduler_of(d.schedule, d.prediction))  # type: ignore
        stock.save_pretrained(aside)  # type: ignore[attr-defined]
        if folder.exists():
            shutil.rmtree(folder)
        aside.chmod(0o755)
        aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@torch.inference_mode()
def own_pixels(model: Teacher, steps: int, labels: list[int] | None, seeds: list[int]) -> Tensor:
    """Our sampler's images [n, H, W, C] in [0, 1] from the noise that the pipeline draws for these seeds."""
    noise = torch.cat([torch.randn((1, *model.shape), generator=torch.Generator().manual_seed(s)) for s in seeds])
    cond = model.condition(None if labels is None else torch.tensor(labels))
    x0 = ddim(model.denoiser, noise, uniform(model.denoiser.schedule, steps), **cond)
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
