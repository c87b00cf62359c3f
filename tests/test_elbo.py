"""The terms of the variational bound against the closed form of Gaussian data: the discrete chain, its limit, importance sampling."""

import math

import pytest
import torch
from conftest import here

from distill.likelihood import Proposal, bound, discrete, integrand, span
from distill.schedule import EDM, Cosine, LinearVP, add_noise
from recipes import likelihood, probe
from teachers.oracle import Gaussian

MEAN, STD = torch.tensor([0.5, -0.25, 0.1], dtype=torch.float64), torch.tensor([0.5, 0.2, 1.0], dtype=torch.float64)
SCHEDULES = [Cosine(), LinearVP(), EDM()]


def rng(seed=1):
    return torch.Generator().manual_seed(seed)


def data(n):
    return MEAN + STD * torch.randn(n, 3, generator=rng(), dtype=torch.float64)


def error(logsnr):
    """E|x0 - D|^2 of the exact denoiser: the posterior variance std^2 / (snr std^2 + 1), summed."""
    return (STD**2 / (logsnr.exp()[:, None] * STD**2 + 1)).sum(1)


def limit(schedule):
    """1/2 int exp(L) E|x0 - D|^2 dL = 1/2 sum ln (1 + snr std^2) between the ends."""
    low, high = (math.exp(v) for v in span(schedule))
    return float(((1 + high * STD**2) / (1 + low * STD**2)).log().sum() / 2)


def near(found, exact, sigmas=4):
    """The mean of independent draws is within four standard errors of the closed form, and these are small."""
    bar = float(found.std()) / len(found) ** 0.5
    assert bar < 0.1 * abs(exact) + 1e-3 and abs(float(found.mean()) - exact) < sigmas * bar, (found.mean(), exact, bar)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_a_discrete_term_is_the_divergence_of_the_two_gaussians_of_its_step(schedule):
    """q(x_s | x_t, x0) by Bayes' rule from q(x_s | x0) and q(x_t | x_s), and p with D in place of x0: exact, sample by sample."""
    x0, oracle = data(16), Gaussian(schedule, MEAN, STD)
    found, again = discrete(oracle, x0, rng(5), 4), rng(5)
    edges = torch.linspace(*span(schedule), 5, dtype=torch.float64)
    for term, ends in zip(found, edges.unfold(0, 2, 1), strict=True):
        t, s = schedule.time(ends).clamp(schedule.t_min, schedule.t_max)
        (a_t, s_t), (a_s, s_s) = schedule.at(t), schedule.at(s)
        x_t = add_noise(schedule, x0, torch.randn(x0.shape, generator=again).to(x0), t)
        step = a_t / a_s
        noise = s_t**2 - (step * s_s) ** 2  # variance of x_t given x_s
        variance = 1 / (1 / s_s**2 + step**2 / noise)
        q, p = (variance * (a_s * x / s_s**2 + step * x_t / noise) for x in (x0, oracle(x_t, t)))
        normals = [torch.distributions.Normal(m, variance.sqrt()) for m in (q, p)]
        by_hand = torch.distributions.kl_divergence(*normals).sum(1)
        torch.testing.assert_close(term, by_hand, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("steps", [4, 64])
def test_the_discrete_chain_of_gaussian_data_costs_its_closed_form(schedule, steps):
    edges = torch.linspace(*span(schedule), steps + 1, dtype=torch.float64)
    exact = float((edges.exp().diff() * error(edges[:-1])).sum() / 2)
    near(discrete(Gaussian(schedule, MEAN, STD), data(2000), rng(), steps).sum(0), exact)


def test_the_discrete_chain_falls_to_the_continuous_limit():
    """The closed form falls with T, and the excess over the integral falls as 1 / T."""
    schedule = Cosine()
    edges = [torch.linspace(*span(schedule), steps + 1, dtype=torch.float64) for steps in (64, 256, 1024)]
    excess = [float((e.exp().diff() * error(e[:-1])).sum() / 2) - limit(schedule) for e in edges]
    assert excess[0] > excess[1] > excess[2] > 0 and abs(excess[1] / excess[2] - 4) < 0.2
    near(bound(Gaussian(schedule, MEAN, STD), data(4000), rng(), levels=32).diffusion, limit(schedule))


def test_the_integrand_of_gaussian_data_is_its_closed_form():
    schedule, x0 = Cosine(), data(20_000)
    for level in (-4.0, 0.0, 5.0):
        logsnr = torch.full((len(x0),), level, dtype=torch.float64)
        exact = float(logsnr[:1].exp() * error(logsnr[:1]) / 2)
        near(integrand(Gaussian(schedule, MEAN, STD), x0, logsnr, rng()), exact)


def proposed(schedule):
    edges = torch.linspace(*span(schedule), 65, dtype=torch.float64)
    centres = (edges[1:] + edges[:-1]) / 2
    return Proposal.measured(edges, centres.exp() * error(centres))


def test_importance_sampled_times_keep_the_bound_and_narrow_it():
    """One level a sample: unbiased, with less than half of the variance of uniform times."""
    schedule, x0 = Cosine(), data(20_000)
    oracle = Gaussian(schedule, MEAN, STD)
    uniform, drawn = (bound(oracle, x0, rng(), levels=1, proposal=p).diffusion for p in (None, proposed(schedule)))
    near(uniform, limit(schedule))
    near(drawn, limit(schedule))
    assert drawn.var() < 0.6 * uniform.var()


def test_a_proposal_is_a_density_and_its_draws_follow_it():
    proposal = Proposal.measured(torch.tensor([-2.0, 0.0, 1.0]).double(), torch.tensor([1.0, 4.0]), floor=0.0)
    logsnr, weight = proposal(torch.linspace(0, 1, 3001, dtype=torch.float64))
    torch.testing.assert_close(proposal.mass, torch.tensor([2 / 6, 4 / 6]).double())
    assert abs(float((logsnr < 0).double().mean()) - 1 / 3) < 1e-3 and float(logsnr.min()) == -2 and float(logsnr.max()) == 1
    assert set(weight.mul(6).round().tolist()) == {36.0, 9.0}  # 1 / density: width / mass is 6 and 1.5
    even, _ = Proposal.uniform(-2.0, 1.0)(torch.tensor([0.0, 0.5, 1.0]).double())
    assert even.tolist() == [-2, -0.5, 1]


@pytest.mark.slow
def test_the_recipe_writes_the_terms_and_the_picture(tmp_path, capsys):
    here(likelihood.main, "--preset smoke --images 16 --model oracle:digits --output-dir", tmp_path / "out")
    assert "variational bound" in capsys.readouterr().out
    from distill.reading import read_json

    out = read_json(tmp_path / "out" / "likelihood.json")
    bits = out["bits"]
    assert bits["bound"]["mean"] == pytest.approx(sum(bits[k]["mean"] for k in ("prior", "diffusion", "decoder")))
    area = sum(v * out["width"] for v in out["integrand"])
    assert area == pytest.approx(bits["diffusion"]["mean"], rel=0.2)
    assert (tmp_path / "out" / "likelihood.png").stat().st_size > 1000


def test_the_probe_names_the_command_that_took_its_likelihood(refused):
    assert "python recipes/likelihood.py --model SPEC" in refused(probe.main, "--nll")
