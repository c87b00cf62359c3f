"""A sweep: cells (model, sampler, steps), all from the same noise, over any number of processes, finished cell by cell."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor
from tqdm import tqdm

from distill import checkpoint
from distill.denoiser import DenoiserLike
from distill.grid import GRIDS
from distill.solver import nfe
from eval.collect import COLLECTORS, Collector
from eval.features import Extractor
from eval.generate import LABEL_RULE, chunks, counted, generate, peak_memory_gb, start, synchronise, to_uint8
from eval.metrics import Features, Reference
from teachers import Teacher

KEPT = 256  # images of each cell that are kept for the sample grids and for the drift, where they are small
KEPT_BYTES = 8_000_000


@dataclass(frozen=True)
class Cell:
    """One measurement. ``label`` names the model in the report; ``role`` is "teacher" or "student"."""

    label: str
    role: str
    model: Teacher
    sampler: str
    steps: int
    grid: str = "uniform"
    guidance: float = 1.0
    times: tuple[float, ...] | None = None  # instead of the grid's, which then only names them
    training_seconds: float | None = None

    @property
    def name(self) -> str:
        return f"{self.label} {self.sampler}{'' if self.grid in GRIDS else ' ' + self.grid} {self.steps}"

    @property
    def grid_times(self) -> Tensor:
        if self.times is not None:
            return torch.tensor(self.times, dtype=torch.float64)
        return GRIDS[self.grid](self.denoiser.schedule, self.steps)

    @property
    def cost(self) -> int:
        """Network evaluations an image, at most."""
        return nfe(self.sampler, self.steps) * (2 if self.guidance != 1 else 1)

    @property
    def denoiser(self) -> DenoiserLike:
        return self.model.guided(self.guidance)


@dataclass(frozen=True)
class Protocol:
    """What has to be equal for two numbers to be comparable; it stands in every report."""

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
    cells: list[Cell],
    protocol: Protocol,
    extractor: Extractor,
    reference: Reference,
    accelerator: Accelerator,
    folder: Path,
) -> list[dict]:
    """One row a cell, in order; finished rows lie in ``folder`` and are not measured again under the same protocol.

    A cell whose images are not finite gives a row with "error"; the others go on. Every process returns the same rows.
    """
    done = [_finished(folder, cell, protocol) for cell in cells] if accelerator.is_main_process else [None] * len(cells)
    broadcast_object_list(done)
    rows: list[dict] = []
    todo = sum(cell.cost for cell, row in zip(cells, done, strict=True) if row is None)
    hidden = None if accelerator.is_main_process else True
    with tqdm(total=todo * protocol.images, unit="NFE", unit_scale=True, disable=hidden, smoothing=0.05) as bar:
        for number, (cell, row) in enumerate(zip(cells, done, strict=True), 1):
            if row is None:
                bar.set_description(f"cell {number}/{len(cells)}: {cell.name}")
                row = _measure_cell(cell, protocol, extractor, reference, accelerator, folder, bar)
            rows.append(row)
    return rows


def picture_path(cells: Path, name: str) -> Path:
    return cells / f"{_slug(name)}.safetensors"


def pictures(path: Path) -> Tensor:
    """The first images of a finished cell, uint8 [at most KEPT, C, H, W]."""
    return checkpoint.load(path)[0]["images"]


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
    """What a row says of its cell before anything is measured; a finished row with another head is another cell's."""
    return {
        "name": cell.name,
        "model": cell.label,
        "role": cell.role,
        "sampler": cell.sampler,
        "grid": cell.grid,
        "steps": cell.steps,
        "times": None if cell.times is None else list(cell.times),
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
        checkpoint.save(picture_path(folder, cell.name), {"images": first}, {"images": cell.name})
        checkpoint.write_json(folder / f"{_slug(cell.name)}.json", row)
    return row


def _generate_cell(
    cell: Cell, protocol: Protocol, extractor: Extractor, accelerator: Accelerator, collector: Collector, bar: tqdm
) -> tuple[Tensor, dict]:
    """Hands the features of this process's chunks to ``collector``; the first images, and the cost and faults of making them."""
    device, world, calls = accelerator.device, accelerator.num_processes, [0]
    denoiser, times = counted(cell.denoiser, calls), cell.grid_times
    mine = chunks(protocol.images, protocol.chunk, accelerator.process_index, world)
    first, bad, entered = torch.empty(0), protocol.images, synchronise(device)
    made, seconds, decoding, saturated = 0, 0.0, 0.0, 0.0
    _warm_up(cell, times, mine, protocol, device)
    for indices in mine:
        begin = start(indices, cell.model.shape, cell.model.classes, protocol.seed)
        began = synchronise(device)
        x0 = generate(denoiser, cell.sampler, times, begin, cell.model.condition, device)
        generated = synchronise(device)
        images = cell.model.decode(x0)
        seconds, decoding = seconds + generated - began, decoding + synchronise(device) - generated
        index = torch.tensor(indices)
        index = index[index < protocol.images]  # what the last chunk makes past the end is dropped
        if not (finite := images.flatten(1).isfinite().all(1).cpu()[: len(index)]).all():
            bad = int(index[~finite][0])
            break
        made += len(images)
        saturated += int((images.abs() > 1.1).sum()) / images[0].numel()  # by more than a slight overshoot
        pixels = to_uint8(images)
        first = pixels[: _kept(pixels)].cpu() if indices.start == 0 else first
        features, labels = extractor(pixels), None if begin.labels is None else begin.labels[: len(index)]
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
    walls, peaks = zip(*gather_object([(synchronise(device) - entered, peak_memory_gb(device))]), strict=True)
    return first, facts | {"wall_seconds": max(walls), "peak_memory_gb": max(peaks)}


def _kept(pixels: Tensor) -> int:
    return max(16, min(KEPT, KEPT_BYTES // pixels[0].numel()))


def _warm_up(cell: Cell, times: Tensor, mine: list[range], protocol: Protocol, device: torch.device) -> None:
    """One network call of the size to come, outside the clock and the count."""
    if mine:
        begin = start(mine[0], cell.model.shape, cell.model.classes, protocol.seed)
        with torch.inference_mode():
            labels = None if begin.labels is None else begin.labels.to(device)
            cell.denoiser(begin.noise.to(device), times[0], **cell.model.condition(labels))
