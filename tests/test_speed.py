"""Compiled networks and checkpointed activations: the same training in one graph a shape, or with fewer activations kept."""

import copy
from dataclasses import replace
from itertools import islice

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import here, refuses
from torch import nn
from torch._dynamo.utils import counters

from distill.denoiser import Denoiser
from distill.files import load
from distill.grid import uniform
from distill.progressive import Progressive
from distill.resume import Resumable
from distill.schedule import Cosine
from distill.speed import NotCompiled, checkpoint_activations, compiled, networks, uncompiled
from distill.train import BatchSplit, Optimization, train
from recipes import consistency, progressive, teacher
from recipes.common.methods import METHODS, MethodFlags, method_of
from recipes.data import sets
from teachers.experts import Experts
from teachers.students import untrained, with_two_times

DATA = sets.load("digits")


@pytest.fixture(autouse=True)
def _forget():
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()
    AcceleratorState._reset_state(reset_partial_state=True)


def tiny(dropout=0.1):
    """A small untrained model with attention and dropout."""
    model = untrained((1, 8, 8), 10, (8, 16), 1, 0)
    for part in model.parametric.net.modules():
        if isinstance(part, nn.Dropout):
            part.p = dropout
    return model


def case(name):
    """A student and a method whose teacher has the same weights."""
    teacher = tiny()
    if name in ("progressive", "guided"):
        return teacher, Progressive(teacher.guided(2.0 if name == "guided" else 1.0), uniform(teacher.denoiser.schedule, 8))
    flags = MethodFlags(method=name.removesuffix("-exact"), jvp="exact" if name.endswith("-exact") else "finite")
    student = with_two_times(teacher) if METHODS[flags.method].two_times else teacher
    return student, method_of(flags, teacher, student, DATA, 0)


def training(name, steps=10, precision="no", backend=None, **kwargs):
    """The states of the first steps of a training; with a backend, of compiled networks."""
    torch.manual_seed(0)
    model, method = case(name)
    accelerator, trained = Accelerator(cpu=True, mixed_precision=precision), model.student()
    how = Optimization(images=8 * 20, batch_size=8, ema_halflife_images=64)
    batches = DATA.batches(BatchSplit(8), 0, "p", accelerator.device, model.condition)
    states = train(method, trained, batches, accelerator, how, seed=0, phase="p", **kwargs)
    if backend is None:
        yield from islice(states, steps)
    else:
        with compiled(trained, method, backend=backend):
            yield from islice(states, steps)


def weights(state):
    return torch.cat([p.detach().flatten() for p in (*state.student.net.parameters(), *state.ema.net.parameters())])


def graphs():
    return counters["stats"]["unique_graphs"]


CASES = ["progressive", "guided", *METHODS, *(f"{name}-exact" for name in METHODS if "jvp" in METHODS[name].takes)]


# -- compiled networks -------------------------------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize("precision, names", [("no", CASES), ("bf16", ["cd", "scd-exact"])])
def test_every_method_compiles_its_networks_before_the_second_step_and_in_one_graph(precision, names):
    """The backend "eager" runs the captured graphs operator by operator: the same bits, with everything that capturing can break."""
    for name in names:
        states = training(name, precision=precision, backend="eager")
        next(states)
        captured = graphs()
        *_, last = states
        assert graphs() == captured >= 1, name
        *_, plain = training(name, precision=precision)
        assert last.step == plain.step == 10 and torch.equal(weights(last), weights(plain)), name
    assert not counters["graph_break"]


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_training_ends_where_plain_training_does_up_to_rounding(backend):
    *_, last = training("cd", 10, backend=backend)
    *_, plain = training("cd", 10)
    assert graphs() == 3 and not counters["graph_break"]
    assert torch.allclose(weights(last), weights(plain), atol=1e-4)
