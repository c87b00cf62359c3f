import pytest
import torch
from conftest import Function, refuses

from distill.denoiser import Rescheduled
from distill.schedule import EDM, Cosine, Flow, add_noise
from distill.target import DataSample, Mix, PosteriorMean, posterior_mean
from distill.teacher_bias import TeacherBias
from teachers.oracle import Gaussian, Mixture, finite

SCHEDULE = Cosine()
ORACLE = Gaussian(SCHEDULE, torch.tensor([0.5, -0.3]), torch.tensor([0.4, 0.8]))


def noisy(n=2000, seed=0):
    g = torch.Generator().manual_seed(seed)
    x0 = ORACLE.mean + ORACLE.std * torch.randn(n, 2, generator=g)
    t = 0.02 + 0.96 * torch.rand(n, generator=g)
    return x0, add_noise(SCHEDULE, x0, torch.randn(n, 2, generator=g), t), t


def test_a_mix_goes_from_the_data_sample_to_the_teacher():
    x0, x_t, t = noisy(50)
    expected = ORACLE(x_t, t)
    assert torch.equal(Mix(ORACLE, 0)(SCHEDULE, x_t, t, x0), x0) and torch.equal(DataSample()(SCHEDULE, x_t, t, x0), x0)
    assert torch.allclose(Mix(ORACLE, 1)(SCHEDULE, x_t, t, x0), expected)
    assert torch.allclose(Mix(ORACLE, 0.25)(SCHEDULE, x_t, t, x0), 0.75 * x0 + 0.25 * expected, atol=1e-6)


def test_the_teachers_target_has_the_mean_of_the_data_and_none_of_its_conditional_variance():
    """At one x_t the data sample varies by sigma^2 std^2 / (alpha^2 std^2 + sigma^2), the closed form of a Gaussian."""
    t = torch.tensor(0.5)
    g = torch.Generator().manual_seed(1)
    x0 = ORACLE.mean + ORACLE.std * torch.randn(200_000, 2, generator=g)
    x_t = add_noise(SCHEDULE, x0, torch.randn(x0.shape, generator=g), t)
    residual = x0 - Mix(ORACLE, 1)(SCHEDULE, x_t, t.expand(len(x0)), x0)
    variance = SCHEDULE.sigma(t) ** 2 * ORACLE.std**2 / (SCHEDULE.alpha(t) ** 2 * ORACLE.std**2 + SCHEDULE.sigma(t) ** 2)
    assert residual.mean(0).abs().max() < 0.005
    assert torch.allclose(residual.var(0), variance, rtol=0.02)


def test_a_part_by_noise_level_is_linear_between_its_levels_and_flat_outside():
    levels = torch.tensor([-4.0, 0.0, 4.0])
    mix = Mix(ORACLE, torch.tensor([1.0, 0.5, 0.0]), levels)
    t = SCHEDULE.time(torch.tensor([-9.0, -4.0, -2.0, 0.0, 1.0, 4.0, 8.0]))
    assert torch.allclose(mix.weight(SCHEDULE, t), torch.tensor([1, 1, 0.75, 0.5, 0.375, 0, 0]), atol=1e-4)


def test_a_part_outside_0_to_1_is_refused():
    refuses("accepted are 0 to 1", Mix, ORACLE, 1.5)
    refuses("accepted are 0 to 1", Mix, ORACLE, torch.tensor([0.0, -0.1]), torch.tensor([0.0, 1.0]))


def test_a_teacher_is_evaluated_on_its_own_schedule():
    x0, x_t, t = noisy(20)
    elsewhere = Rescheduled(ORACLE, Flow())
    assert torch.allclose(Mix(elsewhere, 1)(SCHEDULE, x_t, t, x0), ORACLE(x_t, t), atol=1e-5)


@pytest.mark.parametrize("schedule", [Cosine(), EDM()])
def test_the_posterior_mean_of_a_batch_is_the_exact_denoiser_of_the_finite_set(schedule):
    data = torch.randn(40, 3, 2, 2)
    t = schedule.time(torch.linspace(-6, 6, 40))
    x_t = add_noise(schedule, data, torch.randn_like(data), t)
    assert torch.allclose(
        posterior_mean(schedule, x_t, t, data), finite(schedule, data.double())(x_t.double(), t.double()).float(), atol=1e-5
    )


def test_the_posterior_mean_stays_within_a_label():
    data = torch.cat([torch.zeros(10, 2), torch.ones(10, 2)]) + 0.01 * torch.randn(20, 2)
    labels = torch.arange(20) // 10
    t = torch.full((20,), 0.98)
    x_t = add_noise(SCHEDULE, data, torch.randn_like(data), t)
    within = PosteriorMean()(SCHEDULE, x_t, t, data, labels=labels)
    assert torch.allclose(within.mean(1).round(), labels.float()) and not torch.allclose(
        posterior_mean(SCHEDULE, x_t, t, data).mean(1).round(), labels.float()
    )


OFF = Function(SCHEDULE, lambda x_t, t: ORACLE(x_t, t) + 0.2)  # the Gaussian's exact mean and a known error
LABELLED = Function(SCHEDULE, ORACLE)


def found(teacher, averaged=1.0, n=4000):
    return TeacherBias(teacher, noisy(n, seed=1)[0]).errors(SCHEDULE, LEVELS, torch.Generator().manual_seed(0), n, averaged)


LEVELS = torch.linspace(-4, 4, 5)


@pytest.mark.slow
def test_variance_and_bias_are_those_of_the_closed_form():
    t = SCHEDULE.time(LEVELS)[:, None]
    variance = SCHEDULE.sigma(t) ** 2 * ORACLE.std**2 / (SCHEDULE.alpha(t) ** 2 * ORACLE.std**2 + SCHEDULE.sigma(t) ** 2)
    for teacher, bias in ((OFF, 0.04), (ORACLE, 0.0)):
        errors = found(teacher)
        assert torch.allclose(errors["variance"], variance.mean(1), rtol=0.08)
        assert torch.allclose(errors["bias"], torch.full((5,), bias), atol=0.01)


@pytest.mark.slow
def test_auto_finds_the_part_that_minimises_variance_and_bias_together():
    for n in (1, 64):
        errors = found(OFF, n)
        for part in (0.0, 0.1, 0.3, 0.7, 1.0):
            of = lambda g: (1 - g) ** 2 * errors["variance"] / n + g**2 * errors["bias"]  # noqa: E731, B023
            assert (of(errors["best"]) <= of(torch.tensor(part)) + 1e-9).all()
    assert torch.allclose(found(OFF)["best"], found(OFF)["variance"] / (found(OFF)["variance"] + 0.04), rtol=0.1)
    assert (found(ORACLE)["best"] > 0.99).all()


@pytest.mark.slow
def test_an_exact_teacher_is_trusted_though_few_samples_say_so_and_64_targets_are_averaged():
    assert (found(ORACLE, 64)["best"] > 0.85).all() and found(ORACLE, 64)["best"].mean() > 0.95


def test_a_class_with_one_sample_is_compared_with_all_samples():
    labels, data = torch.arange(40), noisy(40)[0]
    errors = TeacherBias(LABELLED, data, labels).errors(SCHEDULE, LEVELS, torch.Generator().manual_seed(0), samples=400)
    assert all(torch.isfinite(values).all() for values in errors.values())
    refuses("at least 2 data samples, here are 1", TeacherBias, ORACLE, data[:1])


@pytest.mark.slow
def test_on_a_mixture_the_exact_teacher_is_trusted_and_a_shifted_one_is_found_out():
    """Two narrow Gaussians: E[x0 | x_t] is far from linear, and x0 given x_t has the variance of which one it was."""
    means, std = torch.tensor([[-1.0, 0.5], [1.0, -0.5]]), 0.1
    oracle = Mixture(SCHEDULE, means, torch.full((2,), std), torch.tensor([0.5, 0.5]))
    g = torch.Generator().manual_seed(0)
    data = means[torch.randint(2, (6000,), generator=g)] + std * torch.randn(6000, 2, generator=g)
    exact = TeacherBias(oracle, data).errors(SCHEDULE, LEVELS, torch.Generator().manual_seed(0), 4000, averaged=1)
    assert (exact["best"] > 0.99).all()
    z = torch.randn(20_000, 2, generator=g)
    t = SCHEDULE.time(LEVELS)
    for level, found_variance in zip(t, exact["variance"], strict=True):  # by sampling, without a regression
        x0 = means[torch.randint(2, (20_000,), generator=g)] + std * torch.randn(20_000, 2, generator=g)
        x_t = add_noise(SCHEDULE, x0, z, level)
        assert torch.isclose((x0 - oracle(x_t, level)).square().mean(), found_variance, rtol=0.1, atol=1e-4)
    off = Function(SCHEDULE, lambda x_t, t: oracle(x_t, t) + 0.2)
    shifted = TeacherBias(off, data).errors(SCHEDULE, LEVELS, torch.Generator().manual_seed(0), 4000)
    assert torch.allclose(shifted["bias"], torch.full((5,), 0.04), atol=0.01)


def test_what_a_teacher_generalises_is_no_error_of_it():
    """Of forty data the exact answer is to repeat them; the oracle of the Gaussian they came from is not worse for not doing so."""
    errors = TeacherBias(ORACLE, noisy(40)[0]).errors(
        SCHEDULE, LEVELS, torch.Generator().manual_seed(0), samples=2000, averaged=1
    )
    assert errors["best"][3:].min() > 0.9
