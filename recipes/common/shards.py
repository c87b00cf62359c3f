"""Folders of shards that several processes write, and that an interrupted command continues."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor

from distill import files
from recipes.common.locks import lock, unlock
from recipes.common.run import agreed, finished_file

Shard = tuple[str, dict[str, Tensor], dict]  # file name, tensors, description
Shapes = dict[str, list[int]]  # file name -> shape of the shard's first tensor


def unfinished(folder: Path) -> Path:
    """Return where the shards are until all are written."""
    return folder.with_name(f".{folder.name}.unfinished")


@contextmanager
def shared_folder(folder: Path, state: PartialState) -> Iterator[Path]:
    """Yield `unfinished` to all processes. On success the main process renames it to ``folder``; on ValueError it removes it.

    After a signal and on a full disk it stays, so that the same command continues. Raises ValueError if another process writes there.
    """
    aside = unfinished(folder)

    def claim() -> None:
        lock(aside)
        files.clear_aside(aside)

    agreed(claim)
    try:
        yield aside
    except ValueError:
        if state.is_main_process:
            shutil.rmtree(aside)
            unlock(aside)
        raise
    if state.is_main_process:
        refuse_existing(folder)  # another run may have written it in the meantime
        unlock(aside)
        aside.rename(folder)
    state.wait_for_everyone()


def refuse_existing(folder: Path) -> None:
    """Raise ValueError if ``folder`` exists."""
    if folder.exists():
        raise ValueError(f"{folder} exists already; choose another --output-dir")


def finished_shards(folder: Path, pattern: str, identity: dict) -> Shapes:
    """Return the shards of a pattern that an interrupted command left, by their paths in the folder.

    Raises ValueError for a damaged shard, and for those of other settings.
    """
    shapes = {}
    for path in sorted(folder.glob(pattern)):
        with finished_file():
            tensors, description = files.load(path)
        if description.get("made_with") != identity:
            raise ValueError(f"{folder} holds shards of other settings: delete it, or choose another --output-dir")
        shapes[path.relative_to(folder).as_posix()] = list(next(iter(tensors.values())).shape)
    return shapes


def write_everywhere(folder: Path, shards: Iterable[Shard], identity: dict) -> Shapes:
    """Write the shards of all processes. Returns the shapes of all; raises ValueError or OSError in all if one process fails."""
    shapes: Shapes = {}
    problem = None
    try:
        for name, tensors, description in shards:
            files.save(folder / name, tensors, description | {"made_with": identity})
            shapes[name] = list(next(iter(tensors.values())).shape)
    except (ValueError, OSError) as error:
        problem = OSError(str(error)) if isinstance(error, OSError) else ValueError(str(error))
    parts: Any = gather_object([(shapes, problem)])
    if wrong := next((error for _, error in parts if error), None):
        raise wrong
    return {name: shape for some, _ in parts for name, shape in some.items()}


def stored(rows: Tensor, dtype: torch.dtype, what: str) -> Tensor:
    """Return floats in the number format of a shard. Raises ValueError, beginning with ``what``, if one overflows it."""
    if not rows.is_floating_point():
        return rows
    rows = rows.to(dtype).cpu()
    if not torch.isfinite(rows).all():
        raise ValueError(f"{what} are not finite in {str(dtype).removeprefix('torch.')}; --dtype float32 is accepted too")
    return rows
