"""On Gaussian data the consistency function is closed form: every loss is held against it."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from closed_forms import MEAN, ORACLE, STD, Exact, data, rng
from conftest import Function, refuses
from torch import nn

from distill import grid
from distill.consistency import (
    Consistency,
    Gap,
    Neighbours,
    ct_steps,
    ict_steps,
    same_dropout,
    with_boundary,
)
from distill.denoiser import Denoiser
from distill.samplers import consistency, ddim
from distill.schedule import EDM, VE, Cosine, Flow, add_noise
from distill.scm import TRIG, tangent, velocity
from distill.target import DataSample, Mix
from recipes.common.method_flags import MethodFlags
from recipes.common.methods import METHODS
from teachers.oracle import Gaussian


@pytest.mark.parametrize("schedule", [Cosine(), EDM(), Flow()], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("order", [1, 2])
def test_the_distillation_loss_vanishes_on_the_exact_function_as_the_grid_refines(schedule, order):
    """The error of a step of order p falls by 2^(p + 1) with its length, the squared loss by the square of that."""
    teacher, x0 = Gaussian(schedule, MEAN, STD), data(4000)

    def loss(steps):
        method = Consistency(Mix(teacher, 1), Neighbours(lambda _: steps), order=order)
        return method(Exact(schedule), x0, rng=rng(4000), progress=0.0).mean().item()

    losses = [loss(n) for n in (20, 40, 80)]
    assert losses[2] < 1e-3
    for coarse, fine in itertools.pairwise(losses):
        assert coarse / fine > (3 if order == 1 else 8), losses


def test_training_is_distillation_by_a_teacher_that_returns_the_data_sample():
    x0, schedule = data(64), Cosine()
    returns = Function(schedule, lambda x_t, t: x0)
    pairs = Neighbours(lambda _: 30)
    one = Consistency(DataSample(), pairs)(Exact(schedule), x0, rng=rng(64), progress=0.5)
    two = Consistency(Mix(returns, 1.0), pairs)(Exact(schedule), x0, rng=rng(64), progress=0.5)
    assert torch.allclose(one, two)


def test_the_euler_step_of_training_keeps_the_noise():
    """Song et al. 2023: with the data sample as x0_hat, x_s is that sample with the same noise."""
    schedule, x0 = Cosine(), data(32)
    seen = []
    records = Function(schedule, lambda x_t, t: seen.append((x_t, t)) or x_t)
    Consistency(DataSample(), Neighbours(lambda _: 12))(records, x0, rng=rng(32), progress=0.0)
    (x_s, s), (x_t, t) = seen
    inner = t > schedule.t_min  # the last pair ends at the data, where the function is not evaluated
    noise = (x_t - schedule.alpha(t)[:, None] * x0) / schedule.sigma(t)[:, None]
    assert (t > s)[inner].all() and torch.allclose(x_s[inner], add_noise(schedule, x0, noise, s)[inner], atol=1e-5)
    assert torch.allclose(x_s[~inner], x0[~inner])


@pytest.mark.parametrize("prediction", ["v", "flow", "edm", "eps"])
@pytest.mark.parametrize("schedule", [Cosine(), Flow(), EDM()], ids=lambda s: type(s).__name__)
def test_the_boundary_holds_for_free(prediction, schedule):
    if prediction == "eps" and not isinstance(schedule, EDM):
        pytest.skip("eps has no student where alpha reaches 0")
    net = nn.Linear(2, 2)
    student = Denoiser(lambda x, t: net(x), schedule, prediction)
    x = torch.randn(16, 2)
    assert torch.allclose(student(x, torch.full((16,), schedule.t_clean)), x, atol=1e-6)


def test_the_curricula_are_their_papers():
    steps = ct_steps(2, 150)
    assert steps(0.0) == 2 and steps(1.0) == 151
    assert steps(0.5) == math.ceil(math.sqrt(0.5 * (151**2 - 4) + 4) - 1) + 1
    doubling = ict_steps(10, 1280)
    assert [doubling(k / 8) for k in range(8)] == [11, 21, 41, 81, 161, 321, 641, 1281] and doubling(1.0) == 1281


def test_pairs_of_ict_are_as_likely_as_their_equation_says():
    schedule, n = EDM(), 12
    t, s = Neighbours(lambda _: n, (-1.1, 2.0))(schedule, rng(200_000), 0.0)
    times = grid.karras(schedule, n)
    edges = torch.erf((times[:-1].log() + 1.1) / (2.0 * math.sqrt(2)))
    expected = edges[:-1] - edges[1:]
    expected = torch.cat([expected, edges[-1:] + 1])  # the last pair ends at the data, where ln sigma is minus infinity
    counts = torch.stack([(t == level).float().mean() for level in times[:-1].float()])
    assert torch.allclose(counts, (expected / expected.sum()).float(), atol=4e-3)
    index = torch.searchsorted(-times.float(), -t)
    assert torch.equal(times.float()[index + 1], s)


def test_gaps_of_ect_start_at_the_data_and_close_by_their_formula():
    t, s = Gap(q=2.0, stages=4)(EDM(), rng(1000), 0.0)
    assert (s[t < 1.94] == 0).all() and (s[t > 1.96] > 0).all()  # where 1 - (1 + 8 sigmoid(-t)) / 2 changes its sign
    t, s = Gap(q=2.0, stages=4)(EDM(), rng(1000), 0.99)
    inner = (s > 0) & (t < 79)
    assert torch.allclose((s / t)[inner], (1 - 2.0**-4 * (1 + 8 * torch.sigmoid(-t)))[inner], atol=1e-3)
    assert (t.log().median() + 1.1).abs() < 0.2


class Droppy(nn.Module):
    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.5)
        self.masks = []

    def forward(self, x, t):
        mask = self.drop(torch.ones_like(x))
        self.masks.append(mask)
        return x * mask


def test_both_sides_of_the_loss_drop_the_same_units_and_the_next_step_others():
    net = Droppy().train()
    method = Consistency(DataSample(), Neighbours(lambda _: 8))
    for _ in range(2):
        method(Denoiser(net, Cosine()), torch.randn(32, 6), rng=rng(32), progress=0.0)
    assert torch.equal(net.masks[0], net.masks[1]) and not torch.equal(net.masks[1], net.masks[2])
    before = torch.get_rng_state()
    with same_dropout(torch.device("cpu")):
        torch.rand(3)
    assert torch.equal(torch.get_rng_state(), before)


def test_no_gradient_flows_through_the_other_end_and_an_average_takes_its_place():
    net, other = nn.Linear(2, 2), nn.Linear(2, 2)
    student, average = (Denoiser(lambda x, t, n=n: n(x), Flow()) for n in (net, other))
    x0 = torch.randn(16, 2)
    pairs = Neighbours(lambda _: 6)
    own = Consistency(DataSample(), pairs)(student, x0, rng=rng(16), progress=0.0)
    same = Consistency(DataSample(), pairs, averaged=True)(student, x0, rng=rng(16), progress=0.0, average=student)
    theirs = Consistency(DataSample(), pairs, averaged=True)(student, x0, rng=rng(16), progress=0.0, average=average)
    assert torch.equal(own, same) and not torch.allclose(own, theirs)
    theirs.mean().backward()
    assert other.weight.grad is None and net.weight.grad.abs().sum() > 0


def test_the_tangent_is_zero_on_the_exact_function():
    teacher = Gaussian(TRIG, MEAN, STD)
    a = torch.linspace(0.05, 1.5, 200, dtype=torch.float64)
    x = torch.cos(a)[:, None] * data(200) + torch.sin(a)[:, None] * torch.randn(200, 2).double()
    x0_hat = teacher(x, a)
    cos, sin = torch.cos(a)[:, None], torch.sin(a)[:, None]
    dx = cos * (x - cos * x0_hat) / sin - sin * x0_hat
    v, dv = tangent(velocity(Exact(TRIG), {}), x, a, dx)
    g = -cos * cos * (v - dx) - cos * sin * (x + dv)
    assert g.abs().max() < 1e-6
    wrong = replace(teacher, std=2 * teacher.std)(x, a)
    off = cos * (x - cos * wrong) / sin - sin * wrong
    _, dv = tangent(velocity(Exact(TRIG), {}), x, a, off)
    assert (-cos * cos * (v - off) - cos * sin * (x + dv)).abs().max() > 0.05


def test_exact_tangents_are_finite_differences(teacher):
    x, a = torch.randn(4, 1, 8, 8), torch.tensor([0.2, 0.6, 1.0, 1.4])
    dx = torch.randn_like(x)
    function = velocity(teacher.denoiser, {"labels": torch.arange(4)})
    v, exact = tangent(function, x, a, dx)
    same, near = tangent(function, x, a, dx, "finite")
    assert torch.allclose(v, same, atol=1e-5)
    assert (exact - near).norm() / exact.norm() < 0.02


def test_coarse_finite_differences_stay_between_the_ends_of_the_time_axis():
    seen = []

    def function(x, a):
        seen.append(a)
        return x * a[:, None] ** 2

    x, a, dx = torch.randn(4, 2).double(), torch.tensor([1e-4, 0.3, 1.2, 1.5707]).double(), torch.randn(4, 2).double()
    _, found = tangent(function, x, a, dx, "finite", h=0.1)
    assert all((t > 0).all() and (t < math.pi / 2).all() for t in seen)
    exact = dx * a[:, None] ** 2 + 2 * x * a[:, None]
    assert torch.allclose(found, exact, atol=0.05)


class Straight(torch.autograd.Function):
    """The identity, without a forward-mode rule."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g


class NoRule(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x, t, labels=None):
        return Straight.apply(self.scale * x)


def test_a_network_without_a_forward_rule_is_refused_by_the_name_of_its_operator():
    function, x = velocity(Denoiser(NoRule(), TRIG, "v"), {}), torch.randn(3, 2)
    refuses("no exact tangent ... : use --jvp finite", tangent, function, x, torch.rand(3), x)


@pytest.mark.parametrize("prediction", ["x0", "v"])
@pytest.mark.parametrize("schedule", [Cosine(), VE()], ids=["Cosine", "VE"])
def test_the_other_end_is_the_data_themselves_at_the_time_of_the_data(schedule, prediction):
    """Whatever the network predicts, and where sigma is 0 only at t = -inf."""
    net = nn.Linear(2, 2)
    student, x = Denoiser(lambda x, t: net(x), schedule, prediction), torch.randn(6, 2)
    t = torch.tensor([schedule.t_clean, 0.5] * 3)
    out = with_boundary(student, x, t)
    assert torch.equal(out[::2], x[::2]) and torch.allclose(out[1::2], student(x[1::2], t[1::2]))
    loss = Consistency(Mix(Gaussian(schedule, MEAN.float(), STD.float())), Neighbours(lambda _: 2), substeps=2)
    assert loss(student, data(50).float(), rng=rng(50), progress=0.0).isfinite().all()


def test_consistency_sampling_draws_the_data_from_the_exact_function_at_any_step_count():
    for schedule, steps in ((Cosine(), 1), (Cosine(), 3), (Cosine(), 8), (VE(), 3)):
        x = schedule.sigma(torch.tensor(schedule.t_max)) * torch.randn(40_000, 2).double()
        out = consistency(Exact(schedule), x, grid.uniform(schedule, steps))
        assert (out.mean(0) - MEAN).abs().max() < 0.02 and (out.std(0) / STD - 1).abs().max() < 0.02, steps


def test_gamma_0_is_ddim():
    schedule, x = Cosine(), torch.randn(10, 2).double()
    oracle, times = Gaussian(schedule, MEAN, STD), grid.uniform(schedule, 5)
    assert torch.allclose(consistency(oracle, x, times, gamma=0.0), ddim(oracle, x, times))


def test_a_finite_tangent_is_backward_at_the_very_end_of_the_time_axis():
    a = torch.tensor([0.3, 0.9, 0.99995, 1.0, 1.0000001]).double()
    x, dx = torch.ones(5, 1).double(), torch.full((5, 1), 2.0).double()
    value, slope = tangent(lambda x, a: x * a[:, None], x, a, dx, "finite", 1e-3, end=1.0)
    torch.testing.assert_close(value, a[:, None])
    torch.testing.assert_close(slope, 2 * a[:, None] + 1, atol=3e-3, rtol=0)


def test_after_midtraining_the_derivative_is_whole_from_the_first_step():
    """Without the derivative the target is the denoiser, which undoes what the start has learned."""
    for name in ("scd", "meanflow"):
        built = [
            METHODS[name].build(MethodFlags(method=name, start=start), Mix(ORACLE), {}) for start in ("cmt", "denoise", "as-is")
        ]
        assert [method.warmup for method in built] == [0.0, 0.25, 0.25]
