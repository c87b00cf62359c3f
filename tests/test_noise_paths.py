"""Trainings without data: their points are on the teacher's own paths from pure noise, and nothing but the shape comes from the data."""

import pytest
import torch
from closed_forms import MEAN, STD, Exact, Small, data, rng
from conftest import Function

from distill.consistency import Consistency, Neighbours
from distill.denoiser import Denoiser
from distill.grid import uniform
from distill.midtraining import MidTraining
from distill.noise_paths import steps_from_noise
from distill.progressive import Progressive, steps_in_one
from distill.regression import Regression
from distill.rng import Rng
from distill.schedule import EDM, Cosine, Flow, move, prior_std
from distill.target import Mix
from teachers.oracle import Gaussian

TEACHER = Gaussian(Cosine(), MEAN, STD)
TEACHER_OF_EDM = Gaussian(EDM(), MEAN, STD)


def ddim_step(times):
    return lambda x, i, **cond: move(TEACHER.schedule, x, TEACHER(x, times[i]), times[i], times[i + 1])


def test_the_points_are_on_the_closed_form_path_of_their_own_noise():
    times, like = uniform(Cosine(), 256), torch.zeros(512, 2).double()
    at = steps_from_noise(ddim_step(times), Cosine(), times, like, rng(512), {})
    noise = rng(512).normal(like)[::256] * prior_std(Cosine(), times[0])
    start = noise.repeat_interleave(256, 0)
    for x, t in ((at.x_t, at.t), (at.x_s, at.s)):
        assert (x - TEACHER.flow(start, torch.full_like(t, float(times[0])), t)).abs().max() < 0.01
    assert torch.equal(at.t.sort().values, times[:-1].repeat(2).sort().values)


def test_every_sample_is_one_step_of_a_path_and_has_the_conditions_of_its_path():
    times, like = uniform(Cosine(), 4), torch.zeros(10, 2).double()
    labels = torch.arange(10)
    seen = []

    def step(x, i, labels):
        seen.append(labels.tolist())
        return x * 0.5 + labels[:, None]

    at = steps_from_noise(step, Cosine(), times, like, rng(10), {"labels": labels})
    assert seen == [[0, 4, 8]] * 4 and at.cond["labels"].tolist() == [0] * 4 + [4] * 4 + [8] * 2
    assert torch.equal(at.x_s, at.x_t * 0.5 + at.cond["labels"][:, None])


def test_each_time_is_met_equally_often_where_the_steps_do_not_divide_the_batch():
    times, like, seen = uniform(Cosine(), 4), torch.zeros(6, 2), []
    for seed in range(400):
        seen.append(steps_from_noise(lambda x, i: x, Cosine(), times, like, rng(6, seed), {}).t)
    counts = torch.stack([(torch.cat(seen) == t).sum() for t in times[:-1]])
    assert (counts - 600).abs().max() < 60  # 3 standard deviations of the random half


METHODS = {
    "progressive": lambda: Progressive(TEACHER, uniform(Cosine(), 8), data_free=True),
    "cd": lambda: Consistency(Mix(TEACHER), Neighbours(lambda _: 8, grid="uniform"), order=2, substeps=4, data_free=True),
    "denoise": lambda: Regression(Mix(TEACHER), times=uniform(Cosine(), 8)),
}


def perfect(name):
    """The student whose loss is zero, or no more than the solver's error."""
    times = uniform(Cosine(), 8)

    def two_in_one(x, t):
        i = (t[:, None] - times.float()).abs().argmin(1)
        return steps_in_one(TEACHER, x, [times[i + k] for k in range(3)])

    return {"progressive": Function(Cosine(), two_in_one), "cd": Exact(Cosine()), "denoise": TEACHER}[name]


@pytest.mark.parametrize("name", METHODS)
def test_the_perfect_student_loses_nothing_and_the_data_only_give_the_shape(name):
    method, student = METHODS[name](), perfect(name)
    losses = [method(student, x0, rng=rng(64), progress=0.0) for x0 in (data(64), 100 * data(64))]
    assert losses[0].shape == (64,) and torch.equal(*losses) and losses[0].max() < 1e-3
    other = Function(Cosine(), lambda x, t: 0.9 * student(x, t))
    assert method(other, data(64), rng=rng(64), progress=0.0).mean() > 10 * losses[0].mean() + 1e-4


def test_paths_of_midtraining_begin_at_pure_noise_where_the_schedule_ends_with_data_left():
    """On EDM x_t at t_max is x0 plus noise, so that a path from the data would show."""
    method = MidTraining(TEACHER_OF_EDM, steps=4, data_free=True)
    losses = [method(TEACHER_OF_EDM, x0, rng=rng(16), progress=0.0) for x0 in (data(16), 100 * data(16))]
    assert torch.equal(*losses) and losses[0].max() > 0


@pytest.mark.parametrize("name", METHODS)
def test_two_processes_see_the_samples_of_one(name):
    method, student = METHODS[name](), Function(Cosine(), lambda x, t: torch.tanh(x))
    whole = method(student, data(64), rng=rng(64), progress=0.0)
    halves = [
        method(student, data(32), rng=Rng(torch.Generator().manual_seed(0), 64, rows), progress=0.0)
        for rows in (slice(0, 32), slice(32, 64))
    ]
    assert torch.allclose(torch.cat(halves), whole, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["progressive", "cd"])
def test_a_student_trained_without_data_makes_the_data(name):
    """It samples in the fewest steps of its method from noise, and has mean and deviation of the data."""
    torch.manual_seed(0)
    flow, net = Flow(), Small().double()
    teacher = Gaussian(flow, MEAN, STD)
    method = {
        "progressive": Progressive(teacher, uniform(flow, 16), substeps=16, data_free=True),
        "cd": Consistency(Mix(teacher), Neighbours(lambda _: 4, grid="uniform"), order=2, substeps=4, data_free=True),
    }[name]
    student, optimizer = Denoiser(net, flow, "x0", "time"), torch.optim.Adam(net.parameters(), 3e-3)
    for step in range(500):
        optimizer.zero_grad()
        method(student, torch.zeros(128, 2).double(), rng=rng(128, step), progress=step / 500).mean().backward()
        optimizer.step()
    noise = torch.randn(4096, 2, generator=torch.Generator().manual_seed(1)).double()
    with torch.no_grad():
        made = student(noise, torch.tensor(1.0))
    assert (made.mean(0) - MEAN).abs().max() < 0.06 and (made.std(0) / STD - 1).abs().max() < 0.12
