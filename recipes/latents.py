"""Encode a data set once with a latent model's autoencoder and text encoders, so that training needs neither images nor encoders.

    python recipes/latents.py --model PIPELINE --data IMAGES,size=256 --output-dir latents/mine
    accelerate launch --num_processes 8 recipes/latents.py --model PIPELINE --data wds:SHARDS --output-dir latents/mine
    accelerate launch recipes/progressive.py --teacher PIPELINE --data latents/mine --reference fid-reference.npz ...
    python recipes/latents.py --model PIPELINE --data FOLDER --sizes 1024x1024 832x1216 1216x832 --output-dir latents/mine

The folder holds latents-00000.safetensors, ... with latents [n, ...], and labels [n] and captions if the data has them. The latents
are scaled and shifted as the denoiser expects them. An encoder that outputs a distribution gives its mean. For a text-to-image model it
also holds conditions-00000.safetensors, ... with a row for each different caption, and conditions.safetensors with the empty prompt's.
index.json records model, count, and the sha256 of the autoencoder and of the text encoders. Training maps all files into memory. With
--sizes each image is cut to the size of the nearest aspect ratio; the latents of each size are a sub-folder, which can be used alone. A
command that was interrupted keeps its finished shards in a hidden folder beside the new one, and goes on there when it is started
again, on any number of processes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Container, Iterator
from dataclasses import dataclass
from datetime import timedelta
from itertools import groupby
from pathlib import Path
from typing import ClassVar

from recipes.common.accepted import BATCH, THREADS
from recipes.common.cli import REQUIRED, flag, flags_first, machine_flag, model_flag, one_line_errors, parse
from recipes.common.flags import TOPICS, MachineFlags

PRESETS: dict[str, dict] = {"default": {}, "smoke": {"most": 64}}


@dataclass(frozen=True, kw_only=True)
class Config(MachineFlags):
    """What is encoded, and how it is stored."""

    TOPICS: ClassVar = TOPICS
    preset: str = flag("default", "smoke encodes the first 64 images", choices=PRESETS)
    model: str = model_flag(REQUIRED, "the latent model (accepted: --help teacher)")
    data: str = model_flag("digits", "the images (accepted: --help data)")
    most: int = model_flag(0, "largest number of images; 0 for all", at_least=0, at_most=10**10)
    sizes: tuple[str, ...] = model_flag(
        (), "HEIGHTxWIDTH in pixels of several sizes; an image gets that of the nearest aspect ratio", short=False
    )
    dtype: str = model_flag("float16", "number format of latents and conditions", choices=("float16", "float32"))
    encoder_precision: str = model_flag("fp32", "precision of the text encoders", choices=("fp32", "bf16"), short=False)
    output_dir: str = machine_flag("runs/latents", "a new directory", path="folder")
    shard_images: int = machine_flag(8192, "latents per file", at_least=1, at_most=1_000_000)
    shard_captions: int = machine_flag(1024, "captions per file", short=False, at_least=1, at_most=1_000_000)
    batch_size: int = machine_flag(16, "images, and captions, encoded per batch", **BATCH)
    threads: int = machine_flag(0, "CPU threads per process; 0 for torch's default", short=False, **THREADS)


flags_first(__name__, Config, __doc__, PRESETS)

import torch
from accelerate import PartialState

import teachers
from distill import files
from eval.features import fingerprint
from eval.progress import progress
from recipes.common.checks import check_match
from recipes.common.encoding import Encoding, row_bytes
from recipes.common.growing import Growing
from recipes.common.interrupts import interruptible
from recipes.common.plan import check_disk, gigabytes
from recipes.common.run import agreed
from recipes.common.several_sizes import check_sizes, write_indices
from recipes.common.shards import (
    Shard,
    finished_shards,
    refuse_existing,
    shared_folder,
    unfinished,
    write_everywhere,
)
from recipes.data import sets as datasets
from recipes.data.buckets import SeveralSizes, sizes_of
from recipes.data.condition_shards import distinct
from recipes.data.latent_shards import DTYPES, LATENTS, PATTERN, codec_sha256
from teachers import Teacher
from teachers.encoder import Encoder

Images = datasets.Data | SeveralSizes
DECODED = 4  # batches of images that are decoded at a time, so that all cores have some
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def encoded(
    model: Teacher, data: Images, config: Config, state: PartialState, finished: Container[str] = ()
) -> Iterator[Shard]:
    """Yield this process's shards that are not ``finished``: every ``num_processes``-th, in the data's order.

    With --sizes a shard is split into one for each size, in the folder of this size. They hold latents [n, ...], and labels [n] and
    captions [n] if the data have them. Raises ValueError if a latent overflows the number format.
    """
    assert model.codec is not None
    how = (model.codec, data.name, DTYPES[config.dtype], config.batch_size, state.device)
    rank, world, decoded = state.process_index, state.num_processes, DECODED * config.batch_size
    for number, pieces in groupby(
        data.walk(config.shard_images, config.most or None, rank, world, decoded), lambda piece: piece[0]
    ):
        shards: dict[str, Growing] = {}
        for _, images, labels, captions in pieces:
            folder = "x".join(map(str, images.shape[2:])) + "/" if config.sizes else ""
            if (name := f"{folder}latents-{number:05d}.safetensors") not in finished:
                shards.setdefault(name, Growing(*how)).add(images, labels, captions)
        for name, shard in shards.items():
            yield name, *shard.whole()


def describe(model: Teacher, data: Images, config: Config) -> dict:
    """Return the entries of index.json that do not depend on the latents."""
    assert model.codec is not None
    return {
        "format": LATENTS,
        "model": config.model,
        "codec_sha256": codec_sha256(model.codec),
        "scale": model.codec.scale,
        "shift": model.codec.shift,
        "codec": model.codec.describe(),
        "dtype": config.dtype,
        "data": data.name,
        "classes": data.classes,
        **({"factor": model.image_shape[1] // model.shape[1]} if config.sizes else {}),
    }


def load_pair(config: Config) -> tuple[Teacher, Images]:
    """Load model and data. Raises ValueError for a pixel-space model, for data that are latents, and for shapes that disagree."""
    model = teachers.load(config.model)
    if model.codec is None:
        raise ValueError(f"{config.model} is a pixel-space model without autoencoder; accepted are latent models")
    if config.sizes:
        sizes = sizes_of(config.sizes)
        check_sizes(model, sizes)
    data: Images = datasets.several_sizes(config.data, sizes) if config.sizes else datasets.load(config.data)
    if isinstance(data, datasets.Data) and data.latents is not None:
        raise ValueError(f"{config.data} holds latents already; accepted are images")
    captioned = data.captioned if isinstance(data, SeveralSizes) else data.captions is not None
    if model.embeddings is not None and not captioned:
        raise ValueError(
            f"{config.model} is conditioned on text, and {data.name} has no captions; --help data says who has them"
        )
    if isinstance(data, datasets.Data):
        check_match(model, data)
    elif model.image_shape[0] != (channels := 1 if data.form.mode == "L" else 3):
        raise ValueError(
            f"the model makes images of {model.image_shape[0]} channels, {data.name} holds {channels}: they must agree"
        )
    return model, data


def captions_of(folder: Path) -> list[str]:
    """Return the captions of all shards of latents, in order."""
    shards = (files.load(path, check=False) for path in sorted(folder.rglob(PATTERN)))
    return [caption for _, description in shards for caption in description["captions"]]


def announce(data: Images, model: Teacher, config: Config, row: int) -> None:
    """Say how much will be written, and check that the disk has it. ``row``: bytes of the conditions of one caption."""
    if isinstance(data, SeveralSizes):
        areas = [math.prod(size) / math.prod(model.image_shape[1:]) for size in data.form.sizes]
        each = round(math.prod(model.shape) * max(areas)) * DTYPES[config.dtype].itemsize
        print(of_a_million(each, row, "at most "))
        return
    count = min(len(data.images), config.most or len(data.images))
    known = [] if data.captions is None else distinct(data.captions[:count])
    each = math.prod(model.shape) * DTYPES[config.dtype].itemsize
    if data.stream is not None:
        print(of_a_million(each, row))
        return
    texts = f" and {gigabytes(row * len(known))} of conditions for {len(known):,} different captions" if row else ""
    print(f"{gigabytes(each * count)} of latents{texts}")
    check_disk(unfinished(Path(config.output_dir)), each * count + row * len(known))


def of_a_million(each: int, row: int, most: str = "") -> str:
    """Return the disk that a million images take, for people."""
    texts = f" and {gigabytes(1e6 * row)} for each million different captions" if row else ""
    return f"{most}{gigabytes(1e6 * each)} of latents for each million images{texts}"


@interruptible()
def main(argv: list[str] | None = None) -> None:
    with one_line_errors():
        config = parse(Config, __doc__, PRESETS, argv)
        folder = Path(config.output_dir)
        refuse_existing(folder)
        # a process without shards waits for the others
        state = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=1))
        if config.threads:
            torch.set_num_threads(config.threads)
        model, data = load_pair(config)
        encoding = None if model.embeddings is None else encoding_of(model, config, state)
        row = 0 if encoding is None else row_bytes(encoding.null())
        agreed(lambda: announce(data, model, config, row))
        index = describe(model, data, config)
        count = len(data.images) if isinstance(data, datasets.Data) and data.stream is None else None
        total = None if count is None else math.ceil(count / config.shard_images / state.num_processes)
        settings = {"shard_images": config.shard_images, "batch_size": config.batch_size, "most": config.most}
        sizes, sha256 = (data.form.sizes, data.sha256) if isinstance(data, SeveralSizes) else ((), fingerprint(data.images))
        made_with = json.loads(json.dumps(index | settings | {"images_sha256": sha256} | ({"sizes": sizes} if sizes else {})))
        finished = finished_shards(unfinished(folder), f"**/{PATTERN}", made_with)
        with shared_folder(folder, state) as aside:
            shards = encoded(model, data, config, state, finished)
            bar = progress(shards, show=state.is_main_process, desc="latents", unit="shard", total=total)
            shapes = finished | write_everywhere(aside, bar, made_with)
            if encoding is not None:
                encoding.write(aside, distinct(captions_of(aside)), state)
                index["encoder_sha256"] = encoding.encoder.sha256
            if state.is_main_process:
                count = write_indices(aside, index, shapes, sizes)
        if state.is_main_process:
            print(f"{count:,} latents of {data.name}: {folder}")


def encoding_of(model: Teacher, config: Config, state: PartialState) -> Encoding:
    """Return how the captions are encoded: by the model's own text encoders, on the device of this process."""
    encoder = Encoder.of(model, device=state.device, dtype=PRECISIONS[config.encoder_precision])
    return Encoding(encoder, DTYPES[config.dtype], config.batch_size, config.shard_captions)


if __name__ == "__main__":
    main()
