"""A sweep: measure cells (model, sampling, steps) on shared noise, over any number of processes, and keep each finished cell."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor
from tqdm import tqdm

from eval.arithmetic import arithmetic
from eval.behind import one_behind
from eval.cells import Cell, Protocol, finished, head, save
from eval.clip import Clip
from eval.collect import COLLECTORS, Collector, More
from eval.features import Extractor
from eval.generate import Batch, chunks, counted, images
from eval.machine import clock, peak_memory_gb
from eval.metrics import Features, Reference
from eval.progress import note, progress
from eval.timing import timed

KEPT = 256  # images kept per cell for sample grids and drift; fewer, but at least 16, if they exceed KEPT_BYTES
KEPT_BYTES = 8_000_000


def sweep(
    cells: list[Cell],
    protocol: Protocol,
    extractor: Extractor,
    reference: Reference,
    accelerator: Accelerator,
    folder: Path,
    classes: Mapping[str, int] | None = None,
) -> list[dict]:
    """Return one row per cell name, in order. Cells that are finished in ``folder`` under the same protocol are not measured again.

    Cells of equal `arithmetic` are measured once: the later ones get the numbers of the first, whose name is in ``same_as``. A cell with
    images that are not finite gives a row with "error", and the others go on. At the end all cells are `timed` in rounds. Every process
    returns the same rows. ``classes``: of captions, for the class agreement of text-to-image models.
    """
    cells = list({cell.name: cell for cell in cells}.values())
    main, first = accelerator.is_main_process, _first_of_its_kind(cells)
    done: list[dict | None] = [None] * len(cells)
    if main:
        done = [finished(folder, cell, protocol) if same is cell else None for cell, same in zip(cells, first, strict=True)]
    broadcast_object_list(done)
    rows: dict[str, dict] = {}
    todo = sum(cell.cost for cell, same, row in zip(cells, first, done, strict=True) if row is None and same is cell)
    with progress(total=todo * protocol.images, unit="NFE", unit_scale=True, show=main, smoothing=0.05) as bar:
        for number, (cell, same, row) in enumerate(zip(cells, first, done, strict=True), 1):
            if same is not cell:
                row = rows[same.name] | head(cell, protocol) | {"same_as": same.name}
            elif row is None:
                bar.set_description_str(f"cell {number}/{len(cells)}: {cell.name}", refresh=False)
                known = (protocol, extractor, reference, accelerator, folder, classes or {}, bar)
                row = _measure_cell(cell.loaded(accelerator.device), *known)
                if main:
                    found = row.get("error") or f"{protocol.distance or 'FID'} {row['fid']:.4g}"
                    note(f"cell {number}/{len(cells)}: {cell.name}: {found}")
            rows[cell.name] = row | cell.facts
    return timed(cells, list(rows.values()), protocol, accelerator, folder)


def _first_of_its_kind(cells: list[Cell]) -> list[Cell]:
    """Return for each cell the first one of equal arithmetic, which may be the cell itself."""
    first: dict[str, Cell] = {}
    return [first.setdefault(arithmetic(cell), cell) for cell in cells]


def _measure_cell(
    cell: Cell,
    protocol: Protocol,
    extractor: Extractor,
    reference: Reference,
    accelerator: Accelerator,
    folder: Path,
    classes: Mapping[str, int],
    bar: tqdm,
) -> dict:
    row = head(cell, protocol)
    collector = COLLECTORS[protocol.metrics](reference, _clip_numbers(cell, extractor, reference))
    first, facts = _generate_cell(cell, protocol, extractor, accelerator, collector, bar)
    if "error" in facts:
        return row | facts
    numbers = [collector.numbers(accelerator, protocol.images, *_wanted(cell, classes))]
    row |= facts | broadcast_object_list(numbers)[0]
    if accelerator.is_main_process:
        save(folder, row, first)
    return row


def _wanted(cell: Cell, classes: Mapping[str, int]) -> tuple[list[int], int]:
    """Return the class of each label, and their number: the label, or for a text-to-image model that of its prompt, -1 if unknown."""
    if (table := cell.model.embeddings) is None:
        return [*range(cell.model.classes or 0)], cell.model.classes or 0
    return [classes.get(prompt, -1) for prompt in table.prompts], max(classes.values(), default=-1) + 1


def _clip_numbers(cell: Cell, extractor: Extractor, reference: Reference) -> More | None:
    """Return what adds CMMD and CLIP score to a row, where the extractor is a CLIP."""
    clip, table = extractor.module, cell.model.embeddings
    if not isinstance(clip, Clip):
        return None
    prompts = [] if table is None or not table.prompts else [*table.prompts, ""]  # the last row is that of the empty prompt

    def numbers(features: Tensor, labels: Tensor | None) -> dict:
        captions = [prompts[label] for label in labels.tolist()] if prompts and labels is not None else []
        return clip.numbers(features, reference.features, captions)

    return numbers


def _generate_cell(
    cell: Cell, protocol: Protocol, extractor: Extractor, accelerator: Accelerator, collector: Collector, bar: tqdm
) -> tuple[Tensor, dict]:
    """Give the features of this process's chunks to ``collector``. Return the first images, and costs or "error"."""
    device, world, calls = accelerator.device, accelerator.num_processes, [0]
    mine = chunks(protocol.images, protocol.chunk, accelerator.process_index, world)
    first, bad, entered, made, saturated = torch.empty(0), protocol.images, clock(device), 0, 0.0
    denoiser = counted(cell.denoiser, calls)
    batches = images(cell.model, cell.sampling, cell.steps, mine, protocol.seed, device, denoiser=denoiser)
    for chunk in one_behind(_Chunk.of(batch, extractor) for batch in batches):
        made, saturated = made + len(chunk.index), saturated + int(chunk.saturated) / chunk.values
        index = chunk.index[chunk.index < protocol.images]  # the excess of the last chunk is dropped
        if not (finite := chunk.finite[: len(index)]).all():
            bad = int(index[~finite][0])
            break
        first = first if chunk.shown is None else chunk.shown
        labels, logits = (None if rows is None else rows[: len(index)] for rows in (chunk.labels, chunk.logits))
        collector.add(index, labels, Features(chunk.features[: len(index)], logits))
        bar.update(len(index) * world * cell.cost)
    if (worst := min(gather_object([bad]))) < protocol.images:
        return first, {"error": f"image {worst} of cell {cell.name!r} is not finite"}
    totals = torch.tensor([made, calls[0], saturated], dtype=torch.float64)
    made, *totals = accelerator.reduce(totals.to(device)).tolist()
    facts = dict(zip(("nfe", "saturated_pixels"), (total / made for total in totals), strict=True))
    walls, peaks = zip(*gather_object([(clock(device) - entered, peak_memory_gb(device))]), strict=True)
    return first, facts | {"wall_seconds": max(walls), "peak_memory_gb": max(peaks)}


@dataclass(frozen=True)
class _Chunk:
    """Hold what a sweep wants of n images: all but the index is on the device.

    ``values``: of one image. ``finite`` [n]. ``saturated``: number of values beyond [-1, 1]. ``shown``: images of the first chunk to keep,
    uint8. ``features`` [n, D] and ``logits`` [n, C].
    """

    index: Tensor
    labels: Tensor | None
    values: int
    finite: Tensor
    saturated: Tensor
    shown: Tensor | None
    features: Tensor
    logits: Tensor | None

    @classmethod
    def of(cls, batch: Batch, extractor: Extractor) -> _Chunk:
        """Return the measurement of a batch, without waiting for the device."""
        x, pixels, values = batch.images, batch.pixels, batch.images[0].numel()
        shown = pixels[: max(16, min(KEPT, KEPT_BYTES // values))] if batch.index[0] == 0 else None
        finite, saturated = x.flatten(1).isfinite().all(1), (x.abs() > 1.1).sum()  # a slight overshoot does not count
        features = extractor.on_device(pixels)
        return cls(batch.index, batch.labels, values, finite, saturated, shown, features.fid, features.logits)
