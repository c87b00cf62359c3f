"""A sweep: cells (model, sampler, steps), all from the same noise, over any number of processes, finished cell by cell."""

from __future__ import annotations

import hashlib
import json
import math
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
from eval.features import Extractor
from eval.generate import LABEL_RULE, chunks, counted, generate, start, synchronise, to_uint8
from eval.metrics import Features, Reference, measure
from teachers import Teacher

PICTURED = 16  # images of each cell that are kept for the sample grids


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

    @property
    def name(self) -> str:
        return f"{self.label} {self.sampler} {self.steps}"

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
    rounding: str = "round((x + 1) 127.5)"
    resize: str = "none"
    labels: str = LABEL_RULE
    generation: str = "float32, autocast off"

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]


class NotFinite(ArithmeticError):
    """A generated image holds a NaN or an infinity; the message names its index."""


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
    for cell, row in zip(cells, done, strict=True):
        if row is None:
            row = _measure_cell(cell, protocol, extractor, reference, accelerator, folder)
        rows.append(row)
    return rows


def pictures(folder: Path, row: dict) -> Tensor:
    """The first images of a finished cell, uint8 [at most PICTURED, C, H, W]."""
    return checkpoint.load(folder / f"{_slug(row['name'])}.safetensors")[0]["images"]


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
        "guidance": cell.guidance,
        "images": protocol.images,
        "model_sha256": cell.model.fingerprint,
        "protocol": protocol.digest,
    }


def _measure_cell(
    cell: Cell, protocol: Protocol, extractor: Extractor, reference: Reference, accelerator: Accelerator, folder: Path
) -> dict:
    row = _head(cell, protocol)
    try:
        parts, first, facts = _generate_cell(cell, protocol, extractor, accelerator)
    except NotFinite as error:
        return row | {"error": str(error)}
    numbers: list = [None]
    if accelerator.is_main_process:
        features, labels = _in_order(parts, protocol.images)
        numbers = [measure(features, reference) | {"agreement": _agreement(features, labels, cell.model.classes)}]
    row |= facts | broadcast_object_list(numbers)[0]
    if accelerator.is_main_process:
        checkpoint.save(folder / f"{_slug(cell.name)}.safetensors", {"images": first}, {"images": cell.name})
        checkpoint.write_json(folder / f"{_slug(cell.name)}.json", row)
    return row


def _generate_cell(
    cell: Cell, protocol: Protocol, extractor: Extractor, accelerator: Accelerator
) -> tuple[list[dict], Tensor, dict]:
    """Features by index as they were gathered (main process), the first images, and the cost and faults of making them."""
    device, calls = accelerator.device, [0]
    denoiser = counted(cell.denoiser, calls)
    times = GRIDS[cell.grid](denoiser.schedule, cell.steps)
    mine = chunks(protocol.images, protocol.chunk, accelerator.process_index, accelerator.num_processes)
    rounds = len(chunks(protocol.images, protocol.chunk, 0, accelerator.num_processes))
    parts, first = [], torch.empty(0)
    made, seconds, saturated = 0, 0.0, 0
    _warm_up(cell, times, mine, protocol, device)
    hidden = None if accelerator.is_main_process else True
    with tqdm(total=protocol.images, desc=cell.name, unit="img", disable=hidden, leave=False) as bar:
        for turn in range(rounds):
            part = None
            if turn < len(mine):
                begin = start(mine[turn], cell.model.shape, cell.model.classes, protocol.seed)
                began = synchronise(device)
                images = generate(denoiser, cell.sampler, times, begin, cell.model.condition, device)
                seconds += synchronise(device) - began
                made += len(images)
                saturated += int(((images < -1) | (images > 1)).sum())
                pixels, bad = to_uint8(images), ~images.flatten(1).isfinite().all(1).cpu()
                first = pixels[:PICTURED].cpu() if turn == 0 else first
                part = _part(torch.tensor(mine[turn]), begin.labels, extractor(pixels), bad, protocol.images)
            gathered = [p for p in gather_object([part]) if p is not None]
            if bad_indices := [i for p in gathered for i in p["bad"]]:
                raise NotFinite(f"image {min(bad_indices)} of cell {cell.name!r} is not finite")
            parts += gathered if accelerator.is_main_process else []
            bar.update(sum(len(p["index"]) for p in gathered))
    totals = torch.tensor([made, calls[0], seconds, saturated / math.prod(cell.model.shape)], dtype=torch.float64)
    made, *totals = accelerator.reduce(totals.to(device)).tolist()
    return parts, first, dict(zip(("nfe", "seconds_per_image", "saturated_pixels"), (total / made for total in totals)))


def _part(index: Tensor, labels: Tensor | None, features: Features, bad: Tensor, images: int) -> dict:
    """What one chunk sends to the main process: its rows below ``images``."""
    n = int((index < images).sum())
    logits = None if features.logits is None else features.logits[:n]
    return {
        "index": index[:n],
        "labels": None if labels is None else labels[:n],
        "features": Features(features.fid[:n], logits),
        "bad": index[:n][bad[:n]].tolist(),
    }


def _warm_up(cell: Cell, times: Tensor, mine: list[range], protocol: Protocol, device: torch.device) -> None:
    """One network call of the size to come, outside the clock and the count."""
    if mine:
        begin = start(mine[0], cell.model.shape, cell.model.classes, protocol.seed)
        with torch.inference_mode():
            labels = None if begin.labels is None else begin.labels.to(device)
            cell.denoiser(begin.noise.to(device), times[0], **cell.model.condition(labels))


def _in_order(parts: list[dict], images: int) -> tuple[Features, Tensor | None]:
    """Features and labels sorted by index; every index must be there exactly once, however the chunks were shared out."""
    index = torch.cat([p["index"] for p in parts])
    order = index.argsort()
    assert torch.equal(index[order], torch.arange(images)), "an index is missing or stands twice"

    def whole(pick) -> Tensor | None:
        rows = [pick(p) for p in parts]
        return None if rows[0] is None else torch.cat(rows)[order]

    fid = whole(lambda p: p["features"].fid)
    assert fid is not None
    return Features(fid, whole(lambda p: p["features"].logits)), whole(lambda p: p["labels"])


def _agreement(features: Features, labels: Tensor | None, classes: int | None) -> float | None:
    """The part of images whose class is the one asked for, by an extractor that scores just these classes."""
    if labels is None or features.logits is None or features.logits.shape[1] != classes:
        return None
    return (features.logits.argmax(1) == labels).float().mean().item()
