"""Read state dicts of other code bases, as .safetensors or as pickles that hold nothing but tensors."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.reading import regular
from teachers.hub import first_line

CONVERT = (
    "loading this file would run code from it, which is refused; if you trust it, convert it: "
    "python -c 'import torch, safetensors.torch as s; "
    's.save_file(torch.load("IN", weights_only=False)["ema"].state_dict(), "OUT.safetensors")\''
)
BROKEN = "not a complete file of tensors; accepted is a state dict as .safetensors or .pt"
PREFIXES = ("module.", "model.", "ema.")


def state_dict(path: str, part: str | None = None) -> dict[str, Tensor]:
    """Return the tensors of a file by name. ``part``: which of several state dicts in one file.

    Raises ValueError if the file cannot be read without running code, or holds several state dicts and ``part`` is none of them.
    """
    tensors = _tensors(path)
    parts = [name for name, value in tensors.items() if isinstance(value, Mapping)]
    if part is not None or parts:
        if part not in parts:
            accepted = " or ".join(f"part={name}" for name in parts) or "files without part="
            raise ValueError(f"{path}: no state dict {part!r} in this file; accepted are {accepted}")
        tensors = tensors[part]
    kept = {name: value for name, value in tensors.items() if isinstance(value, Tensor)}  # drops epochs and learning rates
    if not kept:
        raise ValueError(f"{path}: holds no tensors; accepted is a state dict")
    return kept


def unwrapped(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors without the name prefixes of wrappers ("module.", "model.", "ema.") that all of them share."""
    for prefix in PREFIXES:
        if all(name.startswith(prefix) for name in tensors):
            return unwrapped({name.removeprefix(prefix): value for name, value in tensors.items()})
    return tensors


def _tensors(path: str) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    regular(path, "state dict")
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if (held := sum(info.file_size for info in archive.infolist())) > 2 * Path(path).stat().st_size:
                raise ValueError(f"{path}: would grow to {held:,} bytes; accepted are files that torch.save wrote")
    if path.endswith((".safetensors", ".sft")):
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: not a safetensors file ({error})") from None
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for incomplete and foreign files
        runs_code = isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error)
        raise ValueError(f"{path}: {CONVERT if runs_code else BROKEN} ({first_line(error)[:80]})") from None
    if not isinstance(found, Mapping):
        raise ValueError(f"{path}: holds a {type(found).__name__}; accepted is a state dict")
    return dict(found)
