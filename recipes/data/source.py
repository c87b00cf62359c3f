"""Find the images that the paths of a model start from, see `distill.source`: from --source, or from the file of the model."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import teachers
from distill.source import Source, low_resolution
from eval.features import fingerprint
from recipes.data import sets
from recipes.data.sets import Data
from recipes.data.spec import parse
from teachers import Teacher

STD = 0.1  # of the noise on low-resolution images in [-1, 1], where none is given
LOWRES = re.compile(r"lowres=([0-9]{1,4})(?:,noise=([0-9.]{1,9}))?")


def source_of(text: str, spec: str, data: Data) -> Source:
    """Return the source of --source: a data set, or lowres=FACTOR[,noise=STD] of the training data, ``spec`` and ``data``.

    Raises ValueError for anything else, and for images of another shape than the data's.
    """
    if not text.startswith("lowres"):
        source = _checked({"data": text}, sets.load(_stored(text)))
        if source.take(torch.tensor([0]), torch.device("cpu")).shape[1:] != data.sample_shape:
            raise ValueError(
                f"--source {text} has other samples than {data.sample_shape}, those of {data.name}: they must agree"
            )
        return source
    found = LOWRES.fullmatch(text)
    try:
        factor, std = int(found[1]), float(found[2] or STD)  # type: ignore[index]
    except (TypeError, ValueError):
        raise ValueError(f"--source {text}: accepted are a data set, lowres=4 and lowres=4,noise={STD:g}") from None
    source = _checked({"data": _stored(spec), "lowres": factor, "noise": std}, data)
    low_resolution(torch.zeros(1, *data.sample_shape), factor)
    return source


def load(spec: str, weights: bool = True) -> Teacher:
    """Load a model of any start: from noise, or from the images that its file names. ``weights``: as in `teachers.load`.

    Raises ValueError where the images are not there.
    """
    return teachers.load(spec, source=found, weights=weights)


def found(facts: dict[str, Any]) -> Source:
    """Return the source that a model's file names. Raises ValueError where its images cannot be loaded, or have changed."""
    name = str(facts["data"])
    try:
        source = _checked({key: value for key, value in facts.items() if key != "sha256"}, sets.load(_stored(name)))
    except (ValueError, OSError) as error:
        raise ValueError(f"samples start from images of {name[:80]!r}, which cannot be loaded: {error}") from None
    if source.facts != facts:
        raise ValueError(f"samples start from images of {name[:80]!r}, which have changed since the training")
    return source


def _stored(spec: str) -> str:
    """Return the spec of a set on this machine: a model's file must not cause a download. Raises ValueError for others."""
    kind, where, options = parse(spec)
    if "download" in options or (kind == "hf" and not Path(where).is_dir()):
        raise ValueError(f"{spec} as a source: accepted are sets that are stored on this machine")
    return spec


def _checked(facts: dict[str, Any], data: Data) -> Source:
    lowres, std = facts.get("lowres"), facts.get("noise", 0.0)
    if data.latents is not None or data.imageless or data.stream is not None:
        raise ValueError(f"{data.name} as a source: accepted are images that are held in memory")
    if lowres is not None and (data.bits is not None or not 2 <= lowres <= 4096 or not 0 <= std <= 10):
        raise ValueError(
            f"lowres={lowres},noise={std:g}: accepted are factors from 2 and noise from 0 to 10, of images without bits"
        )
    plain = replace(data, flip=False)
    return Source(plain.x0, len(data.images), facts | {"sha256": fingerprint(data.images)}, lowres, std)
