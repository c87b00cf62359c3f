"""Latents of a data set by a latent model's autoencoder, made once: --data DIR then trains on them and decodes no image again.

    python recipes/latents.py --model PIPELINE --data IMAGES,size=256 --output-dir latents/mine
    accelerate launch recipes/progressive.py --teacher PIPELINE --data latents/mine --reference fid-reference.npz ...

Writes latents-00000.safetensors, ... with latents [n, ...] in the denoiser's own space (scaled and shifted; the mean, where the
encoder gives a distribution), labels [n] and captions where there are any, and index.json, which names model, scale and count.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import teachers
from distill import checkpoint
from eval.generate import from_uint8
from recipes import data as datasets
from recipes.common import disk_errors, fail, flag, one_line_errors, parse, processes
from recipes.measure import check_match
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


def encoded(model: Teacher, data: datasets.Data, config: Config, device: torch.device) -> Iterator[Shard]:
    """Shards of ``shard_images``, in the order of the data. ValueError where a latent does not fit into the numbers asked for."""
    assert model.codec is not None
    left = config.most or float("inf")
    for images, labels, captions in data.walk(config.shard_images):
        images = images[: int(min(left, len(images)))]
        left -= len(images)
        parts = []
        for part in images.split(config.batch_size):
            x = from_uint8(part, device)
            parts.append(model.codec.encode(x).to(DTYPES[config.dtype]).cpu())
        latents, n = torch.cat(parts), len(images)
        if not torch.isfinite(latents).all():
            raise ValueError(f"latents of {data.name} are not finite in {config.dtype}: --dtype float32 is accepted too")
        yield Shard(latents, None if labels is None else labels[:n], None if captions is None else captions[:n])
        if left <= 0:
            return


def write(folder: Path, shards: Iterator[Shard], facts: dict) -> int:
    """Files and index of all shards; the number of latents."""
    sizes: dict[str, int] = {}
    shape: list[int] = []
    for i, shard in enumerate(shards):
        name = f"latents-{i:05d}.safetensors"
        tensors = {"latents": shard.latents} | ({} if shard.labels is None else {"labels": shard.labels})
        checkpoint.save(folder / name, tensors, {"captions": shard.captions})
        sizes[name], shape = len(shard.latents), list(shard.latents.shape[1:])
    count = sum(sizes.values())
    checkpoint.write_json(folder / "index.json", {"format": LATENTS, **facts, "count": count, "shape": shape, "shards": sizes})
    return count


def main(argv: list[str] | None = None) -> None:
    with one_line_errors(), disk_errors():
        config = parse(Config, __doc__.splitlines()[0], PRESETS, argv)
        folder = Path(config.output_dir)
        if folder.exists():
            fail(f"{folder} exists: name another --output-dir")
        if processes() > 1 or min(config.shard_images, config.batch_size) < 1:
            raise ValueError("latents are made by one process, --shard-images and --batch-size are 1 or more")
        if config.threads:
            torch.set_num_threads(config.threads)
        model = teachers.load(config.model)
        if model.codec is None:
            raise ValueError(f"{config.model} works on images and has no autoencoder: accepted are latent models")
        data = datasets.load(config.data)
        data.pixels  # latents cannot be encoded again  # noqa: B018
        check_match(model, data)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model.to(device)
        facts = {
            "model": config.model,
            "codec_sha256": codec_sha256(model.codec),
            "scale": model.codec.scale,
            "shift": model.codec.shift,
        }
        facts |= {"dtype": config.dtype, "data": data.name, "classes": data.classes}
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            shards = tqdm(encoded(model, data, config, device), desc="latents", unit="shard", disable=None)
            count = write(aside, shards, facts)
            aside.chmod(0o755)
            aside.rename(folder)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    print(f"{count:,} latents of {data.name}: {folder}")


if __name__ == "__main__":
    main()
