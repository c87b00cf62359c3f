"""How little samplers, losses and training steps do beside their networks: operators, evaluations of the schedule, walks through modules."""

from dataclasses import replace
from unittest import mock

import pytest
import torch
from accelerate import Accelerator
from torch.utils._python_dispatch import TorchDispatchMode

from distill.denoiser import Denoiser, Guided, Rescheduled
from distill.grid import uniform
from distill.progressive import Progressive
from distill.regression import Regression
from distill.rng import Rng
from distill.sampling import Sampling
from distill.schedule import EDM, SCHEDULES, Cosine, Flow, Table, move
from distill.target import Mix
from distill.train import Optimization, train

TABLE = Table(tuple(torch.linspace(0.999, 0.01, 50).tolist()))
VIEWS = ("unbind", "expand", "view", "alias", "detach", "slice", "split", "_local_scalar_dense")


class Network(torch.nn.Module):
    def forward(self, x, t, labels=None):
        return torch.sin(x)


class Operators(TorchDispatchMode):
    """Count the operators that compute; views and reads of a number are not among them."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not any(view in str(func) for view in VIEWS)
        return func(*args, **(kwargs or {}))


def per_step(name, denoiser, steps=8, **cond):
    """Operators of a sampler's step beside the sine of the network, in a second batch."""
    sampling, x = Sampling(name), torch.randn(2, 1, 4, 4)
    times = uniform(denoiser.schedule, steps)
    sampling.run(denoiser, x, times, torch.clone, **cond)
    with Operators() as found:
        sampling.run(denoiser, x, times, torch.clone, **cond)
    return found.count / steps - 1


@pytest.mark.parametrize(
    "name, most",
    [("ddim", 6), ("dpm++2m", 7), ("unipc", 12), ("ipndm", 12), ("deis", 12), ("ancestral", 8), ("consistency", 7)],
)
def test_a_step_of_a_sampler_takes_few_operators_beside_its_network(name, most):
    assert per_step(name, Denoiser(Network(), TABLE)) <= most


def test_another_schedule_costs_three_operators_a_step():
    """The product with x, and two for the wrapped denoiser's time as a tensor; none of the schedules."""
    plain, wrapped = Denoiser(Network(), EDM(), "edm"), Rescheduled(Denoiser(Network(), EDM(), "edm"), Cosine())
    assert per_step("ddim", wrapped) <= per_step("ddim", replace(plain, schedule=Cosine())) + 3


def test_guidance_is_one_operator_beside_joining_both_halves():
    denoiser = Denoiser(Network(), TABLE)
    guided = Guided(denoiser, {"labels": torch.tensor([3])}, 2.0)
    assert per_step("ddim", guided, labels=torch.tensor([0, 1])) <= per_step("ddim", denoiser) + 3


@pytest.mark.parametrize("single", [True, False], ids=["single time", "times per sample"])
def test_the_second_batch_of_a_denoiser_on_another_schedule_has_the_same_bits(single):
    wrapped, x = Rescheduled(Denoiser(Network(), Flow(), "flow"), Cosine()), torch.randn(3, 2)
    t = torch.tensor(0.4, dtype=torch.float64)
    one = wrapped(x, t)
    t = t if single else t.expand(3)
    with mock.patch.object(Cosine, "logsnr") as formula:
        assert not single or torch.equal(one, wrapped(x, t))
        assert not formula.called
    assert torch.allclose(one, wrapped(x, t), rtol=1e-6)


@pytest.mark.parametrize("kind", SCHEDULES)
def test_both_coefficients_together_are_alpha_and_sigma(kind):
    schedule = TABLE if kind == "table" else SCHEDULES[kind]()
    t = torch.linspace(schedule.t_min, schedule.t_max, 23, dtype=torch.float64)
    alpha, sigma = schedule.at(t)
    assert torch.equal(alpha, schedule.alpha(t)) and torch.equal(sigma, schedule.sigma(t))
    assert torch.equal(schedule.logsnr(t), 2 * (alpha.log() - sigma.log()))


def test_a_progressive_loss_evaluates_a_table_once_for_each_time_that_a_formula_takes():
    teacher, x0 = Denoiser(Network(), TABLE), torch.randn(4, 1, 4, 4)
    method = Progressive(teacher, uniform(TABLE, 8))
    with mock.patch.object(Table, "_angle", autospec=True, side_effect=Table._angle) as angle:
        method(teacher, x0, rng=Rng.seeded(0, torch.device("cpu"), 4), progress=0.0)
    assert angle.call_count <= 11  # noise 1, denoisers 3, moves 4, explain 2, weight 1


@pytest.mark.parametrize("kind", SCHEDULES)
def test_a_move_is_equation_12_of_ddim(kind):
    schedule = TABLE if kind == "table" else SCHEDULES[kind]()
    t, s = torch.tensor([0.9, 0.5], dtype=torch.float64) * schedule.t_max
    x, x0 = torch.randn(2, 3, 2, dtype=torch.float64)
    eps = (x - schedule.alpha(t) * x0) / schedule.sigma(t)
    expected = schedule.alpha(s) * x0 + schedule.sigma(s) * eps
    for times in ((t, s), (t.expand(3), s.expand(3))):
        assert torch.allclose(move(schedule, x, x0, *times), expected, rtol=1e-10)


def test_a_target_of_teacher_weight_1_is_the_teachers_to_the_bit():
    teacher, x0, x_t, t = Denoiser(Network(), TABLE), 1e3 * torch.randn(4, 5), torch.randn(4, 5), torch.rand(4)
    assert torch.equal(Mix(teacher)(TABLE, x_t, t, x0), teacher(x_t, t))


def test_a_training_step_walks_through_no_module_for_the_average_and_for_clipping():
    net = torch.nn.Sequential(torch.nn.Linear(2, 2))
    net.forward = lambda x, t: net[0](x)
    how, batch = Optimization(images=32, batch_size=8, ema_halflife_images=16), (torch.randn(8, 2), {})
    states = train(
        Regression(), Denoiser(net, Flow(), "x0"), lambda step: iter([batch] * 4), Accelerator(cpu=True), how, seed=0, phase="p"
    )
    next(states)
    with mock.patch.object(torch.nn.Module, "named_modules", side_effect=AssertionError("walked")):
        assert next(states).step == 2
