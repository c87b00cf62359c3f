"""Training through the sampler, against closed forms: Gaussian data, and a linear denoiser whose gradient is a chain of 2 factors."""

from itertools import pairwise

import pytest
import torch
from accelerate import Accelerator
from closed_forms import MEAN, ORACLE, STD, Small, rng
from conftest import Function, here, rows, words
from processes import together
from test_parallel import gradient
from test_self_conditioning import Net, Recording
from torch import nn

from distill import grid
from distill.denoiser import Denoiser
from distill.distance import PseudoHuber
from distill.samplers import ddim, heun
from distill.schedule import Cosine, explain, move_weights
from distill.unrolled import Unrolled, unrolled
from recipes import consistency
from recipes.common.methods import METHODS
from teachers.oracle import Gaussian

TEACHER = Gaussian(Cosine(), MEAN, STD)
SHAPE = torch.zeros(64, 2).double()


def loss_of(method, student, seed=0):
    return method(student, SHAPE, rng=rng(64, seed), progress=0.0)


def exact_student(steps):
    """The denoiser whose DDIM step from each time of the grid lands on the path of Gaussian data at the next one."""
    times = grid.uniform(Cosine(), steps)

    def x0(x, t):
        s = times[(times - t).abs().argmin() + 1]
        return explain(Cosine(), x, TEACHER.flow(x, t, s), t, s)

    return Function(Cosine(), x0)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_the_loss_vanishes_for_the_exact_map_and_not_for_the_teacher_itself(steps):
    method = Unrolled(TEACHER, steps, 400, sampler=heun)
    loss = loss_of(method, exact_student(steps))
    assert loss.shape == (64,) and loss.max() < 1e-8
    assert loss_of(method, TEACHER).mean() > 1e-3


def test_the_loss_is_exactly_zero_where_the_student_is_the_teacher_and_takes_its_steps():
    assert loss_of(Unrolled(TEACHER, 4, 4), TEACHER).max() == 0 and loss_of(Unrolled(TEACHER, 4, 5), TEACHER).max() > 0


def test_one_step_is_regression_on_the_teachers_end_points():
    draws, distance = rng(64), PseudoHuber()
    noise = draws.normal(SHAPE)
    student = Function(Cosine(), lambda x, t: torch.tanh(x))
    expected = distance(torch.tanh(noise), ddim(TEACHER, noise, grid.uniform(Cosine(), 16)))
    assert torch.equal(loss_of(Unrolled(TEACHER, distance=distance), student), expected)


class Scale(nn.Module):
    """D(x, t) = w x, a different w for each of the times."""

    def __init__(self, times, weights):
        super().__init__()
        self.times, self.w = times, nn.Parameter(weights)

    def forward(self, x, t):
        return self.w[(t[0] - self.times).abs().argmin()] * x


@pytest.mark.parametrize("checkpointed", [False, True])
def test_the_gradient_of_a_linear_denoiser_is_the_product_of_the_other_steps(checkpointed):
    """One step is x -> (a + b w) x, so that x(K) = prod_i (a_i + b_i w_i) x(0), and each gradient leaves its own factor out."""
    times, w = grid.uniform(Cosine(), 3), torch.tensor([0.3, -0.5, 0.8]).double()
    student = Denoiser(Scale(times[:-1], w), Cosine(), "x0")
    x = torch.randn(5, 2).double()
    unrolled(student, x, times, checkpointed).sum().backward()
    a, b = (torch.stack(pair) for pair in zip(*(move_weights(Cosine(), t, s) for t, s in pairwise(times)), strict=True))
    factors = a + b * w
    by_hand = torch.stack([b[i] * factors[[k for k in range(3) if k != i]].prod() * x.sum() for i in range(3)])
    assert torch.allclose(student.net.w.grad, by_hand, rtol=1e-10)


def gradients(net, checkpointed, steps=3):
    student = Denoiser(net, Cosine())
    net.zero_grad()
    loss_of(Unrolled(TEACHER, steps, checkpointed=checkpointed), student).mean().backward()
    return torch.cat([p.grad.flatten() for p in net.parameters()])


@pytest.mark.parametrize("kind", [Small, Net])
def test_gradients_with_and_without_checkpoints_are_equal_to_the_bit_and_match_finite_differences(kind):
    """Also where the state of a self-conditioned network is a second way back through the steps."""
    net = kind().double()
    exact = gradients(net, False)
    assert torch.equal(gradients(net, True), exact)
    weight, h, method = next(net.parameters()), 1e-5, Unrolled(TEACHER, 3)
    ends = []
    for sign in (1, -1):
        with torch.no_grad():
            weight.view(-1)[1] += sign * h
            ends.append(loss_of(method, Denoiser(net, Cosine())).mean())
            weight.view(-1)[1] -= sign * h
    assert exact[1].abs() > 1e-6 and torch.allclose((ends[0] - ends[1]) / (2 * h), exact[1], rtol=1e-5)


def test_checkpoints_keep_the_states_between_steps_alone():
    calls = []

    class Counting(Small):
        def forward(self, x, t, to=None):
            calls.append(torch.is_grad_enabled())
            return super().forward(x, t)

    net = Counting().double()
    gradients(net, False)
    assert len(calls) == 3
    gradients(net, True)
    assert len(calls) == 3 + 6  # each step once more in the backward pass


def test_student_and_teacher_carry_their_states_apart_from_each_other():
    student, teacher = Recording(), Recording()
    loss_of(Unrolled(teacher, 2, 4, checkpointed=False), student)
    for seen in (student.seen, teacher.seen):
        assert seen[0][0] is None and all(later[0] is before[1] for before, later in pairwise(seen))
    assert (len(student.seen), len(teacher.seen)) == (2, 4)


def compare():
    """In each of two processes: the gradient of half of the batch under DDP, averaged, and that of the whole batch."""
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    rank, x0 = accelerator.process_index, torch.zeros(32, 2).double()
    for checkpointed in (False, True):
        method = Unrolled(ORACLE, 3, checkpointed=checkpointed)
        alone = Denoiser(Small().double(), Cosine())
        shared = Denoiser(accelerator.prepare(Small().double()), Cosine())
        gradient(method, alone, x0, None).backward()
        accelerator.backward(gradient(method, shared, x0, slice(16 * rank, 16 * rank + 16)))
        pairs = zip(alone.net.parameters(), shared.net.parameters(), strict=True)
        assert max((a.grad - b.grad).abs().max() for a, b in pairs) < 1e-6
        print("equal")
    accelerator.end_training()


@pytest.mark.slow
def test_two_processes_give_the_gradient_of_one_with_the_doubled_batch(tmp_path):
    codes, out = together(2, compare, log=tmp_path / "log")
    assert codes == {0} and out.count("equal") == 4, out


@pytest.mark.slow
def test_a_student_is_trained_through_the_steps_that_unroll_names_and_measured_there(tmp_path, new, stock_here):
    tiny = "--preset smoke --images 60 --chunk 60 --sweep-steps 1 --training-images 64 --batch-size 32 --channels 8 16"
    arguments = words(
        "--method unrolled --unroll 2 --teacher-steps 3", tiny, "--force --teacher", new, "--output-dir", tmp_path / "run"
    )
    here(consistency.main, *[a for a in arguments if a])
    assert METHODS["unrolled"].sampler == "ddim" and (tmp_path / "run/pipeline/model_index.json").exists()
    assert {"unrolled ddim 1", "unrolled ddim 2"} <= rows(tmp_path / "run").keys()
