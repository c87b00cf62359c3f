"""Every residual is zero on the denoiser whose property it is, and is not on another."""

from dataclasses import replace

import pytest
import torch
from closed_forms import MEAN, STD, Exact, Small, data
from conftest import Function

from distill.consistency import Consistency, Neighbours
from distill.denoiser import Denoiser
from distill.regularize import RESIDUALS, Regularized, residuals
from distill.rng import Rng
from distill.schedule import EDM, Cosine, Flow, add_noise
from distill.target import DataSample
from teachers.oracle import Gaussian

N = 20_000


def at(schedule, n=N):
    generator = torch.Generator().manual_seed(1)
    t = schedule.time(-6 + 12 * torch.rand(n, generator=generator).double())
    x0 = data(n)
    return add_noise(schedule, x0, torch.randn(n, 2, generator=generator).double(), t), t


def rng():
    return Rng(torch.Generator().manual_seed(0), N)


@pytest.mark.parametrize("schedule", [Cosine(), Flow(), EDM()], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("name", ["martingale", "fokker-planck"])
def test_the_residual_vanishes_on_the_exact_denoiser_and_not_on_a_wrong_one(name, schedule):
    exact = Gaussian(schedule, MEAN, STD)
    x_t, t = at(schedule)
    right = RESIDUALS[name](exact, x_t, t, rng())
    if name == "fokker-planck":
        assert right.abs().max() < 1e-6

    def too_sharp(x, t):
        """At high noise only: no data at all have this denoiser."""
        return replace(exact, std=exact.std * (1 + 0.5 * torch.tanh(schedule.logsnr(t)))[:, None])(x, t)

    wrong = RESIDUALS[name](Function(schedule, too_sharp), x_t, t, rng())
    error = 3 * right.std() / N**0.5
    assert right.mean().abs() < error + 1e-9 < wrong.mean()


def test_the_consistency_residual_vanishes_on_the_consistency_function_and_not_on_the_denoiser():
    schedule = Cosine()
    x_t, t = at(schedule)
    small = {"by": 1e-3}  # for a DDIM step of the exact function leaves the path
    on_function = RESIDUALS["self-consistency"](Exact(schedule), x_t, t, rng(), **small).mean()
    on_denoiser = RESIDUALS["self-consistency"](Gaussian(schedule, MEAN, STD), x_t, t, rng(), **small).mean()
    assert on_denoiser > 0 and on_function < on_denoiser


def test_a_regularized_method_is_the_method_plus_its_weighted_terms():
    torch.manual_seed(0)
    student = Denoiser(Small(), Cosine())
    x0 = data(64).float()
    method = Consistency(DataSample(), Neighbours(lambda _: 8))

    def loss(method):
        return method(student, x0, rng=Rng(torch.Generator().manual_seed(0), 64), progress=0.0)

    plain = loss(method)
    none, once, twice = (loss(Regularized(method, (("martingale", w), ("fokker-planck", w)))) for w in (0.0, 0.1, 0.2))
    assert torch.allclose(none, plain) and not torch.allclose(once, plain)
    assert torch.allclose(twice - plain, 2 * (once - plain), atol=1e-4)
    once.mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in student.net.parameters())


def test_residuals_are_printed_for_any_network(teacher):
    x0 = torch.rand(8, 1, 8, 8) * 2 - 1
    out = residuals(teacher.denoiser, x0, Rng(torch.Generator().manual_seed(0), 8), labels=torch.arange(8))
    assert out.keys() == RESIDUALS.keys() and all(v == v for v in out.values())
