"""What a run will take: time and memory from a measured training step and the cost model, and disk from the sizes of its files."""

from __future__ import annotations

import copy
import math
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from distill.denoiser import AUTOCAST, Denoiser, under_autocast
from distill.rng import Rng
from distill.second import Second
from distill.train import Method
from distill.zero import BUCKET
from eval.features import Extractor
from eval.sweep import KEPT, KEPT_BYTES
from recipes.common.cli import duration
from recipes.common.cost import A100, ADAM, CARDS, Cost, cost, largest_batch
from recipes.common.footprint import Lowered, saved_bytes
from recipes.common.forecast import seconds_of
from recipes.data.sets import Data
from teachers import Teacher
from teachers.hollow import is_hollow
from teachers.networks.lora import is_adapter

PAGE = 8_000_000  # bytes of report, pictures, metrics and configuration


def measure_step_time(
    method: Method, student: Denoiser, x0: Tensor, cond: dict[str, Tensor], steps: float = math.inf, precision: str = "no"
) -> tuple[float, float]:
    """Return the seconds per image of a training step with its update, and of a network call, measured on a copy of the student.

    ``steps``: how many the run takes. The steps of a second network (`distill.second`) are part of it. ``precision``: of autocast in
    training.
    """
    student = replace(student, net=copy.deepcopy(student.net).to(x0.device).train())
    weights = [weight for weight in student.net.parameters() if weight.requires_grad]
    adam = torch.optim.AdamW(weights, lr=0.0, fused=True)
    step, calling = _works(method, student, x0, cond, precision)

    def training() -> None:
        step()
        adam.step()
        adam.zero_grad()

    seconds = [seconds_of(training, x0.device, steps), seconds_of(calling, x0.device, 0)]
    return seconds[0] / len(x0), seconds[1] / len(x0)


def count_operations(
    method: Method, student: Denoiser, x0: Tensor, cond: dict[str, Tensor], *teachers: nn.Module
) -> tuple[float, float]:
    """Return the floating-point operations per image of a training step, and of a network call, of `teachers.hollow` networks.

    A multiplication and an addition count as two. Samples and conditions are on the meta device. ``teachers``: of the
    target, see `once`.
    """
    step, call = _works(method, student, x0, cond)
    with once(*teachers) as saved:
        count = _operations(step) + sum(saved)
    return count / len(x0), _operations(call) / len(x0)


def _operations(work: Callable[[], object]) -> int:
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = _Whole()  # type: ignore[assignment]
    with counter:
        work()
    return counter.get_total_flops()


@contextmanager
def once(*nets: nn.Module) -> Iterator[list[int]]:
    """Let calls of hollow networks without gradient that are alike happen once, and return empty tensors afterwards.

    A sampler in a target calls one a hundred times, and a call takes seconds. Yields the operations of the calls left out.
    """
    saved: list[int] = []
    hollow = list({id(net): net for net in nets if is_hollow(net)}.values())
    for net in hollow:
        net.forward = _remembered(net.forward, saved)  # type: ignore[method-assign]
    try:
        yield saved
    finally:
        for net in hollow:
            del net.forward


def _remembered(forward: Callable[..., Tensor], saved: list[int]) -> Callable[..., Tensor]:
    seen: dict[tuple, tuple[Tensor, int]] = {}

    def call(*inputs: Any, **cond: Any) -> Tensor:
        if torch.is_grad_enabled():
            return forward(*inputs, **cond)
        key = tuple(tuple(value.shape) for value in (*inputs, *cond.values()))
        if key in seen:
            saved.append(seen[key][1])
            return torch.empty_like(seen[key][0])
        outputs: list[Tensor] = []
        count = _operations(lambda: outputs.append(forward(*inputs, **cond)))
        seen[key] = outputs[0], count
        return outputs[0]

    return call


class _Whole(nullcontext):
    """Take the place of the counter's hooks on modules, with which some networks raise errors."""

    parents = frozenset(("Global",))


def _works(
    method: Method, student: Denoiser, x0: Tensor, cond: dict[str, Tensor], precision: str = "no"
) -> tuple[Callable, Callable]:
    """Return two functions: all losses of a training step with their gradients, and a network call."""
    rng = draws(x0)
    of: Second | None = getattr(method, "second", None)
    other = (
        None if of is None else replace(of.begin, net=copy.deepcopy(of.begin.net).to(x0.device).requires_grad_(True).train())
    )
    trained, beside = under_autocast(student, precision), None if other is None else under_autocast(other, precision)

    def step() -> None:
        for _ in range(of.period if of is not None else 0):
            method.second_loss(beside, trained, x0, rng=rng, progress=0.0, **cond).mean().backward()  # type: ignore[attr-defined]
        method(trained, x0, rng=rng, progress=0.0, **cond).mean().backward()

    def calling() -> None:
        with torch.inference_mode():
            student(x0, torch.tensor(student.schedule.t_max), **cond)

    return step, calling


def draws(x0: Tensor) -> Rng:
    """Return the random numbers of a trial on samples x0: on their device, or on the CPU for the meta device, which has none."""
    return Rng.seeded(0, torch.device("cpu") if x0.device.type == "meta" else x0.device, len(x0))


def sharding_of(accelerator: Accelerator, net: nn.Module) -> dict[str, Any]:
    """Return the ``sharding``, ``block`` and ``root`` of the cost model for a network under this accelerator."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return {"sharding": "zero2", "block": BUCKET}
    if accelerator.distributed_type != DistributedType.FSDP:
        return {"sharding": "none"}
    plugin = accelerator.state.fsdp_plugin
    names = plugin.transformer_cls_names_to_wrap or ()
    owner = {weight: part for part in net.modules() if type(part).__name__ in names for weight in part.parameters()}
    blocks: Counter = Counter()
    for weight, part in owner.items():  # of nested blocks, the inner one
        blocks[part] += weight.numel()
    root = sum(weight.numel() for weight in net.parameters()) - blocks.total()
    return {
        "sharding": "weights" if plugin.reshard_after_forward else "gradients",
        "block": max(blocks.values(), default=0),
        "root": root,
    }


def training_memory(
    method: Method,
    student: Denoiser,
    x0: Tensor,
    cond: dict[str, Tensor],
    accelerator: Accelerator,
    *,
    frozen: int,
    averaged: bool,
    adam_bytes: int = ADAM["adamw"],
) -> Cost:
    """Return the memory of training by `recipes.common.cost.cost`, with the activations of a microbatch (x0, cond) counted in a step.

    ``frozen``: bytes of the networks that are not trained. ``adam_bytes``: a value of `recipes.common.cost.ADAM`.
    """
    weights = [weight for weight in student.net.parameters() if weight.requires_grad]
    forward = partial(method, student, x0, rng=draws(x0), progress=0.0, **cond)
    dtype = AUTOCAST.get(accelerator.mixed_precision)
    lowered = None if dtype is None else Lowered(dtype)
    activations = saved_bytes(lambda: forward().mean(), student.net.parameters(), student.net, lowered)
    how = sharding_of(accelerator, student.net)
    count = sum(weight.numel() for weight in weights)
    rest: dict[str, Any] = {"teacher": frozen, "teacher_bytes": 1, "activations": activations, "adam_bytes": adam_bytes}
    rest["copies"] = 0 if lowered is None else lowered.copied
    return cost(count, accelerator.num_processes, **how, **rest, averaged=averaged)


def memory_text(needed: Cost, rest: float) -> str:
    """Return the memory of a process for people: what training needs by kind, and ``rest``, bytes that the process holds beside it."""
    kinds = ("weights", "gradients", "adam", "average", "teacher", "activations")
    parts = [f"{kind.replace('adam', 'Adam')} {gigabytes(size)}" for kind in kinds if (size := getattr(needed, kind))]
    return f"{gigabytes(needed.memory + rest)}: {', '.join(parts)}; program and data {gigabytes(rest)}"


def batches_text(needed: Cost, batch: int) -> str:
    """Return how many samples fit on GPUs of usual sizes, for people. ``needed``: the memory of ``batch`` samples."""
    return "; ".join(f"{size} GB: {largest_batch(needed, batch, size):,} images" for size in CARDS)


def weights_of(model: Teacher) -> tuple[list[Tensor], list[Tensor]]:
    """Return all weights of a model's network, and those that training changes: of an adapter, or all of them."""
    weights: dict[str, Tensor] = dict(model.parametric.net.named_parameters())
    adapter = [weight for name, weight in weights.items() if is_adapter(name)]
    return list(weights.values()), adapter or list(weights.values())


def size_of(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def disk_bytes(
    student: Teacher, data: Data, extractor: Extractor, *, stages: int, cells: int, images: int, averaged: bool
) -> int:
    """Return about how many bytes a run writes, at its fullest.

    They are the students of all ``stages`` and the last one again, three checkpoints of weights, Adam's state and average, two
    pipelines, the pictures of ``cells`` of ``images`` images each, and the features of the data.
    """
    net = student.parametric.net
    file, saved, whole = size_of(student.tensors().values()), size_of(net.state_dict().values()), size_of(net.parameters())
    codec = 0 if student.codec is None else size_of(student.codec.network.state_dict().values())
    checkpoint = saved * (2 if averaged else 1) + 2 * min(saved, whole)  # that of an adapter is its own
    picture = int(torch.Size(student.image_shape).numel())
    kept = min(images, max(16, min(KEPT, KEPT_BYTES // picture))) * picture
    known = torch.zeros(1, *student.image_shape, dtype=torch.uint8)
    features = 0 if data.latents is not None else len(data.images) * size_of([extractor(known).fid])
    return (stages + 1) * file + 3 * checkpoint + 2 * (max(saved, whole) + codec) + cells * kept + features + PAGE


def check_disk(folder: Path, needed: int) -> None:
    """Raise ValueError where the disk of ``folder`` has fewer bytes free than a run still needs beside what it has written."""
    written = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    free = shutil.disk_usage(next(path for path in (folder, *folder.absolute().parents) if path.is_dir())).free
    if free + written < needed:
        raise ValueError(
            f"{folder}: the run needs about {gigabytes(needed - written)} of disk and {gigabytes(free)} are free: free some, or choose"
            " another --output-dir"
        )


def work_text(operations: float) -> str:
    """Return floating-point operations for people, with the time that one GPU in use takes for them."""
    tera = operations / 1e12
    return (
        f"{tera:{',.0f' if tera >= 100 else '.3g'}} TFLOP, {duration(operations / A100)} on an A100 at 40 % of its 312 TFLOP/s"
    )


def gigabytes(number: float) -> str:
    """Return a number of bytes in MB or GB, for people."""
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{max(number, 0) / 1e6:.0f} MB"
