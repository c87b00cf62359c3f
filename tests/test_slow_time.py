"""A slow time embedding: near the model that it is made from, smooth along time, and whole in files and in stock pipelines."""

import pytest
import torch
from conftest import refuses

import teachers
from distill.scm import TRIG, tangent, velocity
from recipes.common.building import student_of
from recipes.common.method_flags import MethodFlags
from teachers.oracle import Gaussian
from teachers.students import with_slow_time, with_two_times
from teachers.teacher import Teacher

DIGITS = teachers.load("digits")
SLOW = with_slow_time(DIGITS)
X, LABELS = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 10


def test_it_keeps_most_of_what_the_teacher_says_and_is_trained_from_there():
    for t in (0.2, 0.5, 0.9):
        here, there = (model.denoiser(X, torch.tensor(t), **DIGITS.condition(LABELS)) for model in (SLOW, DIGITS))
        assert (here - there).square().mean() < 0.1 * there.square().mean(), t
    assert with_slow_time(SLOW) is SLOW


def test_its_tangents_are_smooth_where_those_of_the_teacher_are_ripple():
    """The exact derivative beside that over steps of 0.02 of the angle: with fast sines they have little in common."""
    a = torch.full((16,), 0.8)
    alike = []
    for model in (DIGITS, SLOW):
        f = velocity(model.denoiser, DIGITS.condition(LABELS))
        exact = tangent(f, X, a, torch.zeros_like(X))[1].flatten()
        coarse = tangent(f, X, a, torch.zeros_like(X), "finite", 0.02)[1].flatten()
        alike.append(float(torch.cosine_similarity(exact, coarse, dim=0)))
    assert alike[0] < 0.8 and alike[1] > 0.97, alike
    assert TRIG.sigma_data == 1


def test_a_file_holds_it_with_two_times_too(tmp_path):
    for name, model in (("one", SLOW), ("two", with_two_times(SLOW))):
        teachers.save(tmp_path / name, model)
        again = teachers.load(str(tmp_path / name))
        to = {"to": torch.tensor(0.1)} if name == "two" else {}
        out = (m.denoiser(X, torch.tensor(0.6), **to, **DIGITS.condition(LABELS)) for m in (model, again))
        assert torch.equal(*out)


def test_methods_that_need_it_get_it_and_other_networks_are_refused():
    assert student_of(MethodFlags(method="scd", time_embedding="slow"), DIGITS).denoiser.net.slow is not None
    assert student_of(MethodFlags(method="scd", time_embedding="own"), DIGITS) is DIGITS
    oracle = Gaussian(DIGITS.denoiser.schedule, torch.zeros(1), torch.ones(1))
    with pytest.raises(ValueError):
        with_slow_time(Teacher(oracle, (1, 8, 8)))
    refuses("only to a network with one time", with_slow_time, with_two_times(DIGITS))
