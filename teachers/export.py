"""A model as a diffusers pipeline of stock classes, and the proof that it gives the same pixels.

Models of pixels go the way of `teachers.pixels`, those of latents that of `teachers.transplant`.
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

from distill.schedule import prior_std
from distill.solver import named, stochastic
from teachers import pixels, transplant
from teachers.load import Teacher

TOLERANCE = 1e-4  # of pixels in [0, 1]
VARIANTS = {"fp16": (torch.float16, 0.05), "bf16": (torch.bfloat16, 0.3)}  # and how far rounded weights may move a pixel
EXPORTED = ("ddim", "consistency", "jump")

# What a user runs: nothing of this project. Writes the images of one generator an image, and the count of steps, as .npy.
STOCK = """
import json, sys
import diffusers, numpy, torch
from diffusers import DiffusionPipeline
folder, out, steps, call, seeds, variant = sys.argv[1], sys.argv[2], *map(json.loads, sys.argv[3:])
diffusers.utils.logging.disable_progress_bar()
pipeline = DiffusionPipeline.from_pretrained(folder, variant=variant)
pipeline.set_progress_bar_config(disable=True)
for n in steps:
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    images = pipeline(**call, num_inference_steps=n, generator=generators, output_type="np").images
    numpy.save(f"{out}/{n}.npy", images)
assert not {"distill", "teachers", "eval", "recipes"} & set(sys.modules)
"""


def form_of(model: Teacher) -> Any:
    """The module that knows the stock pipeline of this model: check, pipelines, stock and call."""
    return pixels if model.codec is None else transplant


def check_exportable(model: Teacher) -> None:
    """ValueError, in one line, where no stock class carries the model."""
    model.parametric  # an oracle has no network  # noqa: B018
    if model.sampler.get("name", "ddim").partition(":")[0] not in EXPORTED:
        raise ValueError(
            f"no stock scheduler takes the steps of {model.sampler['name']!r}: {', '.join(EXPORTED)} can be exported"
        )
    form_of(model).check(model)


def write(pipeline: Any, folder: Path) -> None:
    """Saves a diffusers pipeline, aside first; an older one in its place is replaced as a whole."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".part", dir=folder.parent))
    try:
        pipeline.save_pretrained(aside)
        if folder.exists():
            shutil.rmtree(folder)
        aside.chmod(0o755)
        aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def deliver(model: Teacher, folder: Path) -> dict[str, float]:
    """``folder``/pipeline, and ``folder``/pipeline-<steps> for each step count that needs one of its own (where all do, the lowest is in
    pipeline), each compared with our sampler: {name: largest difference of a pixel}. Moves the model to the CPU. ValueError where no
    stock class carries the model; RuntimeError where one gives other pixels, of which nothing stays."""
    check_exportable(model)
    model.to(torch.device("cpu"))
    form, out = form_of(model), {}
    for name, (steps, baked_in) in form.pipelines(model).items():
        write(form.stock(model, steps, baked_in), folder / name)
        try:
            out[name] = verify(model, folder / name, steps)
        except (RuntimeError, subprocess.CalledProcessError):
            shutil.rmtree(folder / name)
            raise
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
    return verify(model, folder, form_of(model).pipelines(model)[folder.name][0], variant, tolerance)


@torch.inference_mode()
def own_pixels(model: Teacher, steps: int, labels: list[int] | None, seeds: list[int]) -> Tensor:
    """Our sampler's images [n, H, W, C] in [0, 1] from the noise that the pipeline draws for these seeds."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def fresh(shape: tuple[int, ...]) -> Tensor:
        return torch.cat([torch.randn((1, *shape), generator=generator) for generator in generators])

    name, times = model.sampler.get("name", "ddim"), model.times(steps)
    extra = {"noise": lambda x: fresh(x.shape[1:])} if stochastic(name) else {}
    cond = model.condition(None if labels is None else torch.tensor(labels))
    begin = prior_std(model.denoiser.schedule, times[0]) * fresh(model.shape)
    x0 = model.decode(named(name)(model.denoiser, begin, times, **extra, **cond))
    return (x0 / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)


def quantised(model: Teacher) -> bool:
    return model.codec is not None and hasattr(model.codec.network, "quantize")


def verify(model: Teacher, folder: Path, steps: list[int], variant: str | None = None, tolerance: float = TOLERANCE) -> float:
    """The largest difference of a pixel between the pipeline, run in a process that knows only diffusers, and our sampler; of the median
    image where the decoder takes the nearest of some codes, which a rounding can change for another.

    RuntimeError where it is more than ``tolerance``.
    """
    import numpy as np

    seeds = list(range(8 if model.codec is None else 3))
    labels = None if model.classes is None else [i % model.classes for i in seeds]
    with tempfile.TemporaryDirectory() as out:
        call = form_of(model).call(model, labels, len(seeds))
        arguments = [str(folder.resolve()), out, *map(json.dumps, (steps, call, seeds, variant))]
        subprocess.run([sys.executable, "-c", STOCK, *arguments], check=True, cwd=out)
        worst = 0.0
        for n in steps:
            each = (torch.from_numpy(np.load(f"{out}/{n}.npy")) - own_pixels(model, n, labels, seeds)).abs().flatten(1).amax(1)
            worst = max(worst, float(each.median() if quantised(model) else each.max()))
    if not worst <= tolerance:
        raise RuntimeError(f"the pipeline in {folder} differs from our sampler by {worst:.2g}, more than {tolerance:g}")
    return worst
