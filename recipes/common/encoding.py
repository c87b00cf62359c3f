"""Encode prompts into memory-mapped shards, with all processes. An interrupted command keeps its finished shards."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Container, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import PartialState
from torch import Tensor
from tqdm import tqdm

from eval.progress import progress
from recipes.common.plan import check_disk, gigabytes
from recipes.common.run import agreed
from recipes.common.shards import Shard, finished_shards, shared_folder, stored, unfinished, write_everywhere
from recipes.data.condition_shards import PATTERN, read_conditions, write_index
from teachers.conditions import Conditions
from teachers.encoder import BATCH, Encoder

SMALL = 64  # numbers of a row; smaller rows, such as sizes in pixels, stay in float32


@dataclass(frozen=True)
class Encoding:
    """Say how prompts are encoded: ``dtype`` of the rows, ``batch`` prompts per call, ``block`` prompts per shard.

    Rows depend on the batch that a prompt is in, in their last digits; they do not depend on the number of processes.
    """

    encoder: Encoder
    dtype: torch.dtype = torch.float16
    batch: int = BATCH
    block: int = 1024

    def rows(self, found: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return rows as they are stored. Raises ValueError for floats that overflow the number format."""
        return {
            name: stored(value, self.dtype if value[0].numel() >= SMALL else torch.float32, f"conditions {name!r}").contiguous()
            for name, value in found.items()
        }

    def null(self) -> dict[str, Tensor]:
        """Return the conditions of the empty prompt as they are stored."""
        return self.rows({name: row for name, (_, row) in self.encoder([""]).items()})

    def shards(self, prompts: list[str], state: PartialState, finished: Container[str] = ()) -> Iterator[Shard]:
        """Yield this process's shards that are not ``finished``: every ``num_processes``-th."""
        starts = list(enumerate(range(0, len(prompts), self.block)))[state.process_index :: state.num_processes]
        for number, start in progress(starts, show=state.is_main_process, desc="conditions", unit="shard"):
            if (name := f"conditions-{number:05d}.safetensors") not in finished:
                texts = prompts[start : min(start + self.block, len(prompts))]
                parts = [self.encoder(texts[i : i + self.batch]) for i in range(0, len(texts), self.batch)]
                yield name, self.rows({key: _joined(key, [part[key][0] for part in parts]) for key in parts[0]}), {}

    def write(self, folder: Path, prompts: list[str], state: PartialState) -> None:
        """Write the conditions of distinct prompts into a folder by all processes, and free the encoders.

        Shards that are there are kept. Raises ValueError if they are of other settings, damaged, or if rows overflow.
        """
        null = self.null()
        identity = {
            "prompts_sha256": hashlib.sha256(json.dumps(prompts).encode()).hexdigest(), "encoder_sha256": self.encoder.sha256,
            "dtype": str(self.dtype), "batch": self.batch, "block": self.block, "precision": str(self.encoder.dtype),
        }  # fmt: skip
        finished = finished_shards(folder, PATTERN, identity)
        shapes = finished | write_everywhere(folder, self.shards(prompts, state, finished), identity)
        if state.is_main_process:
            sizes = {name: shape[0] for name, shape in sorted(shapes.items())}
            write_index(folder, prompts, null, self.encoder.sha256, sizes)
            self.encoder.warn_of_long(prompts)
        state.wait_for_everyone()
        self.encoder.close()


def row_bytes(null: dict[str, Tensor]) -> int:
    """Return the bytes of one prompt."""
    return sum(row.nbytes for row in null.values())


def cached(folder: Path, prompts: list[str], encoding: Encoding, state: PartialState) -> Conditions:
    """Return the conditions of distinct prompts from a cache in ``folder``, which is made where it is missing.

    The name of the cache is a hash of prompts, encoder and number format: another run finds it.
    """
    key = json.dumps([encoding.encoder.sha256, str(encoding.dtype), str(encoding.encoder.dtype), encoding.batch, *prompts])
    place = folder / f"conditions-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    if not place.is_dir():
        size = row_bytes(encoding.null()) * len(prompts)

        def announce() -> None:
            tqdm.write(f"{len(prompts):,} prompts are encoded into {place}, {gigabytes(size)}")
            check_disk(unfinished(place), size)

        agreed(announce)
        with shared_folder(place, state) as aside:
            encoding.write(aside, prompts, state)
    found = read_conditions(place)
    if found is None:
        raise ValueError(f"{place} holds no conditions: delete it, so that it is made again")
    return found


def _joined(name: str, parts: list[Tensor]) -> Tensor:
    """Return the rows of all batches. Raises ValueError where they have several lengths."""
    if len({part.shape[1:] for part in parts}) > 1:
        shapes = sorted({tuple(part.shape[1:]) for part in parts})
        raise ValueError(f"conditions {name!r} have rows of shapes {shapes}: accepted are prompts padded to one length")
    return torch.cat(parts)
