"""The two likelihoods of a denoiser against the closed form of Gaussian data, and of data that are a few points."""

import math

import pytest
import torch
from conftest import Function

from distill.denoiser import on_schedule
from distill.distance import WEIGHTS
from distill.likelihood import bits, bound, flow
from distill.regression import DRAWS
from distill.rng import Rng
from distill.schedule import EDM, Cosine, LinearVP
from teachers.oracle import Gaussian, finite

MEAN, STD = torch.tensor([0.5, -0.25, 0.1], dtype=torch.float64), torch.tensor([0.5, 0.2, 1.0], dtype=torch.float64)
SCHEDULES = [Cosine(), LinearVP(), EDM()]


def rng():
    return torch.Generator().manual_seed(1)


def data(n):
    return MEAN + STD * torch.randn(n, 3, generator=rng(), dtype=torch.float64)


def log_density(x, smoothing=0.0):
    variance = STD**2 + smoothing**2
    return torch.distributions.Normal(MEAN, variance.sqrt()).log_prob(x).sum(1)


def clean_level(schedule):
    return float(schedule.level(torch.tensor(schedule.t_min, dtype=torch.float64)))


def pushed_back(schedule, x):
    """log-density at x of N(0, sigma^2), where samplers start, pulled through the exact flow, which stretches each pixel."""
    ends = [torch.tensor(t, dtype=torch.float64) for t in (schedule.t_min, schedule.t_max)]
    (a, alpha), (s, sigma) = ([f(t) for t in ends] for f in (schedule.alpha, schedule.sigma))
    noise = Gaussian(schedule, MEAN, STD).flow(a * x, *ends)
    stretch = ((alpha**2 * STD**2 + sigma**2) / (STD**2 + (s / a) ** 2)).sqrt()
    return (torch.distributions.Normal(0.0, sigma).log_prob(noise) + stretch.log()).sum(1)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_flows_density_of_gaussian_data_is_the_closed_form(schedule):
    """To 1e-3 of it, and of 1 where it is less; that of the data to 1e-2, for what is left of them at t_max. Random signs are exact
    too where D is diagonal."""
    x = data(64)
    for probes in (None, 1):
        found = flow(Gaussian(schedule, MEAN, STD), x, rng(), probes=probes)
        exact, of_data = pushed_back(schedule, x), log_density(x, clean_level(schedule))
        assert ((found - exact).abs() <= 1e-3 * exact.abs().clamp(min=1)).all(), (found - exact).abs().max()
        assert abs(float((found - of_data).mean())) < 1e-2 and (found - of_data).abs().max() < 0.1


def test_the_flows_error_falls_as_the_fourth_power_of_its_steps():
    x, schedule = data(64), Cosine()
    exact = flow(Gaussian(schedule, MEAN, STD), x, rng(), steps=128, probes=None)
    coarse, fine = ((flow(Gaussian(schedule, MEAN, STD), x, rng(), steps=n, probes=None) - exact).abs().mean() for n in (8, 16))
    assert 3 < math.log2(coarse / fine) < 5.5


def test_random_signs_estimate_the_exact_trace_without_bias():
    """On two points off the axes, whose dD/dx is no diagonal."""
    x = torch.tensor([[0.3, 0.1]], dtype=torch.float64)
    denoiser = finite(Cosine(), torch.tensor([[0.5, 0.4], [-0.5, -0.3]], dtype=torch.float64))
    stops = EDM(t_min=0.3, t_max=80.0)  # where the data are still blurred
    smooth = Function(stops, on_schedule(denoiser, stops))
    exact = flow(smooth, x, rng(), probes=None, steps=16)
    many = flow(smooth, x.expand(4000, 2), rng(), probes=1, steps=16)
    assert many.std() > 0.01 and (many.mean() - exact).abs() < 4 * many.std() / 4000**0.5


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_bound_of_an_exact_denoiser_is_tight_to_the_smoothing_of_its_smallest_time(schedule):
    """To four standard errors of its Monte Carlo, under 0.04 nats; and a biased denoiser's bound is looser."""
    x = data(4000)
    exact = -log_density(x)
    found = bound(Gaussian(schedule, MEAN, STD), x, rng(), levels=300).total
    gap = found - exact
    error = float(gap.std()) / len(x) ** 0.5
    loose = 0.5 * (1 + (clean_level(schedule) / STD) ** 2).log().sum() + 0.5 * x.square().sum(1).mean() * math.exp(
        float(schedule.logsnr(torch.tensor(schedule.t_max, dtype=torch.float64)).clamp(min=-20))
    )
    assert error < 0.04 and abs(float(gap.mean() - loose)) < 4 * error, (gap.mean(), loose, error)
    biased = bound(Gaussian(schedule, MEAN + 0.2, STD), x, rng(), levels=300).total - exact
    assert float(biased.mean()) > float(gap.mean()) + 4 * error


def test_the_bound_of_four_equal_points_is_their_entropy():
    """Two dimensions of two values each: 1 bit a dimension, by the decoder over values."""
    points = torch.tensor([[-1.0, -1], [-1, 1], [1, -1], [1, 1]], dtype=torch.float64)
    x = points[torch.arange(2000) % 4]
    found = bits(bound(finite(Cosine(), points), x, rng(), levels=200, values=2).total, 2)
    assert abs(float(found.mean()) - 1) < 4 * float(found.std()) / 2000**0.5 < 0.05


def test_bits_of_uniform_data_are_the_logarithm_of_their_values():
    """A density of 1/2 on [-1, 1], in bins of 1/128: 8 bits."""
    assert bits(torch.tensor(math.log(2.0)), 1, 1 / 128) == pytest.approx(8)


def test_lognormal_times_have_karras_mean_and_deviation():
    for schedule in (EDM(), Cosine()):
        t = DRAWS["lognormal"](schedule, Rng(rng(), 20_000))
        level = schedule.level(t).log()
        assert abs(float(level.mean()) + 1.2) < 0.03 and abs(float(level.std()) - 1.2) < 0.03


def test_weights_of_the_snr_are_theirs_at_both_ends():
    """min-SNR-5 and its soft kin in the mean squared error of eps: 5 / snr, 4 / (snr + 4) and 1 / (1 + snr)."""
    schedule = Cosine()
    t = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    snr = (schedule.alpha(t) / schedule.sigma(t)).square()
    of_eps = {name: WEIGHTS[name](schedule, t) / snr for name in ("min_snr", "soft_min_snr", "p2")}
    torch.testing.assert_close(of_eps["min_snr"], torch.minimum(snr, torch.full_like(snr, 5)) / snr)
    torch.testing.assert_close(of_eps["soft_min_snr"], 4 / (snr + 4))
    torch.testing.assert_close(of_eps["p2"], 1 / (1 + snr))
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    assert WEIGHTS["p2"](schedule, ends).tolist() == [1, 0]
