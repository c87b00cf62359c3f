"""The cells of a sweep: what is measured for one row, under which protocol, and the files that keep a finished cell.

A finished cell is a row as JSON and its first images as safetensors, in the folder ``cells`` of a run. The JSON holds the sha256 of
both. They are checked before the cell is used again: a torn or altered file is named, and its cell is measured again. Cells of older
versions have no hash and are used as they are.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from distill import files
from distill.denoiser import DenoiserLike
from distill.sampling import SEARCHED, Sampling
from distill.schedule import Schedule
from eval.generate import LABEL_RULE
from teachers.saved import Stored

_SEAL = "sha256"  # key of the hashes in a cell's JSON


@dataclass(frozen=True)
class Cell:
    """Hold what is measured for one row. ``label`` names the model in the report; ``role`` is "teacher" or "student".

    ``model``: a `Teacher`, or the `Stored` name of one, which `loaded` reads. ``run``: the run that a student comes from, where one
    report holds the students of several runs.
    """

    label: str
    role: str
    model: Any
    sampling: Sampling
    steps: int
    guidance: float = 1.0
    training_seconds: float | None = None
    run: str = ""

    @property
    def name(self) -> str:
        return f"{self.label} {self.sampling.label}{' searched' if self.sampling.grid == SEARCHED else ''} {self.steps}"

    @property
    def times(self) -> Tensor:
        """The time grid, float64 [steps + 1]."""
        return self.sampling.times_for(self.schedule, self.steps)

    @property
    def schedule(self) -> Schedule:
        return self.model.schedule if isinstance(self.model, Stored) else self.model.denoiser.schedule

    def loaded(self, device: torch.device) -> Cell:
        """Return the cell with its model in memory, on ``device``."""
        return replace(self, model=self.model.load().to(device)) if isinstance(self.model, Stored) else self

    @property
    def cost(self) -> int:
        """The network evaluations per image, at most. Guidance doubles them, unless the network takes its scale."""
        return self.sampling.calls(self.steps) * (2 if self.guidance != 1 and self.model.guidance is None else 1)

    @property
    def denoiser(self) -> DenoiserLike:
        return self.model.guided(self.guidance)

    @property
    def facts(self) -> dict[str, Any]:
        """The entries of a row that say nothing about its images."""
        known = {"training_seconds": self.training_seconds, "run": self.run or None}
        return {key: value for key, value in known.items() if value is not None}


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
    distance: str | None = None  # the name of the Frechet distance of a user's features; None for FID

    def described(self) -> dict[str, Any]:
        """Return its entries as JSON data, without a name that is the usual one."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self.described(), sort_keys=True).encode()).hexdigest()[:16]


def head(cell: Cell, protocol: Protocol) -> dict[str, Any]:
    """Return the part of a row that identifies its cell. A finished row with another head belongs to another cell."""
    times, table = cell.sampling.times.get(cell.steps), cell.model.conditions_sha256
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
        **({} if table is None else {"conditions_sha256": table}),
    }


def save(folder: Path, row: dict, images: Tensor) -> None:
    """Write a finished cell: its row, its first images, uint8 [n, C, H, W], and the hashes of both."""
    files.save(picture_path(folder, row["name"]), {"images": images}, {"images": row["name"]})
    write_sealed(row_path(folder, row["name"]), row, files.weights_sha256({"images": images}))


def finished(folder: Path, cell: Cell, protocol: Protocol) -> dict | None:
    """Return the row of a cell that is finished under this protocol, else None. A damaged cell is named on standard error."""
    path = row_path(folder, cell.name)
    try:
        row, pictured = read_sealed(path)
        if any(row.get(key) != value for key, value in head(cell, protocol).items()):
            return None
        if pictured is not None and files.weights_sha256({"images": pictures(picture_path(folder, cell.name))}) != pictured:
            raise ValueError(f"{picture_path(folder, cell.name)}: its content does not match the sha256 of its cell")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError) as error:
        tqdm.write(f"{error}: the cell is measured again", file=sys.stderr)
        return None
    return row


def write_sealed(path: Path, data: dict, pictures_sha256: str | None = None) -> None:
    """Write a dict as JSON, with the sha256 of its content."""
    files.write_json(path, data | {_SEAL: {"row": digest(data), "pictures": pictures_sha256}})


def read_sealed(path: Path) -> tuple[dict, str | None]:
    """Read the dict of `write_sealed` and the sha256 of its pictures, None for files of older versions.

    Raises ValueError, in one line, for a file that is torn or whose content does not match its hash.
    """
    if path.exists() and not path.is_file():  # a pipe would wait for a writer
        raise ValueError(f"{path}: not a regular file")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        seal = data.pop(_SEAL, None)
        if seal is None:
            return data, None
        row, pictured = seal["row"], seal["pictures"]
    except (ValueError, AttributeError, TypeError, KeyError, RecursionError):
        raise ValueError(f"{path}: torn or altered, not a whole JSON object") from None
    if row != digest(data):
        raise ValueError(f"{path}: its content does not match its sha256")
    return data, pictured


def row_path(cells: Path, name: str) -> Path:
    """Return the file in the folder ``cells`` that holds the row of the cell ``name``."""
    return cells / f"{_slug(name)}.json"


def picture_path(cells: Path, name: str) -> Path:
    """Return the file in the folder ``cells`` that holds the first images of the cell ``name``."""
    return cells / f"{_slug(name)}.safetensors"


def pictures(path: Path) -> Tensor:
    """Load the first images of a finished cell, uint8 [n, C, H, W]."""
    return files.load(path)[0]["images"]


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() or c in "@+-." else "_" for c in name)


def digest(data: Mapping[str, Any]) -> str:
    """Return the sha256 of JSON data."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
