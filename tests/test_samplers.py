import math
from itertools import pairwise

import diffusers
import pytest
import torch
from conftest import Function, refuses

from distill import grid
from distill.samplers import SAMPLERS, ancestral, consistency, ddim, deis, heun, ipndm, unipc
from distill.sampling import Sampling
from distill.schedule import EDM, Cosine, Flow, LinearVP, Table
from teachers.oracle import Gaussian

DETERMINISTIC = sorted(name for name, sampler in SAMPLERS.items() if not sampler.noisy)


def gaussian(schedule):
    return Gaussian(schedule, torch.tensor([0.5, -0.3, 0.1]).double(), torch.tensor([0.3, 0.5, 1.0]).double())


def error(sampler, schedule, steps, ramps=0):
    """Largest error of a pixel from log-SNR -4 to 6. ``ramps``: that many steps at both ends, halving towards them, take away
    what the low order of the first and the last step costs."""
    oracle = gaussian(schedule)
    ramp = 0.5 ** torch.arange(ramps, 0, -1, dtype=torch.float64)
    lengths = torch.cat([ramp, torch.ones(steps, dtype=torch.float64), ramp.flip(0)]).cumsum(0)
    t = schedule.time(-4 + 10 * torch.cat([torch.zeros(1, dtype=torch.float64), lengths / lengths[-1]]))
    x = torch.randn(16, 3, generator=torch.Generator().manual_seed(0)).double()
    return (sampler(oracle, x, t) - oracle.flow(x, t[0], t[-1])).abs().max().item()


@pytest.mark.parametrize("schedule", [Cosine(), EDM(), Flow(), LinearVP()], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("name, order", [("ddim", 1), ("heun", 2), ("dpm++2m", 2)])
def test_order_of_convergence_on_a_gaussian(schedule, name, order):
    measured = math.log2(error(SAMPLERS[name].run, schedule, 64) / error(SAMPLERS[name].run, schedule, 128))
    assert abs(measured - order) < 0.15, measured


@pytest.mark.parametrize(
    "sampler, order",
    [(SAMPLERS["dpm++3m"].run, 3), (unipc, 3), (deis, 3), (ipndm, 2)],
    ids=["dpm++3m", "unipc", "deis", "ipndm"],
)
def test_higher_orders_show_once_the_first_and_last_steps_are_short(sampler, order):
    measured = math.log2(error(sampler, EDM(), 50, ramps=10) / error(sampler, EDM(), 100, ramps=10))
    assert measured > order - 0.3, measured


def scheduler_sample(scheduler, oracle, x, steps):
    """Runs a diffusers scheduler on an oracle that answers in the scheduler's own prediction, "sample"."""
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t)
        x = scheduler.step(oracle(scaled, t), t, x).prev_sample
    return x


LINEAR = diffusers.DDIMScheduler(prediction_type="sample", clip_sample=False, timestep_spacing="trailing")
TABLE = Table(tuple(LINEAR.alphas_cumprod.double().tolist()))


def by_index(t):
    return (torch.as_tensor(t, dtype=torch.float64) + 1) / 1000


@pytest.mark.parametrize("steps", [1, 2, 5, 10, 50])
def test_ddim_equals_diffusers_ddim_on_its_trailing_grid(steps):
    oracle = gaussian(TABLE)
    x = torch.randn(8, 3).double()
    theirs = scheduler_sample(LINEAR, lambda x, t: oracle(x, by_index(t)), x, steps)
    assert torch.allclose(ddim(oracle, x, grid.trailing(TABLE, steps)), theirs, atol=2e-5)


KARRAS = {"num_train_timesteps": 1000, "prediction_type": "sample", "use_karras_sigmas": True}
LINSPACE = {"use_karras_sigmas": False}  # their DEIS ends on a Karras grid with a step of no length


def karras_times(scheduler):
    """The scheduler's own noise levels as times of the EDM schedule."""
    return torch.as_tensor(scheduler.sigmas, dtype=torch.float64)


@pytest.mark.parametrize(
    "cls, options, sampler",
    [
        (diffusers.DPMSolverMultistepScheduler, {"solver_order": 2, "final_sigmas_type": "zero"}, SAMPLERS["dpm++2m"].run),
        (diffusers.UniPCMultistepScheduler, {"solver_order": 3, "final_sigmas_type": "zero"}, unipc),
        (diffusers.UniPCMultistepScheduler, {"solver_order": 2, "final_sigmas_type": "zero"}, lambda *a: unipc(*a, order=2)),
        (diffusers.DEISMultistepScheduler, {"solver_order": 2, **LINSPACE}, lambda *a: deis(*a, order=2)),
        (diffusers.DEISMultistepScheduler, {"solver_order": 3, **LINSPACE}, deis),
    ],
    ids=["dpm++2m", "unipc3", "unipc2", "deis2", "deis3"],
)
@pytest.mark.parametrize("steps", [3, 8, 14])  # from 15 on some of theirs no longer lower the order at the end
def test_multistep_samplers_equal_diffusers_schedulers(cls, options, sampler, steps):
    scheduler = cls(**{**KARRAS, **options})
    scheduler.set_timesteps(steps)
    oracle = gaussian(EDM())
    sigmas = karras_times(scheduler)
    x = torch.randn(8, 3).double()
    theirs, count = x / (1 + sigmas[0] ** 2).sqrt(), iter(range(steps))

    def answer(scaled, _):
        sigma = sigmas[next(count)]  # their x_t has unit variance: alpha = 1 / sqrt(1 + sigma^2)
        return oracle(scaled * (1 + sigma**2).sqrt(), sigma)

    for t in scheduler.timesteps:
        theirs = scheduler.step(answer(theirs, t), t, theirs).prev_sample
    assert torch.allclose(sampler(oracle, x, sigmas), theirs * (1 + sigmas[-1] ** 2).sqrt(), atol=2e-5)


@pytest.mark.parametrize("steps", [2, 7, 20])
def test_heun_equals_diffusers_heun_on_its_karras_grid(steps):
    scheduler = diffusers.HeunDiscreteScheduler(**KARRAS)
    scheduler.set_timesteps(steps)
    levels = torch.unique_consecutive(scheduler.sigmas.double())
    oracle = gaussian(EDM())
    x = torch.randn(8, 3).double() * levels[0]
    theirs, sigma_of = x, scheduler.sigmas.double()
    for i, t in enumerate(scheduler.timesteps):
        theirs = scheduler.step(oracle(theirs, sigma_of[i]), t, theirs).prev_sample
    assert torch.allclose(heun(oracle, x, levels), theirs, atol=2e-4)


def test_ipndm_is_adams_bashforth_on_the_noise():
    """Equal steps in sigma make its weights exact: the classical formulas, written out, on the same field."""
    oracle = gaussian(EDM())
    levels = torch.linspace(2, 1, 6, dtype=torch.float64)
    x = y = torch.randn(4, 3).double()
    slopes = []
    coefficients = [[1], [1.5, -0.5], [23 / 12, -16 / 12, 5 / 12], [55 / 24, -59 / 24, 37 / 24, -9 / 24]]
    for s, e in pairwise(levels):
        slopes.insert(0, (y - oracle(y, s)) / s)
        y = y + (e - s) * sum(c * d for c, d in zip(coefficients[min(len(slopes), 4) - 1], slopes))
    assert torch.allclose(ipndm(oracle, x, levels), y)


@pytest.mark.parametrize("name", DETERMINISTIC)
@pytest.mark.parametrize("steps", [1, 2, 3, 8])
def test_every_sampler_is_finite_and_right_from_zero_terminal_snr(name, steps):
    oracle = gaussian(Cosine())
    x = torch.randn(64, 3).double()
    out = SAMPLERS[name].run(oracle, x, grid.uniform(Cosine(), steps))
    exact = oracle.flow(x, torch.tensor(1.0).double(), torch.tensor(0.0).double())
    assert torch.isfinite(out).all()
    assert (out - exact).abs().max() < {1: 4, 2: 2.5, 3: 2, 8: 0.6}[steps]


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_one_step_of_any_sampler_is_the_denoiser(name):
    oracle, x = gaussian(Cosine()), torch.randn(4, 3).double()
    times = grid.uniform(Cosine(), 1)
    assert torch.allclose(SAMPLERS[name].run(oracle, x, times), oracle(x, times[0]))


@pytest.mark.parametrize("schedule", [Cosine(), EDM()], ids=["Cosine", "EDM"])
def test_ancestral_sampling_has_the_mean_and_deviation_of_the_data(schedule):
    oracle = gaussian(schedule)
    times = grid.karras(schedule, 200)
    g = torch.Generator().manual_seed(0)
    x = schedule.sigma(times[0]) * torch.randn(20000, 3, generator=g).double()
    out = ancestral(oracle, x, times, noise=lambda x: torch.randn(x.shape, generator=g, dtype=x.dtype))
    assert torch.allclose(out.mean(0), oracle.mean, atol=0.02)
    assert torch.allclose(out.std(0), oracle.std, rtol=0.05)


def test_ancestral_equals_diffusers_ddim_with_eta_one():
    scheduler = diffusers.DDIMScheduler(prediction_type="sample", clip_sample=False, timestep_spacing="trailing")
    scheduler.set_timesteps(10)
    oracle, noises = gaussian(TABLE), torch.randn(10, 8, 3).double()
    x = theirs = torch.randn(8, 3).double()
    for i, t in enumerate(scheduler.timesteps):
        theirs = scheduler.step(oracle(theirs, by_index(t)), t, theirs, eta=1.0, variance_noise=noises[i]).prev_sample
    rows = iter(noises)
    assert torch.allclose(ancestral(oracle, x, grid.trailing(TABLE, 10), noise=lambda _: next(rows)), theirs, atol=2e-5)


@pytest.mark.parametrize("name", SAMPLERS)
def test_nfe_counts_the_calls(name):
    calls, oracle = [], gaussian(EDM())
    counts = Function(EDM(), lambda x, t: calls.append(t) or oracle(x, t))
    SAMPLERS[name].run(counts, torch.randn(2, 3).double(), grid.karras(EDM(), 6))
    assert len(calls) == Sampling(name).calls(6)


def test_a_sampling_is_parsed_from_its_text_and_unknown_ones_are_refused():
    oracle, x, times = gaussian(Cosine()), torch.randn(4, 3).double(), grid.uniform(Cosine(), 4)
    noise = {"noise": torch.ones_like}
    sampling = Sampling.parse("consistency:0.3")
    assert torch.equal(sampling.run(oracle, x, times, **noise), consistency(oracle, x, times, gamma=0.3, **noise))
    assert sampling.noisy and (sampling.fresh, sampling.label) == (0.3, "consistency:0.3")
    assert not Sampling().noisy and Sampling().fresh == 0 and Sampling("consistency").fresh == 1
    assert torch.equal(Sampling().run(oracle, x, times, **noise), ddim(oracle, x, times))
    for wrong in ("consistency:2", "consistency:x", "ddim:0.3", "euler"):
        refuses("accepted are ddim, heun", Sampling.parse, wrong)
    refuses("unknown time grid 'linear'", Sampling, grid="linear")


def test_a_sampling_comes_back_from_its_description_and_any_number_of_steps_is_empty():
    searched = Sampling("consistency", 0.5, "searched", (1, 2), {2: (1.0, 0.4, 0.0)})
    for sampling in (Sampling(), Sampling("jump", steps=(1, 4)), searched):
        assert Sampling.from_description(sampling.describe()) == sampling
    assert Sampling().describe() == {} and searched.describe()["times"] == {"2": [1.0, 0.4, 0.0]}
    assert searched.times_for(Cosine(), 2).tolist() == [1.0, 0.4, 0.0]
