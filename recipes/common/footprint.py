"""The activations that a training step keeps, counted in one forward pass. On the meta device nothing is computed or stored."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

Saved = dict[int, int]  # storage -> bytes


def saved_bytes(forward: Callable[[], Tensor], weights: Iterable[Tensor], net: nn.Module | None = None) -> int:
    """Return the bytes that ``forward`` saves for its backward pass, beside the ``weights``. It stops at gradients of `torch.func`.

    ``net``: a network whose blocks may be computed once more in the backward pass (`distill.speed.checkpoint_activations`). Of these, the
    inputs are saved, and the largest block is added, because one is computed at a time.
    """
    weights = list(weights)
    known, blocks = {_place(weight) for weight in weights}, [0]
    saved: Saved = {}
    fused = _Fused() if any(weight.device.type == "meta" for weight in weights) else nullcontext()
    try:
        with _recomputed(net, known, saved, blocks), _saving(known, saved), fused:
            forward()
    except RuntimeError as error:
        if "saved tensor hooks" not in str(error):
            raise
    return sum(saved.values()) + max(blocks)


def _place(tensor: Tensor) -> int:
    """Return what identifies the storage of a tensor. Raises RuntimeError for a wrapper of `torch.func`, which has none."""
    storage = tensor.untyped_storage()
    return storage._cdata if storage.device.type == "meta" else storage.data_ptr()


def _saving(known: set[int], saved: Saved) -> torch.autograd.graph.saved_tensors_hooks:
    def pack(tensor: Tensor) -> Tensor:
        _count(tensor, known, saved)
        return tensor

    return torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)


def _count(tensor: Tensor, known: set[int], saved: Saved) -> None:
    try:
        if (place := _place(tensor)) not in known:
            saved[place] = tensor.untyped_storage().nbytes()
    except RuntimeError:  # what a wrapper of `torch.func` holds is counted by itself
        pass


@contextmanager
def _recomputed(net: nn.Module | None, known: set[int], saved: Saved, blocks: list[int]) -> Iterator[None]:
    """Count, in place of its recomputation, the inputs of each block in ``saved`` and what it saves itself in ``blocks``."""

    def call(block: Callable, *inputs: Any) -> Any:
        for tensor in inputs:
            if isinstance(tensor, Tensor):
                _count(tensor, known, saved)
        inside: Saved = {}
        with _saving(known, inside):
            output = block(*inputs)
        blocks.append(sum(size for place, size in inside.items() if place not in saved))
        return output

    parts: list[Any] = [] if net is None else [part for part in net.modules() if getattr(part, "gradient_checkpointing", False)]
    before = [part._gradient_checkpointing_func for part in parts]
    for part in parts:
        part._gradient_checkpointing_func = call
    try:
        yield
    finally:
        for part, function in zip(parts, before, strict=True):
            part._gradient_checkpointing_func = function


class _Fused(TorchFunctionMode):
    """Let attention on the meta device save what the kernels of GPUs save: query, key, value, output, and a sum for each row."""

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        given = dict(zip(("query", "key", "value"), args)) | (kwargs or {})
        if function is F.scaled_dot_product_attention:
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(given["query"], given["key"], given["value"])[0]
        return function(*args, **(kwargs or {}))
