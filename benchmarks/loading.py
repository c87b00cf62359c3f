"""Training images per second from memory-mapped files, and a folder of JPEGs beside a plain loop of Pillow."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.turns import Figure, Row, clock_of, in_turn
from distill.train import BatchSplit
from eval.machine import cores
from recipes.data import sets

BATCH = 128


def rows(images: int) -> Iterator[Row]:
    yield batches(images)
    yield decoding(min(images, 6_000))


def batches(images: int) -> Figure:
    """Return the training images per CPU second of a memory-mapped .npz of 32x32 colour images."""
    with tempfile.TemporaryDirectory() as folder:
        pixels = np.random.default_rng(0).integers(0, 256, (images, 32, 32, 3), dtype=np.uint8)
        np.savez(f"{folder}/set.npz", images=pixels)
        data = sets.load(f"{folder}/set.npz")
        stream = iter(data.batches(BatchSplit(BATCH), 0, "benchmark", torch.device("cpu"), lambda labels: {})(0))
        next(stream)
        count, began = max(8, images // BATCH), time.process_time()
        for _ in range(count):
            next(stream)
        seconds = time.process_time() - began
    return Figure("training batches of a memory-mapped .npz", BATCH * count / seconds, "images per CPU second", ">= 10,000")


def decoding(images: int) -> Row:
    """Return the wall seconds of --data FOLDER,size=32, on all cores, by those of Pillow in one process."""
    with tempfile.TemporaryDirectory() as folder:
        wave = np.add.outer(np.arange(256), np.arange(256))[..., None] * np.array([1, 2, 3])
        for i in range(images):
            Image.fromarray((127.5 + 127.5 * np.sin(wave / 40 + i)).astype(np.uint8)).save(f"{folder}/{i:06d}.jpg")

        def alone() -> None:
            for path in sorted(Path(folder).iterdir()):
                np.asarray(Image.open(path).convert("RGB").resize((32, 32), Image.Resampling.LANCZOS))

        name, clock = f"folder of 256x256 JPEGs on {cores()} cores by Pillow on one", clock_of("wall", torch.device("cpu"))
        return in_turn(name, lambda: sets.load(f"{folder},size=32"), alone, 3, clock, 1.2 / cores())
