"""Scores against the gradient of the oracles' log-density; the reverse SDE and Langevin dynamics against Gaussian data."""

import math
from itertools import pairwise

import pytest
import torch
from conftest import refuses

from distill import grid
from distill.denoiser import score
from distill.samplers import BASELINES, SAMPLERS, ancestral, ddim
from distill.sampling import Sampling
from distill.schedule import EDM, Cosine, Flow, posterior
from distill.stochastic import langevin_step, sde
from teachers.oracle import Gaussian, Mixture, finite

SCHEDULES = [Cosine(), EDM(), Flow()]
MEAN, STD = torch.tensor([0.5, -0.3]).double(), torch.tensor([0.4, 0.8]).double()
NEW = ("sde", "pc", "langevin")


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def noise_of(seed):
    generator = rng(seed)
    return lambda x: torch.randn(x.shape, generator=generator, dtype=x.dtype)


def oracles(schedule):
    points = torch.randn(5, 2, generator=rng()).double()
    shares = torch.tensor([0.1, 0.3, 0.2, 0.2, 0.2]).double()
    spread = Mixture(schedule, points, torch.tensor([0.1, 0.2, 0.3, 0.4, 0.0]).double(), shares)
    return Gaussian(schedule, MEAN, STD), spread, finite(schedule, points)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("kind", range(3), ids=["gaussian", "mixture", "finite"])
def test_the_score_is_the_gradient_of_the_log_density(schedule, kind):
    oracle = oracles(schedule)[kind]
    t = schedule.time(torch.linspace(-4, 4, 64, dtype=torch.float64))
    x = (torch.randn(64, 2, generator=rng(1)).double() * torch.hypot(*schedule.at(t))[:, None]).requires_grad_(True)
    (gradient,) = torch.autograd.grad(oracle.log_prob(x, t).sum(), x)
    torch.testing.assert_close(score(oracle, x, t), gradient, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(score(oracle, x, t[5])[5], gradient[5], rtol=1e-6, atol=1e-6)


def test_the_log_density_of_noisy_points_is_that_of_torch():
    points, t = torch.tensor([[0.5, -0.5], [1.0, 2.0]]).double(), torch.tensor(0.4).double()
    alpha, sigma = Cosine().at(t)
    parts = torch.distributions.Independent(torch.distributions.Normal(alpha * points, sigma.expand(2, 2)), 1)
    mixed = torch.distributions.MixtureSameFamily(torch.distributions.Categorical(torch.ones(2)), parts)
    x = torch.randn(10, 2, generator=rng()).double()
    torch.testing.assert_close(finite(Cosine(), points).log_prob(x, t), mixed.log_prob(x))
    single = torch.distributions.Normal(alpha * MEAN, (alpha**2 * STD**2 + sigma**2).sqrt())
    torch.testing.assert_close(Gaussian(Cosine(), MEAN, STD).log_prob(x, t), single.log_prob(x).sum(1))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_no_noise_is_ddim_and_noise_of_strength_one_is_ancestral_to_the_bit(schedule):
    oracle, times = oracles(schedule)[1], grid.karras(schedule, 7)
    x = torch.randn(8, 2, generator=rng()).double() * float(schedule.sigma(times[0]))
    assert torch.equal(sde(oracle, x, times, eta=0.0, noise=noise_of(2)), ddim(oracle, x, times))
    assert torch.equal(sde(oracle, x, times, eta=1.0, noise=noise_of(2)), ancestral(oracle, x, times, noise=noise_of(2)))


def test_a_small_step_is_euler_maruyama_of_the_reverse_sde():
    """In the level l: drift (1 + eta^2) l score dl and noise eta sqrt(2 l dl), on VE where alpha is 1."""
    level, dl = 2.0, 1e-5
    t, s = torch.tensor([level, level - dl], dtype=torch.float64)
    for eta in (0.0, 0.5, 2.0):
        kept, fresh = posterior(EDM(), t, s, eta)
        drift = (float(kept) / level - 1) / dl  # of x - x0 = -l^2 score
        assert drift == pytest.approx(-(1 + eta**2) / 2 * 2 / level**2 * level, rel=1e-4)
        assert float(fresh) == pytest.approx(eta * math.sqrt(2 * level * dl), rel=1e-3, abs=1e-9)


@pytest.mark.parametrize("eta", [0.5, 1.0, 2.0])
def test_the_reverse_sde_of_any_strength_reaches_the_variance_of_gaussian_data(eta):
    """The moments follow by arithmetic, each step being linear; the error falls as 1 / steps."""
    schedule = EDM(t_min=0.01, t_max=80.0)
    errors = []
    for steps in (25, 100, 400):
        times, variance = grid.karras(schedule, steps), torch.full((2,), 80.0**2).double()
        for t, s in pairwise(times):
            kept, fresh = posterior(schedule, t, s, eta)
            gain = STD**2 / (STD**2 + t**2)
            variance = (gain + kept / t * (1 - gain)) ** 2 * variance + fresh**2
        errors.append(float((variance / STD**2 - 1).abs().max()))
    assert errors[0] > errors[1] > 2.5 * errors[2] and errors[2] < 0.1, errors
    x = 80 * torch.randn(20_000, 2, generator=rng()).double()
    out = sde(Gaussian(schedule, MEAN, STD), x, grid.karras(schedule, 100), eta=eta, noise=noise_of(3))
    assert (out.var(0) / STD**2 - 1).abs().max() < errors[1] + 0.05


def test_langevin_steps_leave_the_noisy_data_as_they_are_and_reach_them():
    """1024 equal pixels, so that the sizes of steps hardly vary between samples; small steps, for the bias is of their size."""
    schedule, t = Cosine(), torch.tensor(0.5).double()
    oracle = Gaussian(schedule, torch.full((1024,), 0.3).double(), torch.full((1024,), 0.4).double())
    alpha, sigma = schedule.at(t)
    mean, variance = float(alpha) * 0.3, float(alpha**2 * 0.16 + sigma**2)
    noise = noise_of(4)
    x = 2 + 0.1 * noise(torch.empty(20, 1024).double())  # far from them
    for _ in range(1000):
        x = langevin_step(oracle, x, t, noise(x), ratio=0.07)
    assert abs(float(x.mean()) - mean) < 0.03 and abs(float(x.var()) / variance - 1) < 0.04


@pytest.mark.parametrize("name, steps", [("pc", 100), ("langevin", 400)])
def test_langevin_samplers_reach_gaussian_data(name, steps):
    schedule = EDM(t_min=0.01, t_max=10.0)
    oracle = Gaussian(schedule, torch.full((64,), 0.3).double(), torch.full((64,), 0.4).double())
    x = 10 * torch.randn(100, 64, generator=rng()).double()
    out = SAMPLERS[name].run(oracle, x, grid.karras(schedule, steps), noise=noise_of(5))
    assert abs(float(out.mean()) - 0.3) < 0.02 and abs(float(out.std()) / 0.4 - 1) < 0.1, (out.mean(), out.std())


@pytest.mark.parametrize("name", NEW)
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_a_sample_from_pure_noise_is_finite_and_does_not_depend_on_the_batch(name, steps):
    oracle, times = oracles(Cosine())[1], grid.uniform(Cosine(), steps)
    x = torch.randn(4, 2, generator=rng()).double()
    out = SAMPLERS[name].run(oracle, x, times, noise=torch.ones_like)
    assert out.isfinite().all()
    torch.testing.assert_close(out[:1], SAMPLERS[name].run(oracle, x[:1], times, noise=torch.ones_like))


def test_the_new_samplers_are_no_baselines_and_eta_is_read_and_bounded():
    assert not set(NEW) & set(BASELINES)
    sampling = Sampling.parse("sde:0.5", steps=(4,))
    assert sampling.eta == 0.5 and sampling.gamma is None and sampling.label == "sde:0.5" and sampling.noisy
    assert Sampling.from_description(sampling.describe()) == sampling
    for text in ("sde:11", "sde:-1", "sde:x", "ancestral:1", "pc:2"):
        refuses(f"unknown sampler '{text}': accepted are ... sde:ETA", Sampling.parse, text)
    oracle, times = oracles(Cosine())[0], grid.uniform(Cosine(), 3)
    x = torch.randn(4, 2, generator=rng()).double()
    by_name = sampling.run(oracle, x, times, noise_of(1))
    assert torch.equal(by_name, sde(oracle, x, times, eta=0.5, noise=noise_of(1)))
