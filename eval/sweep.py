"""A sweep: measure cells (model, sampling, steps) on shared noise, over any number of processes, and keep each finished cell."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor
from tqdm import tqdm

from distill import files
from distill.denoiser import DenoiserLike
from distill.sampling import SEARCHED, Sampling
from eval.collect import COLLECTORS, Collector
from eval.features import Extractor
from eval.generate import LABEL_RULE, chunks, counted, images, initial_noise
from eval.machine import clock, peak_memory_gb
from eval.metrics import Features, Reference
from eval.progress import note, progress
from teachers.saved import Stored

KEPT = 256  # images kept per cell for sample grids and drift; fewer, but at least 16, if they exceed KEPT_BYTES
KEPT_BYTES = 8_000_000


@dataclass(frozen=True)
class Cell:
    """Hold what is measured for one row. ``label`` names the model in the report; ``role`` is "teacher" or "student".

    ``model``: a `Teacher`, or the `Stored` name of one, which `loaded` reads.
    """

    label: str
    role: str
    model: Any
    sampling: Sampling
    steps: int
    guidance: float = 1.0
    training_seconds: float | None = None

    @property
    def name(self) -> str:
        return f"{self.label} {self.sampling.label}{' searched' if self.sampling.grid == SEARCHED else ''} {self.steps}"

    def loaded(self, device: torch.device) -> Cell:
        """Return the cell with its model in memory, on ``device``."""
        return replace(self, model=self.model.load().to(device)) if isinstance(self.model, Stored) else self

    @property
    def times(self) -> Tensor:
        """The time grid, float64 [steps + 1]."""
        return self.sampling.times_for(self.denoiser.schedule, self.steps)

    @property
    def cost(self) -> int:
        """The network evaluations per image, at most."""
        return self.sampling.calls(self.steps) * (2 if self.guidance != 1 else 1)

    @property
    def denoiser(self) -> DenoiserLike:
        return self.model.guided(self.guidance)


@dataclass(frozen=True)
class Protocol:
    """Hold what must be equal for two numbers to be comparable. It is part of every report."""

    images: int
    seed: int
    chunk: int
    features: str
    features_sha256: str
    reference: str
    reference_images: int
    reference_sha256: str
    metrics: str = "all"
    rounding: str = "round((x + 1) 127.5)"
    resize: str = "none"
    labels: str = LABEL_RULE
    generation: str = "float32, autocast off"

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]


def sweep(
    cells: list[Cell], protocol: Protocol, extractor: Extractor, reference: Reference, accelerator: Accelerator, folder: Path
) -> list[dict]:
    """Return one row per cell, in order. Cells that are finished in ``folder`` under the same protocol are not measured again.

    A cell with images that are not finite gives a row with "error", and the others go on. Every process returns the same rows.
    """
    done = [_finished(folder, cell, protocol) for cell in cells] if accelerator.is_main_process else [None] * len(cells)
    broadcast_object_list(done)
    rows: list[dict] = []
    todo = sum(cell.cost for cell, row in zip(cells, done, strict=True) if row is None)
    main = accelerator.is_main_process
    with progress(total=todo * protocol.images, unit="NFE", unit_scale=True, show=main, smoothing=0.05) as bar:
        for number, (cell, row) in enumerate(zip(cells, done, strict=True), 1):
            if row is None:
                bar.set_description_str(f"cell {number}/{len(cells)}: {cell.name}", refresh=False)
                row = _measure_cell(cell.loaded(accelerator.device), protocol, extractor, reference, accelerator, folder, bar)
                if main:
                    note(f"cell {number}/{len(cells)}: {cell.name}: {row.get('error') or 'FID {:.4g}'.format(row['fid'])}")
            rows.append(row)
    return rows


def picture_path(cells: Path, name: str) -> Path:
    """Return the file in the folder ``cells`` that holds the first images of the cell ``name``."""
    return cells / f"{_slug(name)}.safetensors"


def pictures(path: Path) -> Tensor:
    """Load the first images of a finished cell, uint8 [at most KEPT, C, H, W]."""
    return files.load(path)[0]["images"]


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() or c in "@+-." else "_" for c in name)


def _finished(folder: Path, cell: Cell, protocol: Protocol) -> dict | None:
    try:
        row = json.loads((folder / f"{_slug(cell.name)}.json").read_text())
    except (OSError, json.JSONDecodeError):
        return None
    same = all(row.get(key) == value for key, value in _head(cell, protocol).items())
    return row if same else None


def _head(cell: Cell, protocol: Protocol) -> dict:
    """Return the part of a row that identifies its cell. A finished row with another head belongs to another cell."""
    times = cell.sampling.times.get(cell.steps)
    return {
        "name": cell.name,
        "model": cell.label,
        "role": cell.role,
        "sampler": cell.sampling.label,
        "grid": cell.sampling.grid,
        "steps": cell.steps,
        "times": None if times is None else list(times),
        "guidance": cell.guidance,
        "images": protocol.images,
        "model_sha256": cell.model.fingerprint,
        "protocol": protocol.digest,
    }


def _measure_cell(
    cell: Cell,
    protocol: Protocol,
    extractor: Extractor,
    reference: Reference,
    accelerator: Accelerator,
    folder: Path,
    bar: tqdm,
) -> dict:
    row = _head(cell, protocol)
    collector = COLLECTORS[protocol.metrics]()
    first, facts = _generate_cell(cell, protocol, extractor, accelerator, collector, bar)
    if "error" in facts:
        return row | facts
    numbers = [collector.numbers(accelerator, reference, protocol.images, cell.model.classes)]
    row |= facts | broadcast_object_list(numbers)[0]
    if cell.training_seconds is not None:
        row["training_seconds"] = cell.training_seconds
    if accelerator.is_main_process:
        files.save(picture_path(folder, cell.name), {"images": first}, {"images": cell.name})
        files.write_json(folder / f"{_slug(cell.name)}.json", row)
    return row


def _generate_cell(
    cell: Cell, protocol: Protocol, extractor: Extractor, accelerator: Accelerator, collector: Collector, bar: tqdm
) -> tuple[Tensor, dict]:
    """Give the features of this process's chunks to ``collector``. Return the first images, and costs or "error"."""
    device, world, calls = accelerator.device, accelerator.num_processes, [0]
    mine = chunks(protocol.images, protocol.chunk, accelerator.process_index, world)
    first, bad, entered = torch.empty(0), protocol.images, clock(device)
    made, seconds, decoding, saturated = 0, 0.0, 0.0, 0.0
    _warm_up(cell, mine, protocol, device)
    denoiser = counted(cell.denoiser, calls)
    for batch in images(cell.model, cell.sampling, cell.steps, mine, protocol.seed, device, denoiser=denoiser):
        seconds, decoding = seconds + batch.seconds, decoding + batch.decode_seconds
        index = batch.index[batch.index < protocol.images]  # the excess of the last chunk is dropped
        if not (finite := batch.images.flatten(1).isfinite().all(1).cpu()[: len(index)]).all():
            bad = int(index[~finite][0])
            break
        made += len(batch.images)
        saturated += int((batch.images.abs() > 1.1).sum()) / batch.images[0].numel()  # a slight overshoot does not count
        pixels = batch.pixels
        if index[0] == 0:
            first = pixels[: max(16, min(KEPT, KEPT_BYTES // pixels[0].numel()))].cpu()
        features, labels = extractor(pixels), None if batch.labels is None else batch.labels[: len(index)]
        logits = None if features.logits is None else features.logits[: len(index)]
        collector.add(index, labels, Features(features.fid[: len(index)], logits))
        bar.update(len(index) * world * cell.cost)
    if (worst := min(gather_object([bad]))) < protocol.images:
        return first, {"error": f"image {worst} of cell {cell.name!r} is not finite"}
    totals = torch.tensor([made, calls[0], seconds, decoding, saturated], dtype=torch.float64)
    made, *totals = accelerator.reduce(totals.to(device)).tolist()
    names = ("nfe", "seconds_per_image", "decode_seconds_per_image", "saturated_pixels")
    facts = dict(zip(names, (total / made for total in totals), strict=True))
    if cell.model.codec is None:
        del facts["decode_seconds_per_image"]
    walls, peaks = zip(*gather_object([(clock(device) - entered, peak_memory_gb(device))]), strict=True)
    return first, facts | {"wall_seconds": max(walls), "peak_memory_gb": max(peaks)}


def _warm_up(cell: Cell, mine: list[range], protocol: Protocol, device: torch.device) -> None:
    """Make one network call of the size to come, which is neither timed nor counted."""
    if mine:
        noise = initial_noise(mine[0], cell.model.shape, cell.model.classes, protocol.seed)
        labels = None if noise.labels is None else noise.labels.to(device)
        with torch.inference_mode():
            cell.denoiser(noise.noise.to(device), cell.times[0], **cell.model.condition(labels))
