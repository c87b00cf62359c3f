"""Training steps by the bare network passes that they need.

A step is `distill.train.train`'s own, with its batch, optimizer and average. The bare passes are as many calls of the same networks: the
teacher and the student without gradient in inference mode, tangents in forward mode, and the student once forwards and backwards.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from benchmarks.networks import Network
from benchmarks.turns import Clock, Ratio, Work, in_turn
from distill.grid import uniform
from distill.progressive import Progressive
from distill.scm import forward_mode
from distill.train import BatchSplit, Method, Optimization, train
from recipes.common.building import method_of, student_of
from recipes.common.method_flags import MethodFlags
from recipes.data.sets import Data
from teachers import Teacher

WANTED, WANTED_COMPILED = 1.05, 0.95
ENDLESS = 10**9  # images: no stage ends while it is measured


@dataclass(frozen=True)
class Passes:
    """Count the network calls of a training step, beside the student's one forward and backward pass.

    ``teacher``, ``student``: calls without gradient. ``tangents``: forward-mode calls of the student.
    """

    teacher: int = 0
    student: int = 0
    tangents: int = 0


PASSES: dict[str, Passes] = {
    "progressive": Passes(teacher=2),
    "cd": Passes(teacher=4, student=1),
    "ct": Passes(student=1),
    "ict": Passes(student=1),
    "ect": Passes(student=1),
    "scd": Passes(teacher=1, student=3),
    "sct": Passes(student=3),
    "meanflow": Passes(teacher=1, student=3),
    "denoise": Passes(teacher=1),
    "lmd": Passes(teacher=1, student=2),
    "psd": Passes(teacher=1, student=2),
    "alpha_flow": Passes(teacher=1),  # while alpha is 1, as at the start of a run
    "pdd": Passes(teacher=2, student=1),
    "scd-exact": Passes(teacher=1, tangents=1),
    "sct-exact": Passes(tangents=1),
    "meanflow-exact": Passes(teacher=1, tangents=1),
}


def built(name: str, teacher: Teacher, data: Data) -> tuple[Teacher, Method]:
    """Return the model that a method's student starts from, and the method; NAME-exact has exact tangents."""
    if name == "progressive":
        return teacher, Progressive(teacher.denoiser, uniform(teacher.denoiser.schedule, 8))
    method, _, exact = name.partition("-")
    flags = MethodFlags(method=method, jvp="exact" if exact else "finite")
    student = student_of(flags, teacher)
    return student, method_of(flags, teacher, student, data, 0)


def steps(method: Method, student: Teacher, network: Network, device: torch.device, compiled: bool = False) -> Work:
    """Return a function that takes the next training step of a copy of ``student``."""
    trained = student.student()
    trained.net.to(device)
    if compiled:
        trained.net.compile()
    batches = network.data.batches(BatchSplit(network.batch), 0, "benchmark", device, student.condition)
    budget = Optimization(ENDLESS, network.batch, ema_halflife_images=4_000)
    accelerator = Accelerator(cpu=device.type == "cpu")
    states = train(method, trained, batches, accelerator, budget, seed=0, phase="benchmark")
    return lambda: next(states)


def bare(passes: Passes, teacher: Teacher, student: Teacher, x: Tensor, labels: Tensor | None) -> Work:
    """Return a function that makes the bare ``passes`` of two networks on one batch."""
    net, frozen = copy.deepcopy(student.parametric.net).to(x.device).train().requires_grad_(True), teacher.parametric.net
    t, conditions = torch.full(x.shape[:1], 500.0, device=x.device), (teacher.condition(labels), student.condition(labels))

    def work() -> None:
        with torch.inference_mode():
            for _ in range(passes.teacher):
                frozen(x, t, **conditions[0])
            for _ in range(passes.student):
                net(x, t, **conditions[1])
        for _ in range(passes.tangents):
            with torch.no_grad(), forward_mode():
                torch.func.jvp(lambda x, t: net(x, t, **conditions[1]), (x, t), (x, torch.ones_like(t)))
        net(x, t, **conditions[1]).square().sum().backward()
        net.zero_grad()

    return work


def rows(
    title: str, network: Network, methods: tuple[str, ...], turns: int, clock: Clock, device: torch.device, compiled: bool
) -> Iterator[Ratio]:
    """Yield the ratio of a training step by its bare passes, of each method. With ``compiled`` the step is; the passes never are."""
    wanted = WANTED_COMPILED if compiled else WANTED
    x = network.data.x0(slice(network.batch), device)
    labels = None if network.data.labels is None else network.data.labels[: network.batch].to(device)
    for name in methods:
        teacher = network.model.to(device)
        student, method = built(name, teacher, network.data)
        theirs = bare(PASSES[name], copy.deepcopy(teacher) if compiled else teacher, student, x, labels)
        if compiled:
            teacher.parametric.net.compile()
        step = steps(method, student, network, device, compiled)
        yield in_turn(f"{title} {name}{' compiled' if compiled else ''}", step, theirs, turns, clock, wanted)
