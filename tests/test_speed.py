"""Compiled networks and checkpointed activations: the same training in one graph a shape, or with fewer activations kept."""

import copy
import shutil
from itertools import islice

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from conftest import here, refuses
from processes import together
from torch import nn
from torch._dynamo.utils import counters

from distill.denoiser import Denoiser
from distill.divergence import Diverged
from distill.files import load
from distill.grid import uniform
from distill.progressive import Progressive
from distill.regression import Regression
from distill.resume import Resumable
from distill.schedule import Cosine
from distill.speed import NotCompiled, check_compiler, checkpoint_activations, compiled, networks, uncompiled
from distill.target import Mix
from distill.train import BatchSplit, Optimization, train
from recipes import consistency, progressive, teacher
from recipes.common.building import method_of, student_of
from recipes.common.method_flags import MethodFlags
from recipes.common.methods import METHODS
from recipes.data import sets
from teachers.experts import Experts
from teachers.students import untrained
from teachers.teacher import frozen

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
    frozen(model.parametric.net)
    return model


def case(name, dropout=0.1):
    """A student and a method whose teacher has the same weights."""
    teacher = tiny(dropout)
    if name in ("progressive", "guided"):
        return teacher, Progressive(teacher.guided(2.0 if name == "guided" else 1.0), uniform(teacher.denoiser.schedule, 8))
    flags = MethodFlags(method=name.removesuffix("-exact"), jvp="exact" if name.endswith("-exact") else "finite")
    student = student_of(flags, teacher)
    return student, method_of(flags, teacher, student, DATA, 0)


def training(name, steps=10, precision="no", backend=None, accelerator=None, dropout=0.1):
    """The states of the first steps of a training; with a backend, of compiled networks."""
    torch.manual_seed(0)
    model, method = case(name, dropout)
    accelerator, trained = accelerator or Accelerator(cpu=True, mixed_precision=precision), model.student()
    how = Optimization(images=8 * 20, batch_size=8, ema_halflife_images=64)
    split = BatchSplit(8, accelerator.num_processes, accelerator.process_index)
    batches = DATA.batches(split, 0, "p", accelerator.device, model.condition)
    states = train(method, trained, batches, accelerator, how, seed=0, phase="p")
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
def test_compiled_losses_are_the_plain_ones_up_to_rounding_with_the_same_dropout_masks():
    compiled_losses, plain = ([float(state.loss) for state in training("cd", 4, backend=b)] for b in ("inductor", None))
    assert graphs() == 3 and not counters["graph_break"]
    assert compiled_losses == pytest.approx(plain, rel=1e-3)
    torch.compiler.reset()
    assert plain != pytest.approx([float(state.loss) for state in training("cd", 4, dropout=0.0)], rel=1e-2)


class Doubling(nn.Module):
    """Twice the input plus a weight; ``breaks``: with a print, which no graph holds."""

    def __init__(self, breaks=False):
        super().__init__()
        self.weight, self.breaks = nn.Parameter(torch.zeros(2)), breaks

    def forward(self, x, t):
        if self.breaks:
            print(float(x.sum()))
        return 2 * x + self.weight


def test_networks_are_compiled_within_the_block_alone_and_keep_their_names_and_their_copies_are_plain():
    net = Doubling()
    x, t, names = torch.randn(3, 2), torch.rand(3), list(net.state_dict())
    with compiled(Regression(Mix(Denoiser(net, Cosine()))), backend="eager"):
        assert net._compiled_call_impl is not None and type(net) is Doubling and list(net.state_dict()) == names
        assert copy.deepcopy(net)._compiled_call_impl is None
        with uncompiled():
            net(x, t)
        assert graphs() == 0
        assert torch.equal(net(x, t), 2 * x) and graphs() == 1
    assert net._compiled_call_impl is None


def test_experts_whose_batches_change_are_not_compiled_and_guided_teachers_are():
    nets = [Doubling() for _ in range(2)]
    one, other = (Denoiser(net, Cosine()) for net in nets)
    assert list(networks(Mix(Experts(Cosine(), (one, other), (0.0,))))) == []
    student, method = case("guided")
    assert list(networks(method)) == [student.parametric.net]


def test_a_network_that_does_not_compile_ends_in_one_line():
    denoiser = Denoiser(Doubling(breaks=True), Cosine())
    x, t = torch.randn(3, 2), torch.rand(3)

    def call():
        with compiled(denoiser, backend="eager"):
            denoiser(x, t)

    line = refuses("torch.compile fails for this network ( ... leave --compile out", call)
    assert len(line) < 250 and denoiser.net._compiled_call_impl is None
    with pytest.raises(NotCompiled):
        call()


def test_a_bad_step_is_searched_and_taken_back_without_compiling_for_each_number_of_samples(tmp_path):
    """The search halves the batch, and each size would be another graph."""
    student, data = Denoiser(Doubling(), Cosine(), "x0"), torch.randn(64, 2)
    data[40] = 1e30

    def batches(step):
        while True:
            yield data[8 * step % 64 :][:8], {}
            step += 1

    how = Optimization(images=8 * 20, batch_size=8)
    states = train(
        Regression(),
        student,
        batches,
        Accelerator(cpu=True),
        how,
        seed=0,
        phase="p",
        resumable=Resumable(tmp_path),
        rollbacks=0,
    )
    with compiled(student, backend="eager"), pytest.raises(Diverged):
        list(states)
    assert graphs() == 1


def test_a_missing_compiler_is_named_before_anything_is_written(refused, monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "which", lambda name, *_: None)
    monkeypatch.delenv("CXX", raising=False)
    line = refused(teacher.main, "--preset smoke --compile --output-dir", tmp_path / "run")
    assert "g++" in line and "leave --compile out" in line and not (tmp_path / "run").exists()
    monkeypatch.setenv("CXX", "no-such-compiler")
    refuses("no-such-compiler is not installed", check_compiler, False)
    refuses("gcc or clang is not installed", check_compiler, True)


def train_together():
    """In each of two processes: some steps of compiled networks under DDP, and of plain ones."""
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    *_, last = training("cd", 3, accelerator=accelerator, backend="eager")
    *_, plain = training("cd", 3, accelerator=accelerator)
    assert graphs() >= 2 and torch.allclose(weights(last), weights(plain), atol=1e-6)
    print("equal")
    accelerator.end_training()


@pytest.mark.slow
def test_compiled_networks_train_in_several_processes(tmp_path):
    codes, out = together(2, train_together, log=tmp_path / "log")
    assert codes == {0} and out.split().count("equal") == 2, out


def test_compiling_is_refused_with_sharded_weights(refused, monkeypatch, tmp_path):
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType.FSDP)
    line = refused(teacher.main, "--preset smoke --compile --output-dir", tmp_path / "run")
    assert "FSDP" in line and not (tmp_path / "run").exists()


# -- checkpointed activations ------------------------------------------------------------------------------------------------------
def gradient(net, checkpointed):
    net = copy.deepcopy(net).train().requires_grad_(True)
    if checkpointed:
        checkpoint_activations(net)
    saved = []
    torch.manual_seed(0)
    x = torch.randn(4, 1, 8, 8)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        loss = net(x, torch.rand(4) * 100, labels=torch.arange(4)).square().mean()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in net.parameters()]), sum(saved)


def test_checkpointed_activations_give_the_same_gradient_with_dropout_and_keep_less():
    net = tiny(dropout=0.3).parametric.net
    plain, whole = gradient(net, False)
    checkpointed, kept = gradient(net, True)
    assert plain.abs().max() > 0 and torch.allclose(plain, checkpointed, rtol=1e-6, atol=1e-9)
    assert kept < 0.7 * whole


def test_a_network_without_checkpoints_is_refused():
    refuses("Doubling has no checkpoints: accepted are diffusers models", checkpoint_activations, Doubling())


# -- recipes -----------------------------------------------------------------------------------------------------------------------
RUN = "--preset smoke --images 40 --chunk 40 --batch-size 16 --sweep-steps 1"


def test_checkpoints_and_derivatives_of_derivatives_are_refused_together(refused, tmp_path):
    arguments = "--method ect --regularize fokker-planck=0.1 --checkpoint-activations --output-dir"
    assert "fokker-planck" in refused(consistency.main, RUN, arguments, tmp_path / "run") and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_run_ends_with_the_same_weights_with_checkpoints_and_may_be_continued_without(new, tmp_path):
    arguments = f"{RUN} --teacher {new} --force --start-steps 2 --images-per-stage 32"
    for name, flags in (("plain", ""), ("checkpointed", "--checkpoint-activations")):
        here(progressive.main, arguments, flags, "--output-dir", tmp_path / name)
    one, other = (load(tmp_path / name / "student.safetensors")[0] for name in ("plain", "checkpointed"))
    assert one.keys() == other.keys() and all(torch.allclose(one[key], other[key], atol=1e-6) for key in one)
    here(progressive.main, arguments, "--output-dir", tmp_path / "checkpointed")
