"""The activations that a training step keeps, counted in one forward pass. On the meta device nothing is computed or stored."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

Saved = dict[int, torch.UntypedStorage]  # kept, so that no other tensor takes its place


def saved_bytes(
    forward: Callable[[], Tensor], weights: Iterable[Tensor], net: nn.Module | None = None, lowered: Lowered | None = None
) -> int:
    """Return the bytes that ``forward`` saves for its backward pass, beside the ``weights``. It stops at gradients of `torch.func`.

    ``net``: a network whose blocks may be computed once more in the backward pass (`distill.speed.checkpoint_activations`). Of these, the
    inputs are saved, and the largest block is added, because one is computed at a time.
    ``lowered``: autocast of the forward pass. Its copies of weights are not counted here.
    """
    weights = list(weights)
    known, blocks = {place_of(weight) for weight in weights}, [0]
    saved: Saved = {}
    fused = _Fused() if any(weight.device.type == "meta" for weight in weights) else nullcontext()
    if lowered is not None:
        lowered.known = known
    try:
        with _recomputed(net, known, saved, blocks), _saving(known, saved), fused, lowered or nullcontext():
            forward()
    except RuntimeError as error:
        if "saved tensor hooks" not in str(error):
            raise
    return _bytes(saved) + max(blocks)


def _bytes(saved: Saved) -> int:
    return sum(storage.nbytes() for storage in saved.values())


def place_of(tensor: Tensor) -> int:
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
        if (place := place_of(tensor)) not in known:
            saved[place] = tensor.untyped_storage()
    except RuntimeError:  # what a wrapper of `torch.func` holds is counted by itself
        pass


@contextmanager
def _recomputed(net: nn.Module | None, known: set[int], saved: Saved, blocks: list[int]) -> Iterator[None]:
    """Count the inputs of each block in ``saved``, and in ``blocks`` what it saves itself when it is computed once more."""

    def call(checkpoint: Callable, block: Callable, *inputs: Any) -> Any:
        inside: Saved = {}
        with _saving(known, inside):
            trained = any(output.requires_grad for output in _tensors(block(*inputs)))
        for tensor in inputs:
            if isinstance(tensor, Tensor) and trained:
                _count(tensor, known, saved)
        blocks.append(_bytes({place: storage for place, storage in inside.items() if place not in saved}))
        return checkpoint(block, *inputs)

    modules: Any = () if net is None else net.modules()
    parts = [m for m in modules if getattr(m, "gradient_checkpointing", False) and hasattr(m, "_gradient_checkpointing_func")]
    before = [part._gradient_checkpointing_func for part in parts]
    for part in parts:
        part._gradient_checkpointing_func = partial(call, part._gradient_checkpointing_func)
    try:
        yield
    finally:
        for part, function in zip(parts, before, strict=True):
            part._gradient_checkpointing_func = function


def _tensors(output: Any) -> list[Tensor]:
    return [value for value in (output if isinstance(output, tuple) else (output,)) if isinstance(value, Tensor)]


class Lowered(TorchFunctionMode):
    """Cast inputs as `torch.autocast` does on GPUs, on any device: the meta device has no autocast, and that of CPUs casts less.

    Each weight is cast once where gradients are kept. ``known`` gets the places of these copies, and ``copied`` counts their bytes.
    """

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype, self.known, self.copied = dtype, set[int](), 0
        self.copies: dict[int, Tensor] = {}

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        cast: Callable = self._lower if function in LOW else _in_float32 if function in HIGH else lambda value: value
        return function(*map(cast, args), **{name: cast(value) for name, value in (kwargs or {}).items()})

    def _lower(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dtype != torch.float32:
            return value
        if not isinstance(value, nn.Parameter) or not torch.is_grad_enabled():
            return value.to(self.dtype)
        if id(value) not in self.copies:
            copy = self.copies[id(value)] = value.to(self.dtype)
            self.known.add(place_of(copy))
            self.copied += copy.untyped_storage().nbytes()
        return self.copies[id(value)]


def _in_float32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


# what autocast computes in half precision on GPUs, and what in float32
LOW = {
    F.linear, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose2d, F.scaled_dot_product_attention,
    torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm, torch.baddbmm, torch.einsum,
}  # fmt: skip
HIGH = {F.group_norm, F.layer_norm, F.softmax, torch.softmax, Tensor.softmax, F.mse_loss}


class _Fused(TorchFunctionMode):
    """Let attention on the meta device save what the kernels of GPUs save: query, key, value, output, and a sum for each row."""

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        given = dict(zip(("query", "key", "value"), args)) | (kwargs or {})
        if function is F.scaled_dot_product_attention:
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(given["query"], given["key"], given["value"])[0]
        return function(*args, **(kwargs or {}))
