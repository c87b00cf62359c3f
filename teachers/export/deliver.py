"""A model as diffusers pipelines of stock classes, each verified to give the same pixels as this project's sampler."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from distill.files import FILE_MODE, replacing_folder
from distill.self_conditioning import self_conditioned
from teachers import passport
from teachers.encoder import EXAMPLES
from teachers.export import latent, pixel
from teachers.hub import nulls
from teachers.lora import bare, merged
from teachers.passport import pixels as own_pixels
from teachers.teacher import Teacher, require_network

TOLERANCE = 1e-4  # largest accepted difference of a pixel in [0, 1]
VARIANTS = {"fp16": (torch.float16, 0.05), "bf16": (torch.bfloat16, 0.3)}  # dtype, and the tolerance for rounded weights
EXPORTED = ("ddim", "consistency", "jump")
SOURCES = ("_name_or_path", "name_or_path")  # where the libraries keep the folder that a part was loaded from
QUIET = {"PYTHONWARNINGS": "ignore::FutureWarning", "DIFFUSERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}

# What a user runs, without this project. Writes the images of each step count as .npy, with one generator per image.
STOCK = """
import json, sys
import diffusers, numpy, torch
from diffusers import DiffusionPipeline
folder, out, steps, call, seeds, options, lora = sys.argv[1], sys.argv[2], *map(json.loads, sys.argv[3:])
diffusers.utils.logging.disable_progress_bar()
pipeline = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32, **options)
pipeline.set_progress_bar_config(disable=True)
if lora:
    if lora["rounded"]:
        getattr(pipeline, lora["rounded"]).to(torch.bfloat16).to(torch.float32)
    pipeline.load_lora_weights(lora["folder"])
    pipeline.scheduler = getattr(diffusers, lora["class"]).from_pretrained(lora["folder"], subfolder=lora["scheduler"])
for n in steps:
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    images = pipeline(**call, num_inference_steps=n, generator=generators, output_type="np").images
    numpy.save(f"{out}/{n}.npy", images)
assert not {"distill", "teachers", "eval", "recipes"} & set(sys.modules)
"""


def form_of(model: Teacher) -> Any:
    """Return the module for this kind of model, with functions check, pipelines, stock and call."""
    return pixel if model.codec is None else latent


def check_exportable(model: Teacher) -> None:
    """Raise ValueError if no stock pipeline can hold the model."""
    require_network(model := bare(model))
    if model.source is not None:
        raise ValueError(f"no stock pipeline starts from images ({model.source}): accepted are models that start from noise")
    if self_conditioned(model.denoiser):
        raise ValueError(
            "no stock pipeline carries the previous estimate of a self-conditioned network: accepted is its .safetensors"
        )
    if model.sampling.name not in EXPORTED:
        raise ValueError(f"no stock scheduler takes the steps of {model.sampling.label!r}: accepted are {', '.join(EXPORTED)}")
    form_of(model).check(model)


def reason_against(model: Teacher) -> str | None:
    """Return why no stock pipeline will hold students of the model; None where one can. Reads no weights."""
    if model.embeddings is not None and not model.embeddings.prompts:
        model = replace(model, embeddings=replace(model.embeddings, prompts=EXAMPLES))  # with which pipelines are compared
    try:
        check_exportable(model)
    except ValueError as error:
        return str(error)
    return None


def export_pipelines(model: Teacher, folder: Path) -> dict[str, float]:
    """Write ``folder``/pipeline, and ``folder``/pipeline-N for each step count N that needs its own; move the model to the CPU.

    They hold the merged weights of a model with a LoRA adapter.
    If all step counts need their own, the lowest is in pipeline. Returns {name: largest difference of a pixel to our sampler}.

    Raises ValueError if no stock pipeline can hold the model, and RuntimeError if one gives other pixels; it is then removed.
    """
    model = merged(model)
    check_exportable(model)
    model.to(torch.device("cpu"))
    form, out = form_of(model), {}
    for name, (steps, only) in form.pipelines(model).items():
        with replacing_folder(folder / name) as aside:
            _write(form.stock(model, steps, only), aside)
            if model.distilled:
                passport.write(aside / passport.NAME, passport.of(model, steps, stock=True))
        try:
            out[name] = verify(model, folder / name, steps)
        except (RuntimeError, subprocess.CalledProcessError):
            shutil.rmtree(folder / name)
            raise
    return out


def add_variant(model: Teacher, folder: Path, variant: str) -> float:
    """Add the weights in half precision to an exported pipeline, for ``from_pretrained(..., variant=VARIANT)``.

    ``variant``: a key of `VARIANTS`. Returns the largest difference of a pixel to our sampler, where the rounded weights are used in
    float32. Raises RuntimeError if it is more than rounding explains.
    """
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging

    logging.disable_progress_bar()
    dtype, tolerance = VARIANTS[variant]
    stock: Any = DiffusionPipeline.from_pretrained(folder, **nulls(folder))
    stock.to(dtype)
    _write(stock, folder, variant=variant)
    return verify(model, folder, form_of(model).pipelines(model)[folder.name][0], variant, tolerance)


def _write(stock: Any, folder: Path, **options: Any) -> None:
    """Save a pipeline as files of ordinary mode, without the names of the folders that its parts came from."""
    stock.save_pretrained(folder, **options)
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(FILE_MODE)
        if path.name == "model_index.json" or path.name.endswith("config.json"):
            kept = {key: value for key, value in json.loads(path.read_text()).items() if key not in SOURCES}
            path.write_text(json.dumps(kept, indent=2) + "\n")


def verify(
    model: Teacher,
    folder: Path,
    steps: list[int],
    variant: str | None = None,
    tolerance: float = TOLERANCE,
    lora: dict | None = None,
) -> float:
    """Return the largest difference of a pixel between our sampler and the pipeline, run in a process with diffusers alone.

    For a VQ autoencoder it is the difference of the median image, because rounding can change the nearest code of a latent.
    ``lora``: an adapter for the pipeline, with its scheduler (`teachers.export.lora`).

    Raises RuntimeError if it is more than ``tolerance``.
    """
    import numpy as np

    seeds = list(range(8 if model.codec is None else 3))
    labels = None if model.classes is None else [i % model.classes for i in seeds]
    quantised = model.codec is not None and hasattr(model.codec.network, "quantize")
    with tempfile.TemporaryDirectory() as out:
        call = form_of(model).call(model, labels, len(seeds))
        arguments = [
            str(folder.resolve()),
            out,
            *map(json.dumps, (steps, call, seeds, nulls(folder) | {"variant": variant}, lora)),
        ]
        subprocess.run([sys.executable, "-c", STOCK, *arguments], check=True, cwd=out, env=os.environ | QUIET)
        differences = []
        for n in steps:
            each = (torch.from_numpy(np.load(f"{out}/{n}.npy")) - own_pixels(model, n, labels, seeds)).abs().flatten(1).amax(1)
            differences.append(each.median() if quantised else each.max())
    worst = float(torch.stack(differences).max())  # NaN if any of them is
    if not worst <= tolerance:
        raise RuntimeError(f"the pipeline in {folder} differs from our sampler by {worst:.2g}, more than {tolerance:g}")
    return worst
