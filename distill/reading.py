"""Reading what others made: regular files only, JSON objects only, and one line for whatever else a file holds."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SPARSE = 2**30  # a file above this size, of which less than 1 % is on the disk, is refused
TEXT = 2**28  # largest text file in bytes


def regular(path: Path | str, kind: str = "file", most: int | None = None) -> Path:
    """Return the path of a file that can be read to its end. ``kind``: what it should be. ``most``: largest size in bytes.

    Raises ValueError for anything else, before it is opened: a pipe waits for a writer, and a device has no end.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path}: there is no such file")
    size, on_disk, problem = path.stat().st_size, path.stat().st_blocks * 512, ""
    if not path.is_file():
        problem = "a folder" if path.is_dir() else "a pipe, socket or device"
    elif not size:
        problem = "empty"
    elif most is not None and size > most:
        problem = f"{size:,} bytes long, and at most {most:,} are accepted"
    elif size > SPARSE and on_disk < size // 100:
        problem = f"a sparse file, {size:,} bytes long with {on_disk:,} on the disk"
    elif not os.access(path, os.R_OK):
        problem = "not ours to read"
    if problem:
        raise ValueError(f"{path}: not a whole {kind}, it is {problem}")
    return path


def read_text(path: Path | str) -> str:
    """Return the content of a UTF-8 text file. Raises ValueError for anything else."""
    try:
        return regular(path, "text file", TEXT).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text file in UTF-8 ({error.reason} at byte {error.start:,})") from None


def json_object(text: str, where: Path | str) -> dict[str, Any]:
    """Return the JSON object that ``text`` holds. Raises ValueError, beginning with ``where``, for anything else."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON ({first_line(error)})") from None
    if not isinstance(found, dict):
        raise ValueError(f"{where}: holds {text.strip()[:20]!r}; accepted is a JSON object")
    return found


def read_json(path: Path | str) -> dict[str, Any]:
    """Return the JSON object of a file. Raises ValueError for anything else."""
    return json_object(read_text(path), path)


def numbers(data: Any) -> Iterator[float]:
    """Yield the numbers of nested lists and dicts."""
    if isinstance(data, dict | list):
        for value in data.values() if isinstance(data, dict) else data:
            yield from numbers(value)
    elif isinstance(data, int | float):
        yield data


@contextmanager
def malformed(where: Path | str) -> Iterator[None]:
    """Turn what missing keys, wrong types and impossible values of a file raise into ValueError that begins with ``where``."""
    try:
        yield
    except ValueError as error:
        raise error if str(error).startswith(str(where)) else ValueError(f"{where}: {first_line(error)}") from None
    except LookupError as error:
        raise ValueError(f"{where}: an entry {first_line(error)} is missing") from None
    except OSError:
        raise
    except Exception as error:  # other libraries raise many types for an impossible configuration
        raise ValueError(
            f"{where}: an entry has an impossible value ({type(error).__name__}: {first_line(error)[:120]})"
        ) from None


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
