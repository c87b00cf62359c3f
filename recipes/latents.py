"""Encode a data set once with a latent model's autoencoder, so that training needs no images.

    python recipes/latents.py --model PIPELINE --data IMAGES,size=256 --output-dir latents/mine
    accelerate launch --num_processes 8 recipes/latents.py --model PIPELINE --data wds:SHARDS --output-dir latents/mine
    accelerate launch recipes/progressive.py --teacher PIPELINE --data latents/mine --reference fid-reference.npz ...

The folder holds latents-00000.safetensors, ... with latents [n, ...], and labels [n] and captions if the data has them. The latents
are scaled and shifted as the denoiser expects them. An encoder that outputs a distribution gives its mean. index.json records model,
autoencoder, scale, shift and count. A command that was interrupted keeps its finished shards in a hidden folder beside the new one, and
goes on there when it is started again, on any number of processes.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar

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
    dtype: str = model_flag("float16", "number format of the latents", choices=("float16", "float32"))
    output_dir: str = machine_flag("runs/latents", "a new directory", path="folder")
    shard_images: int = machine_flag(8192, "latents per file", at_least=1, at_most=1_000_000)
    batch_size: int = machine_flag(16, "images encoded per batch", **BATCH)
    threads: int = machine_flag(0, "CPU threads per process; 0 for torch's default", short=False, **THREADS)


flags_first(__name__, Config, __doc__, PRESETS)

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor

import teachers
from distill import files
from distill.images import from_uint8
from eval.features import fingerprint
from eval.progress import progress
from recipes.common.checks import check_match
from recipes.common.interrupts import interruptible
from recipes.common.run import agreed, finished_file, lock, unlock
from recipes.data import sets as datasets
from recipes.data.latent_shards import DTYPES, LATENTS, codec_sha256
from teachers import Teacher


@dataclass(frozen=True)
class Shard:
    """Hold the contents of one file: latents [n, ...], labels [n] and captions [n]."""

    latents: Tensor
    labels: Tensor | None
    captions: list[str] | None


def encoded(
    model: Teacher, data: datasets.Data, config: Config, state: PartialState, finished: Container[str] = ()
) -> Iterator[tuple[int, Shard]]:
    """Yield number and contents of this process's shards that are not ``finished``: every ``num_processes``-th, in the data's order.

    Raises ValueError if a latent overflows the number format.
    """
    assert model.codec is not None
    for number, images, labels, captions in data.walk(
        config.shard_images, config.most or None, state.process_index, state.num_processes
    ):
        if name_of(number) in finished:
            continue
        codes = (model.codec.encode(from_uint8(part, state.device)) for part in images.split(config.batch_size))
        latents = torch.cat([z.to(DTYPES[config.dtype]).cpu() for z in codes])
        if not torch.isfinite(latents).all():
            raise ValueError(f"latents of {data.name} are not finite in {config.dtype}; --dtype float32 is accepted too")
        yield number, Shard(latents, labels, captions)


def name_of(number: int) -> str:
    """Return the file name of a shard."""
    return f"latents-{number:05d}.safetensors"


def unfinished(folder: Path) -> Path:
    """Return where the shards are until all are written."""
    return folder.with_name(f".{folder.name}.unfinished")


def finished_shards(folder: Path, identity: dict) -> dict[str, list[int]]:
    """Return {file name: shape of its latents} of the shards that an interrupted command left.

    Raises ValueError for a damaged shard, and for those of other settings.
    """
    shapes = {}
    for path in sorted(folder.glob("latents-*.safetensors")):
        with finished_file():
            tensors, description = files.load(path)
        if description.get("made_with") != identity:
            raise ValueError(f"{folder} holds shards of other settings: delete it, or choose another --output-dir")
        shapes[path.name] = list(tensors["latents"].shape)
    return shapes


def write(folder: Path, shards: Iterable[tuple[int, Shard]], identity: dict) -> dict[str, list[int]]:
    """Write one file per shard. Returns {file name: shape of its latents}."""
    shapes = {}
    for number, shard in shards:
        tensors = {"latents": shard.latents} | ({} if shard.labels is None else {"labels": shard.labels})
        files.save(folder / name_of(number), tensors, {"captions": shard.captions, "made_with": identity})
        shapes[name_of(number)] = list(shard.latents.shape)
    return shapes


def write_everywhere(folder: Path, shards: Iterable[tuple[int, Shard]], identity: dict) -> dict[str, list[int]]:
    """Write the shards of all processes. Returns the shapes of all; raises ValueError or OSError in all if one process fails."""
    shapes: dict[str, list[int]] = {}
    problem = None
    try:
        shapes = write(folder, shards, identity)
    except (ValueError, OSError) as error:
        problem = OSError(str(error)) if isinstance(error, OSError) else ValueError(str(error))
    parts: Any = gather_object([(shapes, problem)])
    if wrong := next((error for _, error in parts if error), None):
        raise wrong
    return {name: shape for some, _ in parts for name, shape in some.items()}


@contextmanager
def shared_folder(folder: Path, state: PartialState) -> Iterator[Path]:
    """Yield `unfinished` to all processes. On success the main process renames it to ``folder``; on ValueError it removes it.

    After a signal and on a full disk it stays, so that the same command continues. Raises ValueError if another process writes there.
    """
    aside = unfinished(folder)

    def claim() -> None:
        lock(aside)
        files.clear_aside(aside)

    agreed(claim)
    try:
        yield aside
    except ValueError:
        if state.is_main_process:
            shutil.rmtree(aside)
            unlock(aside)
        raise
    if state.is_main_process:
        refuse_existing(folder)  # another run may have written it in the meantime
        unlock(aside)
        aside.rename(folder)


def refuse_existing(folder: Path) -> None:
    """Raise ValueError if ``folder`` exists."""
    if folder.exists():
        raise ValueError(f"{folder} exists already; choose another --output-dir")


def describe(model: Teacher, data: datasets.Data, config: Config) -> dict:
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
    }


def load_pair(config: Config) -> tuple[Teacher, datasets.Data]:
    """Load model and data. Raises ValueError for a pixel-space model, for data that are latents, and for shapes that disagree."""
    model = teachers.load(config.model)
    if model.codec is None:
        raise ValueError(f"{config.model} is a pixel-space model without autoencoder; accepted are latent models")
    data = datasets.load(config.data)
    if data.latents is not None:
        raise ValueError(f"{config.data} holds latents already; accepted are images")
    check_match(model, data)
    return model, data


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
        model.to(state.device)
        index = describe(model, data, config)
        total = math.ceil(len(data.images) / config.shard_images / state.num_processes) if data.stream is None else None
        settings = {"shard_images": config.shard_images, "batch_size": config.batch_size, "most": config.most}
        made_with = json.loads(json.dumps(index | settings | {"images_sha256": fingerprint(data.images)}))
        finished = finished_shards(unfinished(folder), made_with)
        with shared_folder(folder, state) as aside:
            shards = encoded(model, data, config, state, finished)
            bar = progress(shards, show=state.is_main_process, desc="latents", unit="shard", total=total)
            shapes = finished | write_everywhere(aside, bar, made_with)
            sizes = {name: shape[0] for name, shape in sorted(shapes.items())}
            index |= {"count": sum(sizes.values()), "shape": next(iter(shapes.values()))[1:], "shards": sizes}
            if state.is_main_process:
                files.write_json(aside / "index.json", index)
        if state.is_main_process:
            print(f"{index['count']:,} latents of {data.name}: {folder}")


if __name__ == "__main__":
    main()
