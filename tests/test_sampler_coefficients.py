"""Coefficients of a sampler's times: computed once per schedule, and equal to those of times per sample."""

from unittest import mock

import pytest
import torch

from distill.denoiser import PREDICTIONS, Denoiser
from distill.grid import karras
from distill.samplers import SAMPLERS
from distill.sampling import Sampling
from distill.schedule import EDM, Cosine, Flow, Schedule, move, numbers, to_eps


class Net(torch.nn.Module):
    def forward(self, x, t, to=None):
        return torch.sin(x) * (1 + t.reshape(-1, 1))


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_second_batch_evaluates_no_schedule(name):
    schedule = EDM()
    denoiser, times, x = Denoiser(Net(), schedule, "edm", "log_sigma"), karras(schedule, 5), torch.randn(2, 3)
    first = Sampling(name).run(denoiser, x, times, torch.ones_like)
    with mock.patch.multiple(EDM, alpha=mock.DEFAULT, sigma=mock.DEFAULT) as formulas:
        second = Sampling(name).run(denoiser, x, times.clone(), torch.ones_like)
    assert torch.equal(first, second) and not any(formula.called for formula in formulas.values())


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("schedule", [Cosine(), Flow()], ids=["cosine", "flow"])
def test_a_single_time_and_one_per_sample_give_the_same_result(schedule, prediction):
    single, to = torch.tensor(0.7, dtype=torch.float64), torch.tensor(0.2, dtype=torch.float64)
    x, x0 = torch.randn(2, 4, 3, dtype=torch.float64)
    on = schedule if prediction not in ("eps", "score") else EDM()
    denoiser = Denoiser(Net(), on, prediction)
    assert torch.allclose(denoiser(x, single), denoiser(x, single.expand(4)), rtol=1e-12)
    assert torch.allclose(move(on, x, x0, single, to), move(on, x, x0, single.expand(4), to.expand(4)), rtol=1e-12)


def test_kept_numbers_differ_by_time_option_dtype_and_schedule():
    def formula(schedule: Schedule, power: int, t: torch.Tensor):
        return (schedule.alpha(t) ** power,)

    one, two = Cosine(), Flow()
    t = torch.tensor(0.25, dtype=torch.float64)
    found = [
        numbers(formula, *case)[0] for case in ((one, 1, t), (one, 2, t), (one, 1, t / 2), (one, 1, t.float()), (two, 1, t))
    ]
    assert len(set(found)) == 5 and numbers(formula, one, 1, t)[0] == float(one.alpha(t))


def test_a_gradient_passes_through_a_single_time():
    x, x0, t = torch.ones(2, 3), torch.zeros(2, 3), torch.tensor(0.5, requires_grad=True)
    numbers(lambda schedule, t: (schedule.sigma(t),), Flow(), t.detach())
    to_eps(Flow(), x, x0, t).sum().backward()
    assert float(t.grad) == pytest.approx(-6 / 0.5**2)
    slope = torch.func.jvp(lambda t: to_eps(Flow(), x, x0, t).sum(), (torch.tensor(0.5),), (torch.tensor(1.0),))[1]
    assert float(slope) == pytest.approx(-6 / 0.5**2)
