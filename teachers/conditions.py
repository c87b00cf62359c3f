"""The conditions of text-to-image models: a table with one row for each prompt. It belongs to the data, not to the model.

A label is the number of a row. The last row is that of the empty prompt, which guidance and label dropout use. Rows stay on the CPU, or
on the disk in memory-mapped files; only those of a batch are copied to the device.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from distill.device import send
from distill.files import weights_sha256

SIZES = ("time_ids", "resolution", "aspect_ratio")  # conditions of the size of the images, see `of_size`
CLOSE = 5e-3  # largest difference of two empty prompts in half precision, as part of the largest value


class Rows:
    """Hold rows [N, ...] in several tensors, such as memory-mapped files, and copy out those that an index names.

    ``parts``: tensors [n, ...] of one type, in order. It has the shape, the type and the indexing of one tensor of all rows.
    """

    def __init__(self, parts: Sequence[Tensor]):
        self.parts = list(parts)
        self.starts = torch.tensor([0, *(len(part) for part in parts)]).cumsum(0)
        self.shape = torch.Size([int(self.starts[-1]), *parts[0].shape[1:]])
        self.dtype, self.ndim = parts[0].dtype, parts[0].ndim
        self.nbytes = sum(part.nbytes for part in parts)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Tensor | slice) -> Tensor:
        """Return the rows [n, ...] of an index [n], or of a slice, as one new tensor."""
        if isinstance(index, slice):
            index = torch.arange(*index.indices(len(self)))
        if len(index) and (int(index.min()) < 0 or int(index.max()) >= len(self)):
            raise IndexError(f"rows {int(index.min())} to {int(index.max())} of {len(self)}")
        out = torch.empty(len(index), *self.shape[1:], dtype=self.dtype)
        place = torch.searchsorted(self.starts, index, right=True) - 1
        for number in place.unique().tolist():
            here = (place == number).nonzero()[:, 0]
            out[here] = self.parts[number][index[here] - self.starts[number]]
        return out

    def index_select(self, dim: int, index: Tensor) -> Tensor:
        """Return the rows of an index [n], as a tensor does. Only ``dim`` 0 is accepted."""
        assert dim == 0
        return self[index]

    def contiguous(self) -> Tensor:
        """Return all rows as one tensor in memory."""
        return self[:]

    def is_floating_point(self) -> bool:
        """Return whether the rows are floats."""
        return self.dtype.is_floating_point


Lookup = Callable[[Tensor], Mapping[str, Tensor]]  # row numbers [n] on the CPU, up to N -> {name: [n, ...]}


@dataclass(frozen=True)
class Table:
    """Look conditions up in ``rows``, {name: [N + 1, ...]}."""

    rows: Mapping[str, Tensor | Rows]

    def __call__(self, index: Tensor) -> dict[str, Tensor]:
        return {name: rows[index] for name, rows in self.rows.items()}


@dataclass(frozen=True)
class Conditions:
    """Hold the conditions of a text-to-image model for labels 0..count-1, and for the label ``count``, the empty prompt.

    ``null``: {name: [1, ...]}, the row of the empty prompt; {} for a pipeline that has not encoded anything yet. ``count``: the number of
    rows, 0 for a model without data. ``lookup``: row numbers -> conditions. ``prompts``: the texts of the rows, () if they are unknown.
    ``encoder``: the sha256 of the text encoders and tokenizers, "" if it is unknown, as in older files.
    """

    null: Mapping[str, Tensor]
    count: int = 0
    lookup: Lookup | None = None
    prompts: Sequence[str] = field(default=(), repr=False)
    encoder: str = ""

    @classmethod
    def of(cls, rows: Mapping[str, Tensor | Rows], prompts: Sequence[str] = (), encoder: str = "") -> Conditions:
        """Return the table of rows {name: [N + 1, ...]}; the last row is the empty prompt's."""
        count = min(map(len, rows.values())) - 1
        return cls({name: some[count:].clone() for name, some in rows.items()}, count, Table(rows), prompts, encoder)

    @property
    def names(self) -> str:
        """The names of the conditions, for people."""
        return ", ".join(sorted(self.null)) or "not encoded yet"

    @cached_property
    def sha256(self) -> str:
        """The sha256 of the prompts and their encoder, or of the rows if the prompts are unknown."""
        if not self.count or self.prompts:
            return hashlib.sha256(json.dumps([self.encoder, *self.prompts]).encode()).hexdigest()
        return weights_sha256(dict(self(torch.arange(self.count + 1))))

    def __call__(self, labels: Tensor) -> dict[str, Tensor]:
        """Return the conditions {name: [B, ...]} of labels [B] on their device, floats as float32.

        Raises ValueError for a model without data.
        """
        if self.lookup is None or (not self.count and bool((labels != 0).any())):
            raise ValueError("this model is conditioned on text and has no prompts: accepted is ,prompts=FILE after the model")
        return {name: as_float(rows, labels.device) for name, rows in self.lookup(labels.cpu()).items()}

    def sized(self, height: int, width: int) -> Conditions:
        """Return the conditions for images of this size in pixels."""
        lookup = self.lookup
        null = sized(self.null, height, width)
        return replace(self, null=null, lookup=None if lookup is None else lambda index: sized(lookup(index), height, width))

    def agrees_with(self, other: Conditions) -> bool:
        """Return whether both come from the same encoder, as far as that is known.

        Without a sha256 of both, the empty prompts are compared, up to half precision.
        """
        if self.encoder and other.encoder:
            return self.encoder == other.encoder
        if not self.null or not other.null:
            return True
        if self.null.keys() != other.null.keys():
            return False
        pairs = [(self.null[name].float(), other.null[name].float()) for name in self.null]
        return all(a.shape == b.shape and _close(a, b) for a, b in pairs)


def of_size(height: float, width: float) -> dict[str, Tensor]:
    """Return the conditions of uncropped images of a size in pixels, float32 {a name of `SIZES`: [1, n]}.

    ``time_ids``: original size, crop (0, 0), target size of SDXL (2307.01952). ``resolution``, ``aspect_ratio``: of PixArt-alpha
    (2310.00426), the ratio as height over width.
    """
    size = torch.tensor([height, width], dtype=torch.float32)
    return {
        "time_ids": torch.cat([size, torch.zeros(2), size])[None],
        "resolution": size[None],
        "aspect_ratio": (size[:1] / size[1:])[None],
    }


def sized(cond: Mapping[str, Tensor], height: int, width: int) -> dict[str, Tensor]:
    """Return conditions {name: [B, ...]} with those of this image size in place of those of another."""
    here = {name: row for name, row in of_size(height, width).items() if name in cond}
    return {**cond, **{name: row.expand(len(cond[name]), -1).to(cond[name]) for name, row in here.items()}}


def as_float(rows: Tensor, device: torch.device | str) -> Tensor:
    """Return rows on a device, floats of any precision as float32."""
    rows = send(rows, device)
    return rows.float() if rows.is_floating_point() else rows


def _close(one: Tensor, other: Tensor) -> bool:
    return float((one - other).abs().max()) <= CLOSE * max(1e-6, float(one.abs().max()))


def described(conditions: Conditions | None) -> dict[str, Any]:
    """Return what a model's file says of its conditions, as JSON data; {} for a model that takes none."""
    if conditions is None:
        return {}
    known = {"encoder_sha256": conditions.encoder} if conditions.encoder else {}
    return {"table": sorted(conditions.null), **known}
