"""Files and folders that are complete or absent, and safetensors files with a description of themselves.

A file of this project holds tensors, and one JSON description in its metadata with the sha256 of both. Nothing here unpickles.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from distill.reading import json_object, regular

FORMAT = "fewstep/1"
_KEY = "fewstep"
_UMASK = os.umask(0)
os.umask(_UMASK)
FILE_MODE = 0o666 & ~_UMASK  # of ordinary files; safetensors makes private ones


@contextmanager
def replacing(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path beside ``path``. On success flush the file and rename it to ``path``; on failure remove it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield aside
        with open(aside, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(aside, FILE_MODE)
        os.replace(aside, path)
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from None
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None  # names the file that was meant
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def replacing_folder(path: Path | str) -> Iterator[Path]:
    """Yield a temporary folder beside ``path``. On success rename it to ``path``, in place of an older one; on failure remove it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent))
    try:
        yield aside
        aside.chmod(0o777 & ~_UMASK)  # mkdtemp makes its folders private
        if path.exists():
            shutil.rmtree(path)
        aside.rename(path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def clear_aside(folder: Path) -> None:
    """Remove the temporary files and folders that killed processes left in a folder: those of `replacing`, and safetensors' own."""
    for left in [*folder.rglob(".*.part"), *folder.rglob(".tmp??????")]:
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def write_text(path: Path | str, text: str) -> None:
    """Write a UTF-8 text file, complete or not at all."""
    with replacing(path) as aside:
        aside.write_text(text, encoding="utf-8")


def write_json(path: Path | str, data: Any) -> None:
    """Write JSON, indented, complete or not at all."""
    write_text(path, json.dumps(data, indent=2) + "\n")


def save(path: Path | str, tensors: dict[str, Tensor], description: dict) -> None:
    """Write tensors and their JSON description as one safetensors file, with the sha256 of both in the description."""
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    described = {"format": FORMAT, **description}
    described["sha256"] = _content_sha256(whole, described)
    with replacing(path) as aside:
        save_file(whole, aside, metadata={_KEY: json.dumps(described)})


def load(path: Path | str, check: bool = True) -> tuple[dict[str, Tensor], dict]:
    """Return tensors and description of a file written by `save`. A file of an older version has no sha256 to check.

    The tensors are mapped into memory. ``check``: False reads nothing of them, for shards that are larger than the memory.

    Raises ValueError, in one line, for any other file, and for one whose contents do not match its sha256.
    """
    path = regular(path, "safetensors file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (a safetensors handle)
    except (SafetensorError, OSError) as error:
        with open(path, "rb") as file:
            head = file.read(2)
        if head == b"PK" or head[:1] == b"\x80":
            raise ValueError(
                f"{path}: this is a pickle, which can run code when loaded; a .safetensors file is accepted, and weights=FILE of "
                "'package.module:factory,...' for one of tensors alone"
            ) from None
        raise ValueError(f"{path}: not a whole safetensors file ({error})") from None
    if _KEY not in metadata:
        raise ValueError(f"{path}: safetensors without a fewstep description; accepted are files this project wrote")
    description = json_object(metadata[_KEY], f"{path}: the description")
    if description.get("format") != FORMAT:
        raise ValueError(f"{path}: format {description.get('format')!r}; this version reads {FORMAT!r}")
    written = description.pop("sha256", None)
    if check and written is not None and written != _content_sha256(tensors, description):
        raise ValueError(f"{path}: damaged, its contents do not match the sha256 that was written with them")
    return tensors, description


def weights_sha256(weights: dict[str, Tensor], *before: str) -> str:
    """Return the sha256 of named tensors, preceded by the text of ``before``. Equal weights have equal hashes."""
    digest = hashlib.sha256("".join(before).encode())
    for name, value in sorted(weights.items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _content_sha256(tensors: dict[str, Tensor], description: dict) -> str:
    forms = {name: [str(value.dtype), *value.shape] for name, value in sorted(tensors.items())}
    return weights_sha256(tensors, json.dumps(description), json.dumps(forms))


def load_weights(net: nn.Module, tensors: dict[str, Tensor], what: str) -> None:
    """Load a state dict strictly. Raises ValueError, in one line, that names the first keys that do not fit ``what``."""
    own = net.state_dict()
    missing, left_over = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    shapes = [k for k in own.keys() & tensors.keys() if own[k].shape != tensors[k].shape]
    for problem, keys in (("missing", missing), ("left over", left_over), ("of another shape", sorted(shapes))):
        if keys:
            raise ValueError(f"{what}: {len(keys)} weights {problem}: {', '.join(keys[:3])}{' ...' if keys[3:] else ''}")
    net.load_state_dict(tensors)
