"""What training costs each of many processes: bytes of memory, and bytes of collective calls per step. docs/many-gpus.md explains it.

P is the number of trained weights, W the number of processes. A ring sends the part (W - 1) / W of what it gathers or scatters, and twice
that of what it reduces to all.
"""

from __future__ import annotations

from dataclasses import dataclass

HALF = 2  # bytes of a bfloat16
FULL = 4  # bytes of a float32, in which weights, gradients, Adam's state and averages are kept
ADAM = {"adamw": 2 * FULL, "adamw8bit": 2}  # bytes of its two moments of a weight
CARDS = (24, 48, 80)  # GB of GPUs in use
A100 = 0.4 * 312e12  # floating-point operations per second in bf16 that training reaches there
USABLE = 0.9  # part of a GPU's memory that tensors can have, beside its driver, workspaces and fragments
SHARDING = ("none", "gradients", "weights", "zero2")


@dataclass(frozen=True)
class Cost:
    """Hold bytes per process. ``reduced`` and ``gathered``: of whole tensors, per step. ``sent``: by one process, per step."""

    weights: int
    gradients: int
    adam: int
    average: int
    teacher: int
    activations: int
    reduced: int
    gathered: int
    sent: float

    @property
    def memory(self) -> int:
        """The bytes of memory together."""
        return self.weights + self.gradients + self.adam + self.average + self.teacher + self.activations


def cost(
    trained: int,
    world: int,
    sharding: str = "none",
    *,
    block: int = 0,
    root: int = 0,
    teacher: int = 0,
    teacher_bytes: int = FULL,
    activations: int = 0,
    averaged: bool = True,
    calls: int = 1,
    target_calls: int = 0,
    gathered_bytes: int = FULL,
    adam_bytes: int = ADAM["adamw"],
    copies: int = 0,
) -> Cost:
    """Return the cost of a step of one microbatch.

    ``trained``: weights P of the student. ``sharding``: "none" is DDP; "weights" is FSDP2, "gradients" is FSDP2 with
    reshard_after_forward false, which keeps the gathered weights until the backward pass. "zero2" is DeepSpeed's ZeRO stage 2: weights
    and average are whole, a second copy of the weights is sharded, and new weights are gathered once. ``block``: weights of the largest
    sharded module; two of them are gathered at a time, and one gradient; under "zero2" those of the buffer that is reduced. ``root``:
    weights outside of all blocks, which stay gathered between the passes. ``teacher``: its weights, whole in each process.
    ``activations``: bytes of one microbatch. ``calls``: student calls with a gradient. ``target_calls``: calls of student or average
    without one. ``gathered_bytes``: of a gathered weight, 2 in bf16.
    ``adam_bytes``: a value of `ADAM`. ``copies``: bytes of the weights that autocast copies, held from forward to backward pass.

    Raises ValueError for another ``sharding``.
    """
    if sharding not in SHARDING:
        raise ValueError(f"sharding {sharding!r}: accepted are {', '.join(SHARDING)}")
    shards = 1 if sharding == "none" else world
    own, ring, whole = FULL * trained // shards, (world - 1) / world, sharding in ("none", "zero2")
    held = {"none": 0, "gradients": trained, "weights": 2 * block + root, "zero2": trained}[sharding] if world > 1 else 0
    passes = {"none": 0, "gradients": trained, "weights": 2 * trained - root, "zero2": 0}[sharding]  # backward without the root
    gathered = gathered_bytes * (calls * passes + (0 if whole else target_calls * trained))
    gathered += FULL * trained if sharding == "zero2" else 0
    reduced = FULL * trained
    return Cost(
        weights=own + (FULL if whole else gathered_bytes) * held + copies,
        gradients=own + (FULL * block if shards > 1 else 0),
        adam=adam_bytes * own // FULL,
        average=(FULL * trained if whole else own) if averaged else 0,
        teacher=teacher_bytes * teacher,
        activations=activations,
        reduced=reduced,
        gathered=gathered if world > 1 else 0,
        sent=ring * ((2 if sharding == "none" else 1) * reduced + gathered),
    )


def largest_batch(needed: Cost, batch: int, gigabytes: float) -> int:
    """Return how many samples at once fit on a GPU of so many GB, by the ``needed`` memory of ``batch`` samples; 0 if none does."""
    free = USABLE * 1e9 * gigabytes - (needed.memory - needed.activations)
    return max(0, int(free * batch // needed.activations)) if needed.activations else 0


def calls_of_a_step(teacher_calls: int, adapter: bool, recomputed: bool) -> int:
    """Return what a training step computes, in forward passes of the network.

    A backward pass takes two, of gradients of inputs and of weights. That of an adapter takes one: its own weights are few. Checkpoints add
    a forward pass.
    """
    return 1 + (1 if adapter else 2) + (1 if recomputed else 0) + teacher_calls
