"""What the fields of a configuration accept: bounds of numbers and kinds of paths. One place for the command line and for Python."""

from __future__ import annotations

import dataclasses
import math
import operator
import os
import tempfile
import types
import typing
from collections.abc import Callable, Mapping
from contextlib import suppress
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from distill.reading import read_json, regular

LIMITS: dict[str, Callable[[Any, Any], bool]] = {
    "at_least": operator.ge, "above": operator.gt, "at_most": operator.le, "below": operator.lt,
}  # fmt: skip
Bounds = dict[str, Any]
# Bounds that several fields share. The largest counts are far above what is in use, and below what exhausts a machine.
SEED: Bounds = {"at_least": 0, "at_most": 2**32 - 1}
THREADS: Bounds = {"at_least": 0, "at_most": 1024}
BATCH: Bounds = {"at_least": 1, "at_most": 65_536}
STEPS: Bounds = {"at_least": 1, "at_most": 100_000, "distinct": True}  # several of them are different
TRAINED: Bounds = {"at_least": 1, "at_most": 100_000_000_000}
GENERATED: Bounds = {"at_least": 40, "at_most": 10_000_000}  # fewer give no interval
LEARNING_RATE: Bounds = {"above": 0, "at_most": 1}
GUIDANCE: Bounds = {"at_least": 0, "at_most": 1000}
CHANNELS: Bounds = {"at_least": 8, "at_most": 2048}
LAYERS: Bounds = {"at_least": 1, "at_most": 64}


class Checked:
    """A configuration. Raises ValueError where a field has a value that it does not accept."""

    def __post_init__(self) -> None:
        kinds, set_fields = typing.get_type_hints(type(self)), []
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value, kind = getattr(self, field.name), number_kind(kinds[field.name])
            if value is None and type(None) in typing.get_args(kinds[field.name]):
                continue
            set_fields.append((field, value))
            if field.metadata.get("distinct") and isinstance(value, tuple | list) and len(set(value)) < len(value):
                raise ValueError(f"{flag_of(field)} {' '.join(map(str, value))}: accepted is each value once")
            for one in value if isinstance(value, tuple | list) else (value,):
                if "choices" in field.metadata and one not in (choices := choices_of(field)):
                    raise ValueError(f"{flag_of(field)} {one}: accepted are {', '.join(map(str, choices))}")
                if kind is not None:
                    _check_number(flag_of(field), one, kind, field.metadata)
        for field, value in set_fields:
            if "path" in field.metadata:
                PATHS[field.metadata["path"]](flag_of(field), Path(value))


def flag_of(field: dataclasses.Field) -> str:
    """Return the flag of a field: --batch-size."""
    return "--" + field.name.replace("_", "-")


def choices_of(field: dataclasses.Field) -> list:
    """Return the values that a field of choices accepts."""
    choices = field.metadata["choices"]
    return list(choices() if callable(choices) else choices)


def number_kind(hint: Any) -> type | None:
    """Return int or float for a field of numbers, which may be optional or a tuple; None for any other field."""
    if isinstance(hint, types.UnionType):
        hint = next(kind for kind in typing.get_args(hint) if kind is not type(None))
    if typing.get_origin(hint) is tuple:
        hint = typing.get_args(hint)[0]
    return hint if hint in (int, float) else None


def numbers_text(kind: type, metadata: Mapping[str, Any]) -> str:
    """Return the accepted numbers for people: "whole numbers, at least 1, at most 100"."""
    return ", ".join([{int: "whole numbers", float: "finite numbers"}[kind], *_limits(metadata)])


def limits_text(metadata: Mapping[str, Any]) -> str:
    """Return the bounds of a field for its help: "at least 1, at most 100"."""
    return ", ".join(_limits(metadata))


def _limits(metadata: Mapping[str, Any]) -> list[str]:
    return [f"{name.replace('_', ' ')} {metadata[name]:,}" for name in LIMITS if name in metadata]


def _check_number(flag: str, value: Any, kind: type, metadata: Mapping[str, Any]) -> None:
    fits = isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool) and math.isfinite(value)
    if not fits or not all(LIMITS[name](value, metadata[name]) for name in LIMITS if name in metadata):
        raise ValueError(f"{flag} {value}: accepted are {numbers_text(kind, metadata)}")


def _check_input(flag: str, path: Path) -> None:
    try:
        regular(path)
    except ValueError as error:
        raise ValueError(f"{flag}: {error}") from None


def _check_folder(flag: str, path: Path) -> None:
    """Raise ValueError unless the folder is writable or can be made, with a readable config.json if any. It is made and
    removed, by the main process only."""
    if os.environ.get("RANK", "0") != "0":
        return
    missing = [folder for folder in (path, *path.parents) if not os.path.lexists(folder)]
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
        if os.path.lexists(path / "config.json"):
            read_json(path / "config.json")  # a run is compared with it later
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ValueError(f"{flag} {path}: {reason}; accepted is a place where files can be written") from None
    finally:
        for folder in missing:
            with suppress(OSError):
                folder.rmdir()


def _check_new(flag: str, path: Path) -> None:
    if os.path.lexists(path):
        raise ValueError(f"{path} exists: name another {flag}")
    _check_folder(flag, path)


# kinds of paths: a file to read, a folder to write in, a file or folder to write that must not exist
PATHS: dict[str, Callable[[str, Path], None]] = {"file": _check_input, "folder": _check_folder, "new": _check_new}
