"""Files: written aside and renamed, safetensors that describe themselves, and checkpoints from which a run continues.

A file of ours is tensors plus one JSON description in its metadata. Nothing here unpickles.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

FORMAT = "fewstep/1"
_KEY = "fewstep"
_UMASK = os.umask(0)
os.umask(_UMASK)


@contextmanager
def replacing(path: Path | str) -> Iterator[Path]:
    """Yields a path beside ``path`` to write to; on success it is flushed and renamed over it, on failure removed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield aside
        with open(aside, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(aside, 0o666 & ~_UMASK)  # safetensors makes its files private
        os.replace(aside, path)
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from None
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None  # names the file that was meant
    finally:
        aside.unlink(missing_ok=True)


def clear_aside(folder: Path) -> None:
    """Removes what killed processes were writing aside in a folder, files and folders."""
    for left in list(folder.rglob(".*.part")):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def write_text(path: Path | str, text: str) -> None:
    with replacing(path) as aside:
        aside.write_text(text, encoding="utf-8")


def write_json(path: Path | str, data: Any) -> None:
    write_text(path, json.dumps(data, indent=2) + "\n")


def save(path: Path | str, tensors: dict[str, Tensor], description: dict) -> None:
    """Writes tensors and their JSON description as one safetensors file."""
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replacing(path) as aside:
        save_file(whole, aside, metadata={_KEY: json.dumps({"format": FORMAT, **description})})


def load(path: Path | str) -> tuple[dict[str, Tensor], dict]:
    """Tensors and description of a file written by `save`; ValueError in one line for anything else."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file")
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
    description = json.loads(metadata[_KEY])
    if description.get("format") != FORMAT:
        raise ValueError(f"{path}: format {description.get('format')!r}; this version reads {FORMAT!r}")
    return tensors, description


def weights_sha256(weights: dict[str, Tensor], *before: str) -> str:
    """sha256 of tensors by name, after some text: what says whether two models compute the same."""
    digest = hashlib.sha256("".join(before).encode())
    for name, value in sorted(weights.items()):
        digest.update(name.encode() + value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def load_weights(net: nn.Module, tensors: dict[str, Tensor], what: str) -> None:
    """Strict `load_state_dict` whose error is one line that names the first keys that do not fit."""
    own = net.state_dict()
    missing, left_over = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    shapes = [k for k in own.keys() & tensors.keys() if own[k].shape != tensors[k].shape]
    for problem, keys in (("missing", missing), ("left over", left_over), ("of another shape", sorted(shapes))):
        if keys:
            raise ValueError(f"{what}: {len(keys)} weights {problem}: {', '.join(keys[:3])}{' ...' if keys[3:] else ''}")
    net.load_state_dict(tensors)


class Resumable:
    """The checkpoints of one training phase: ``<folder>/resume-<step>.safetensors``, of which the last two are kept."""

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)

    def _paths(self) -> list[Path]:
        return sorted(self.folder.glob("resume-*.safetensors"))

    def save(self, step: int, tensors: dict[str, Tensor], identity: str) -> None:
        save(self.folder / f"resume-{step:09d}.safetensors", tensors, {"step": step, "identity": identity})
        for old in self._paths()[:-2]:
            old.unlink()

    def latest(self, identity: str) -> tuple[int, dict[str, Tensor]] | None:
        """Step and tensors of the newest whole checkpoint of this run, None where there is none; torn ones are passed over.

        ``identity`` says which run a checkpoint belongs to; another run's is not taken.
        """
        for path in reversed(self._paths()):
            try:
                tensors, description = load(path)
            except ValueError:
                continue
            if description["identity"] == identity:
                return description["step"], tensors
        return None

    def clear(self) -> None:
        """Removes the checkpoints, and their folder where nothing else is in it."""
        for path in self._paths():
            path.unlink()
        if self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()


def gather_state(net: nn.Module, optimizer: torch.optim.Optimizer, ema: nn.Module | None) -> dict[str, Tensor]:
    """Weights, optimizer state and EMA as one flat dict of whole tensors. A collective call where weights are sharded."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in net.named_parameters()}
    tensors = {f"net.{name}": whole(value) for name, value in net.state_dict().items()}
    for parameter, values in optimizer.state.items():
        tensors |= {f"optimizer.{names[parameter]}|{key}": whole(value) for key, value in values.items()}
    if ema is not None:
        tensors |= {f"ema.{name}": whole(value) for name, value in ema.state_dict().items()}
    return tensors


def restore_state(tensors: dict[str, Tensor], net: nn.Module, optimizer: torch.optim.Optimizer, ema: nn.Module | None) -> None:
    """Puts the result of `gather_state` back, in place."""
    for prefix, module in (("net.", net), ("ema.", ema)):
        if module is not None:
            for name, value in module.state_dict().items():
                with torch.no_grad():
                    value.copy_(_like(tensors[prefix + name], value))
    parameters = dict(net.named_parameters())
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            name, slot = key.removeprefix("optimizer.").split("|")
            parameter = parameters[name]
            shaped = value.shape == parameter.shape
            optimizer.state[parameter][slot] = _like(value, parameter).clone() if shaped else value.clone()


def whole(value: Tensor) -> Tensor:
    """A sharded tensor from all its shards, a collective call; any other as it is."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def _like(value: Tensor, reference: Tensor) -> Tensor:
    if hasattr(reference, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(value.to(reference.device), reference.device_mesh, reference.placements)  # type: ignore
    return value.to(reference.device, reference.dtype)
