"""Faster steps for a wait before them, `compiled`, and less memory for slower steps, `checkpoint_activations`.

Neither changes what is computed beyond rounding. A network keeps its type, its parameters and their names, and a copy of it is not
compiled.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import nn

from distill.denoiser import Denoiser

GRAPHS = 64  # kept of all networks of a class; torch keeps 8, and a ladder of mixed precision needs two for each stage


class NotCompiled(ValueError):
    """A network that torch.compile does not support."""


def check_compiler(gpu: bool) -> None:
    """Raise ValueError where torch.compile lacks its tools: on CPUs a C++ compiler, on GPUs Triton and a C compiler."""
    variable, usual = ("CC", ("gcc", "clang")) if gpu else ("CXX", ("g++",))
    tried = (os.environ[variable],) if variable in os.environ else usual
    if not any(map(shutil.which, tried)):
        raise ValueError(
            f"--compile needs a compiler, and {' or '.join(tried)} is not installed: install {usual[0]},"
            f" name another one in {variable}, or leave --compile out"
        )
    if gpu and importlib.util.find_spec("triton") is None:
        raise ValueError("--compile needs the package triton on a GPU: pip install triton, or leave --compile out")


@contextmanager
def compiled(*parts: Any, backend: str = "inductor") -> Iterator[None]:
    """Compile the networks of ``parts`` within the block, each as one graph for each shape of its input.

    ``parts``: denoisers, and methods and targets that hold some. Experts stay as they are: they are called with another number of
    samples each time. ``backend``: of torch.compile. A network is compiled when it is first called. Exact tangents and the search for a
    bad sample use the network as it was.

    Raises NotCompiled, a ValueError, from the first call of a network that torch.compile does not support.
    """
    import torch._dynamo as dynamo
    import torch._inductor.config as inductor

    before = {net: net._compiled_call_impl for part in parts for net in networks(part)}
    for net in before:
        net.compile(backend=backend, dynamic=False, fullgraph=True)
    try:
        # random numbers are those of eager networks, so that a student and its target share their dropout masks
        with dynamo.config.patch(recompile_limit=GRAPHS), inductor.patch(fallback_random=True):
            yield
    except dynamo.exc.TorchDynamoException as error:
        why = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise NotCompiled(f"--compile: torch.compile fails for this network ({why}): leave --compile out") from error
    finally:
        for net, call in before.items():
            net._compiled_call_impl = call


def networks(part: Any) -> Iterator[nn.Module]:
    """Yield the networks of a denoiser, and those of the denoisers in the fields of a dataclass."""
    if isinstance(part, Denoiser):
        yield part.net
    elif is_dataclass(part):
        for field in fields(part):
            yield from networks(getattr(part, field.name))


@contextmanager
def uncompiled() -> Iterator[None]:
    """Call networks within the block as if they were not compiled."""
    loaded = "torch._dynamo" in sys.modules  # importing it takes a second
    with torch.compiler.set_stance("force_eager") if loaded else nullcontext():
        yield


def checkpoint_activations(net: nn.Module) -> None:
    """Let the backward pass compute the activations of blocks once more, instead of keeping them. Dropout masks are the same.

    Raises ValueError unless a part of the network is a diffusers model that has such checkpoints.
    """
    parts = [part for part in net.modules() if getattr(part, "_supports_gradient_checkpointing", False)]
    if not parts:
        raise ValueError(
            f"--checkpoint-activations: {type(net).__name__} has no checkpoints: accepted are diffusers models that support them"
        )
    for part in parts:
        part.enable_gradient_checkpointing()  # type: ignore[operator]
