"""Seconds per image of all cells of a report, timed in rounds, so that a machine's drift meets every cell alike.

Each of `ROUNDS` rounds times one batch of every cell, forwards and backwards in turn. A cell's time is the median over the rounds. Its
interval goes from the fastest round to the slowest: with six independent rounds it covers the median with a probability of 97 %,
whatever the distribution (1 - 2/2^6). Rounds also pair the cells: differences are taken within a round. All rounds together generate a
twelfth of the images that the cells are measured with, or 96 images a cell where that is more.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor

from eval.cells import Cell, Protocol, digest, head, read_sealed, write_sealed
from eval.generate import generate, initial_noise
from eval.machine import clock
from eval.progress import progress

ROUNDS = 6
SMALLEST = 16  # images of a timed batch, unless a chunk is smaller
FILE = "timings.json"


def batch_size(protocol: Protocol) -> int:
    """Return the images of a timed batch."""
    return batch_of(protocol.images, protocol.chunk)


def batch_of(images: int, chunk: int) -> int:
    """Return the images of a timed batch, of a sweep of ``images`` in chunks."""
    return min(chunk, max(SMALLEST, images // (12 * ROUNDS)))


def timed(cells: list[Cell], rows: list[dict], protocol: Protocol, accelerator: Accelerator, folder: Path) -> list[dict]:
    """Return the rows with their times; those with "error" unchanged. Every process must call this.

    Adds ``seconds_rounds`` [`ROUNDS`], their median ``seconds_per_image``, their range ``seconds_interval``, and ``timing``: only rows
    with the same value were timed side by side. Rows of latent models get the median of decoding, ``decode_seconds_per_image``. A row
    with ``same_as`` shares the times of the cell that it names. Times of these very cells that ``folder`` holds are read, not measured
    again.
    """
    own = [cell for cell, row in zip(cells, rows, strict=True) if not row.keys() & {"error", "same_as"}]
    of = digest({"cells": [head(cell, protocol) for cell in own]})
    times = broadcast_object_list([_read(folder / FILE, of) if accelerator.is_main_process else None])[0]
    if times is None:
        sampling, decoding = rounds(own, protocol, accelerator).tolist()
        names = [cell.name for cell in own]
        times = {
            "of": of,
            "seconds": dict(zip(names, sampling, strict=True)),
            "decoding": dict(zip(names, decoding, strict=True)),
        }
        if accelerator.is_main_process and own:
            write_sealed(folder / FILE, times)
    timing = digest(times["seconds"])[:16]
    return [row if "error" in row else row | _summary(times, row.get("same_as", row["name"]), timing) for row in rows]


def rounds(cells: list[Cell], protocol: Protocol, accelerator: Accelerator) -> Tensor:
    """Return the seconds per image of sampling and of decoding, float64 [2, cells, `ROUNDS`], as the mean over the processes.

    Decoding takes 0 seconds where a model is not latent.
    """
    device, batch = accelerator.device, batch_size(protocol)
    seconds = torch.zeros(2, len(cells), ROUNDS, dtype=torch.float64)
    bar = progress(range(ROUNDS), desc="timing", unit="round", show=accelerator.is_main_process, leave=False)
    for turn in bar:
        accelerator.wait_for_everyone()
        forwards = range(len(cells))
        for i, cell, fresh in _in_memory(cells, forwards if turn % 2 == 0 else reversed(forwards), device):
            noise = initial_noise(range(batch), cell.model.shape, cell.model.classes, protocol.seed, device)
            denoiser, times = cell.denoiser, cell.times
            if turn == 0 or fresh:
                warm_up(cell, range(batch), protocol.seed, device)
            began = clock(device)
            x0 = generate(denoiser, cell.sampling, times, noise, cell.model.condition, device)
            sampled = clock(device)
            seconds[0, i, turn] = (sampled - began) / batch
            if cell.model.codec is not None:
                cell.model.decode(x0)
                seconds[1, i, turn] = (clock(device) - sampled) / batch
    return accelerator.reduce(seconds.to(device), "mean").cpu()


def _in_memory(cells: list[Cell], order: Iterable[int], device: torch.device) -> Iterator[tuple[int, Cell, bool]]:
    """Yield (index, cell with its model in memory, whether it was loaded just now). One stored model is in memory at a time."""
    stored: Any = None
    model: Any = None
    for i in order:
        fresh = cells[i].model is not stored
        cell = cells[i].loaded(device) if fresh else replace(cells[i], model=model)
        stored, model = cells[i].model, cell.model
        yield i, cell, fresh


def warm_up(cell: Cell, indices: range, seed: int, device: torch.device) -> None:
    """Make one network call of the size to come, which is neither timed nor counted."""
    noise = initial_noise(indices, cell.model.shape, cell.model.classes, seed, device)
    with torch.inference_mode():
        cell.denoiser(noise.noise, cell.times[0], **cell.model.condition(noise.labels))


def _summary(times: dict[str, Any], name: str, timing: str) -> dict:
    seconds, decoding = times["seconds"][name], times["decoding"][name]
    spread = {"seconds_per_image": median(seconds), "seconds_interval": [min(seconds), max(seconds)]}
    decode = {"decode_seconds_per_image": median(decoding)} if max(decoding) else {}
    return spread | {"seconds_rounds": seconds, "timing": timing} | decode


def _read(path: Path, of: str) -> dict[str, Any] | None:
    try:
        data, _ = read_sealed(path)
    except (OSError, ValueError):
        return None
    return data if data.get("of") == of else None
