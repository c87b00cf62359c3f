"""Latents of a data set by a latent model's autoencoder, made once: --data DIR then trains on them and decodes no image again.

    python recipes/latents.py --model PIPELINE --data IMAGES,size=256 --output-dir latents/mine
    accelerate launch --num_processes 8 recipes/latents.py --model PIPELINE --data wds:SHARDS --output-dir latents/mine
    accelerate launch recipes/progressive.py --teacher PIPELINE --data latents/mine --reference fid-reference.npz ...

Writes latents-00000.safetensors, ... with latents [n, ...] in the denoiser's own space (scaled and shifted; the mean, where the
encoder gives a distribution), labels [n] and captions where there are any, and index.json, which names model, scale and count.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor
from tqdm import tqdm

import teachers
from distill import checkpoint
from eval.generate import from_uint8
from recipes import data as datasets
from recipes.common import fail, flag, one_line_errors, parse
from recipes.matching import check_match
from recipes.stored import LATENTS, codec_sha256
from teachers import Teacher

PRESETS: dict[str, dict] = {"default": {}, "smoke": {"most": 64}}
DTYPES = {"float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Config:
    preset: str = flag("default", "default, or smoke (the first 64 images)", choices=PRESETS)
    model: str = flag("digits", "the latent model: " + teachers.ACCEPTED.replace("%", "%%"))
    data: str = flag("digits", "the images: " + datasets.ACCEPTED)
    output_dir: str = flag("runs/latents", "a new directory")
    dtype: str = flag("float16", "numbers of the latents", choices=DTYPES)
    shard_images: int = flag(8192, "latents a file")
    batch_size: int = flag(16, "images encoded at once")
    most: int = flag(0, "only so many images; 0 for all")
    threads: int = flag(0, "CPU threads; 0 for all cores")


@dataclass(frozen=True)
class Shard:
    latents: Tensor
    labels: Tensor | None
    captions: list[str] | None


def encoded(model: Teacher, data: datasets.Data, config: Config, state: PartialState) -> Iterator[tuple[int, Shard]]:
    """The shards of this process, every ``num_processes``-th of all in the order of the data, with their numbers. ValueError where a
    latent does not fit into the numbers asked for."""
    assert model.codec is not None
    most, mine = config.most or None, (state.process_index, state.num_processes)
    for number, images, labels, captions in data.walk(config.shard_images, most, *mine):
        codes = (model.codec.encode(from_uint8(part, state.device)) for part in images.split(config.batch_size))
        latents = torch.cat([z.to(DTYPES[config.dtype]).cpu() for z in codes])
        if not torch.isfinite(latents).all():
            raise ValueError(f"latents of {data.name} are not finite in {config.dtype}: --dtype float32 is accepted too")
        yield number, Shard(latents, labels, captions)


def write(folder: Path, shards: Iterable[tuple[int, Shard]]) -> dict[str, list[int]]:
    """The files of shards; the shape of each."""
    shapes = {}
    for number, shard in shards:
        name = f"latents-{number:05d}.safetensors"
        tensors = {"latents": shard.latents} | ({} if shard.labels is None else {"labels": shard.labels})
        checkpoint.save(folder / name, tensors, {"captions": shard.captions})
        shapes[name] = list(shard.latents.shape)
    return shapes


def written(folder: Path, shards: Iterable[tuple[int, Shard]]) -> tuple[dict[str, list[int]], str | None]:
    """`write`, or what went wrong in it, which all processes have to hear of."""
    try:
        return write(folder, shards), None
    except (ValueError, OSError) as error:
        return {}, str(error)


def finish(folder: Path, aside: Path, shapes: dict[str, list[int]], facts: dict) -> int:
    """The index of all shards, and the folder's name; the number of latents."""
    sizes = {name: shape[0] for name, shape in sorted(shapes.items())}
    facts |= {"count": sum(sizes.values()), "shape": next(iter(shapes.values()))[1:], "shards": sizes}
    checkpoint.write_json(aside / "index.json", {"format": LATENTS, **facts})
    aside.chmod(0o755)
    aside.rename(folder)
    return facts["count"]


def main(argv: list[str] | None = None) -> None:
    with one_line_errors():
        config = parse(Config, __doc__.splitlines()[0], PRESETS, argv)
        folder = Path(config.output_dir)
        if folder.exists():
            fail(f"{folder} exists: name another --output-dir")
        if min(config.shard_images, config.batch_size) < 1:
            raise ValueError("--shard-images and --batch-size are 1 or more")
        # a process without shards waits for the others
        state = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=1))
        if config.threads:
            torch.set_num_threads(config.threads)
        model = teachers.load(config.model)
        if model.codec is None:
            raise ValueError(f"{config.model} works on images and has no autoencoder: accepted are latent models")
        data = datasets.load(config.data)
        data.pixels  # latents cannot be encoded again  # noqa: B018
        check_match(model, data)
        model.to(state.device)
        facts = {
            "model": config.model,
            "codec_sha256": codec_sha256(model.codec),
            "scale": model.codec.scale,
            "shift": model.codec.shift,
            "codec": model.codec.describe(),
        }
        facts |= {"dtype": config.dtype, "data": data.name, "classes": data.classes}
        folder.parent.mkdir(parents=True, exist_ok=True)
        made = [tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent) if state.is_main_process else ""]
        aside = Path(broadcast_object_list(made)[0])
        try:
            total = math.ceil(len(data.images) / config.shard_images / state.num_processes) if data.stream is None else None
            quiet = None if state.is_main_process else True
            shards = tqdm(encoded(model, data, config, state), desc="latents", unit="shard", total=total, disable=quiet)
            parts: Any = gather_object([written(aside, shards)])
            if wrong := next((error for _, error in parts if error), None):
                raise ValueError(wrong)
            if state.is_main_process:
                count = finish(folder, aside, {name: shape for shapes, _ in parts for name, shape in shapes.items()}, facts)
                print(f"{count:,} latents of {data.name}: {folder}")
        finally:
            if state.is_main_process:
                shutil.rmtree(aside, ignore_errors=True)


if __name__ == "__main__":
    main()
