"""Checkpoints from which a killed run continues to the same bits: weights, optimizer state and EMA."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distill import files
from distill.zero import ZeroAdam


class Stopped(KeyboardInterrupt):
    """Training has stopped after a step because it was asked to. The step is saved, and the same run continues after it."""


class Resumable:
    """Keep the last two checkpoints of a training phase, ``<folder>/resume-<step>.safetensors``.

    A checkpoint does not depend on the number of processes. ``say``: a function that is given one line for each damaged checkpoint.
    """

    def __init__(self, folder: Path | str, say: Callable[[str], None] = lambda line: None):
        self.folder, self.say = Path(folder), say

    def _paths(self) -> list[Path]:
        return sorted(self.folder.glob("resume-*.safetensors"))

    def save(self, step: int, tensors: dict[str, Tensor], identity: str) -> None:
        files.save(self.folder / f"resume-{step:09d}.safetensors", tensors, {"step": step, "identity": identity})
        for old in self._paths()[:-2]:
            old.unlink()

    def latest(self, identity: str) -> tuple[int, dict[str, Tensor]] | None:
        """Return step and tensors of the newest checkpoint of this run, or None. Damaged checkpoints are named and skipped.

        ``identity``: a string that only this run has. Checkpoints of other runs are ignored.
        """
        for path in reversed(self._paths()):
            try:
                tensors, description = files.load(path)
            except ValueError as error:
                self.say(f"warning: {error}; the checkpoint before it is used, or the start")
                continue
            if description.get("identity") == identity:
                return description["step"], tensors
        return None

    def clear(self) -> None:
        """Remove the checkpoints, and their folder if it is then empty."""
        for path in self._paths():
            path.unlink()
        if self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()


def gather_state(net: nn.Module, optimizer: torch.optim.Optimizer | ZeroAdam, ema: nn.Module | None) -> dict[str, Tensor]:
    """Return weights, optimizer state and EMA as one flat dict of unsharded tensors. A collective call if weights are sharded."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in net.named_parameters()}
    tensors = {f"net.{name}": whole(value) for name, value in net.state_dict().items()}
    for parameter, values in optimizer.state.items():
        for key, value in values.items():
            apart = whole(torch.as_tensor(value))  # tables of 8-bit moments are one tensor for all weights
            tensors[f"optimizer.{names[parameter]}|{key}"] = apart if apart.shape == parameter.shape else apart.clone()
    if ema is not None:
        tensors |= {f"ema.{name}": whole(value) for name, value in ema.state_dict().items()}
    return tensors


def restore_state(
    tensors: dict[str, Tensor], net: nn.Module, optimizer: torch.optim.Optimizer | ZeroAdam, ema: nn.Module | None
) -> None:
    """Load the result of `gather_state` in place. The optimizer keeps no other state."""
    for prefix, module in (("net.", net), ("ema.", ema)):
        if module is not None:
            for name, value in module.state_dict().items():
                with torch.no_grad():
                    value.copy_(_like(tensors[prefix + name], value))
    parameters, states = dict(net.named_parameters()), defaultdict[Tensor, dict[str, Any]](dict)
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            name, slot = key.removeprefix("optimizer.").split("|")
            parameter = parameters[name]
            shaped = value.shape == parameter.shape
            states[parameter][slot] = (
                _of_the_layout(value, parameter) if shaped else _beside(value, parameter, optimizer.defaults)
            )
    if isinstance(optimizer, ZeroAdam):
        optimizer.restore(states)
    else:
        optimizer.state.clear()
        optimizer.state.update(states)


def whole(value: Tensor) -> Tensor:
    """Return a sharded tensor in full, by a collective call; any other tensor unchanged."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def local(value: Tensor) -> Tensor:
    """Return this process's shard of a sharded tensor, which shares its memory; any other tensor unchanged."""
    return value.to_local() if hasattr(value, "to_local") else value


def _beside(value: Tensor, parameter: Tensor, defaults: dict[str, Any]) -> Any:
    """Return optimizer state of another shape than the parameter's: counts of steps, and what 8-bit moments are scaled by."""
    if "fused" in defaults:
        return value.clone().to(parameter.device if defaults["fused"] else value.device)
    return value.item() if value.dim() == 0 else value.clone().to(parameter.device)  # AdamW8bit counts by numbers


def _of_the_layout(value: Tensor, parameter: Tensor) -> Tensor:
    """Return a copy of the value with the strides of the parameter, which a fused optimizer takes for granted."""
    if not value.is_floating_point():  # a moment of 8 bits
        return torch.empty_like(parameter.detach(), dtype=value.dtype).copy_(value)
    return torch.empty_like(parameter.detach()).copy_(_like(value, parameter))


def _like(value: Tensor, reference: Tensor) -> Tensor:
    if hasattr(reference, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(value.to(reference.device), reference.device_mesh, reference.placements)  # type: ignore
    return value.to(reference.device, reference.dtype)
