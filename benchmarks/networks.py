"""The networks that are measured, each with data of its shape and a batch: the embedded one, and ten million random weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

import teachers
from recipes.data import sets
from recipes.data.sets import Data
from teachers import Teacher
from teachers.students import untrained


@dataclass(frozen=True)
class Network:
    """Hold a model, a data set of its shape, and the samples of a training step."""

    model: Teacher
    data: Data
    batch: int


def digits() -> Network:
    return Network(teachers.load("digits"), sets.load("digits"), 128)


def unet_10m() -> Network:
    """Return a UNet2DModel of 9.66 M random weights at 3x32x32, on random images."""
    images = torch.randint(0, 256, (1024, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Network(untrained((3, 32, 32), 10, (64, 128, 192), 2, 0), Data.of(images, torch.arange(1024) % 10, "random"), 32)


NETWORKS: dict[str, Callable[[], Network]] = {"digits": digits, "unet-10m": unet_10m}
