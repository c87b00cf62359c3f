"""Whether a teacher, a set of data and a sampler go together, before anything is started."""

from __future__ import annotations

from pathlib import Path

import teachers
from distill import solver
from distill.schedule import Table
from recipes.data import Data
from recipes.stored import codec_sha256
from teachers import Teacher
from teachers.codec import Codec


def check_match(teacher: Teacher, data: Data, training: bool = False) -> Data:
    """The data, by their captions where the teacher is told prompts. ValueError where the teacher cannot be measured on them or,
    ``training``, distilled."""
    if teacher.table is not None and data.captions is not None:
        data = data.captioned(teacher.record.get("prompts", []))
    if data.latents is not None:
        _check_latents(teacher, data)
    elif training and teacher.codec is not None:
        raise ValueError(f"the teacher works on latents, {data.name} holds images: recipes/latents.py makes latents of them")
    elif teacher.image_shape != data.shape:
        raise ValueError(
            f"the teacher makes images of shape {teacher.image_shape}, {data.name} holds {data.shape}: they must agree"
        )
    if teacher.classes is not None and data.labels is None:
        raise ValueError(f"the teacher is conditional on {teacher.classes} classes, {data.name} has no labels")
    if teacher.classes is not None and data.classes is not None and data.classes > teacher.classes:
        raise ValueError(f"{data.name} has {data.classes} classes, the teacher knows {teacher.classes}")
    return data


def _check_latents(teacher: Teacher, data: Data) -> None:
    index, codec = data.latents or {}, teacher.codec
    if codec is None or teacher.shape != data.shape:
        works = "images" if codec is None else "latents"
        raise ValueError(
            f"{data.name} holds latents of {index['model']} and shape {data.shape}, the teacher works on {works} of"
            f" {teacher.shape}: they must agree"
        )
    here = {"scale": codec.scale, "shift": codec.shift, "codec_sha256": codec_sha256(codec)}
    if wrong := [key for key, value in here.items() if index[key] != value]:
        key = wrong[0]
        raise ValueError(
            f"{data.name}: latents with {key} {index[key]!r:.14}, the teacher's has {here[key]!r:.14}: make them with its own"
        )


def codec_of(data: Data) -> Codec | None:
    """The autoencoder that the latents were made by; None for images. ValueError where it is gone or another by now."""
    if data.latents is None:
        return None
    described = data.latents.get("codec", {})
    codec: Codec | None
    if "folder" in described:
        codec = Codec.from_description(described, Path())
    else:  # of a model that is no pipeline
        codec = teachers.load(data.latents["model"]).codec
    if codec is None or codec_sha256(codec) != data.latents["codec_sha256"]:
        raise ValueError(
            f"{data.name}: the autoencoder of {data.latents['model']} is not the one that these latents were made by"
        )
    return codec


def check_steps(teacher: Teacher, steps: tuple[int, ...]) -> None:
    """ValueError where a step count is more than the model's discrete table has entries."""
    schedule = teacher.denoiser.schedule
    most = schedule.steps if isinstance(schedule, Table) else 100_000
    if wrong := [n for n in steps if not 1 <= n <= most]:
        raise ValueError(f"{wrong[0]} steps on a grid of {most:,}: accepted are 1 to {most}")


def check_sampler(teacher: Teacher, name: str) -> None:
    """ValueError for an unknown sampler, and for jumps by a network that cannot be told where they end."""
    solver.named(name)
    net = getattr(teacher.denoiser, "net", None)
    if name == "jump" and not getattr(net, "two_times", True):
        raise ValueError("sampler 'jump' needs a network of two times (--method meanflow makes them): this one knows one")
