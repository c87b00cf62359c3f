"""The probability flow from data to noise, against the closed form on Gaussian data."""

import json
import math
from dataclasses import replace

import pytest
import torch
from closed_forms import MEAN, STD, data
from PIL import Image

import teachers
from distill.grid import GRIDS, uniform
from distill.inversion import encode, slerp
from distill.samplers import ddim, heun
from distill.sampling import Sampling
from distill.schedule import EDM, VE, Cosine, Flow, LinearVP, Trig
from recipes import invert
from teachers.oracle import Gaussian

SCHEDULES = [Cosine(), EDM(), Flow(), LinearVP(), Trig()]


def name(value):
    return type(value).__name__


def encoding_error(schedule, times, order):
    """Largest error of a latent, as a part of the noise level."""
    oracle, x0 = Gaussian(schedule, MEAN, STD), data(32)
    exact = oracle.flow(x0, times[-1], times[0])
    return ((encode(oracle, x0, times, order=order) - exact).abs().max() / schedule.sigma(times[0])).item()


@pytest.mark.parametrize("schedule", SCHEDULES, ids=name)
@pytest.mark.parametrize("order", [1, 2])
def test_the_order_of_convergence_of_an_encoding_on_a_gaussian(schedule, order):
    def error(steps):  # from a level whose square is far below the error
        levels = schedule.time(torch.linspace(-4, 22, steps, dtype=torch.float64))
        return encoding_error(schedule, torch.cat([levels, levels.new_tensor([schedule.t_clean])]), order)

    measured = math.log2(error(256) / error(512))
    assert abs(measured - order) < 0.15, measured


@pytest.mark.parametrize("schedule", SCHEDULES, ids=name)
def test_the_error_of_the_first_step_is_of_the_order_of_the_lowest_noise_level_squared(schedule):
    def error(level):
        t = schedule.time_of(torch.tensor([level], dtype=torch.float64))
        times = torch.cat([t, t.new_tensor([schedule.t_clean])])
        return encoding_error(schedule, times, 1) * level  # of x_t

    assert abs(math.log2(error(0.02) / error(0.01)) - 2) < 0.05


def test_the_first_step_takes_the_noise_that_the_network_finds_so_that_the_way_back_cancels_it():
    """Without it a round trip over one step has an error of the level squared, with it of the fourth power."""

    def error(level):
        times = torch.cat([Cosine().time_of(torch.tensor([level], dtype=torch.float64)), torch.zeros(1, dtype=torch.float64)])
        oracle, x0 = Gaussian(Cosine(), MEAN, STD), data(32)
        return (ddim(oracle, encode(oracle, x0, times), times) - x0).abs().max().item()

    assert abs(math.log2(error(0.02) / error(0.01)) - 4) < 0.05


CASES = [(schedule, grid) for schedule in [*SCHEDULES, VE(sigma_max=10.0)] for grid in GRIDS]
CASES = [(s, grid) for s, grid in CASES if not isinstance(s, EDM) or grid in ("karras", "logsnr")]  # 80 is far for equal steps


@pytest.mark.parametrize("schedule, grid", CASES, ids=lambda v: v if isinstance(v, str) else name(v))
def test_a_round_trip_returns_to_the_data_as_steps_grow(schedule, grid):
    oracle, x0 = Gaussian(schedule, MEAN, STD), data(32)

    def error(steps, sampler, order):
        times = GRIDS[grid](schedule, steps)
        return (sampler(oracle, encode(oracle, x0, times, order=order), times) - x0).square().mean().sqrt().item()

    for sampler, order in ((ddim, 1), (heun, 2)):
        assert error(128, sampler, order) < min(0.1, error(32, sampler, order) / 2.5)


def test_the_latents_of_gaussian_data_are_standard_normal():
    oracle, schedule = Gaussian(Cosine(), MEAN, STD), Cosine()
    latent = encode(oracle, data(20_000), uniform(schedule, 128), order=2)
    assert latent.mean(0).abs().max() < 0.02 and (latent.std(0) - 1).abs().max() < 0.02


@pytest.mark.parametrize("order, calls", [(1, 8), (2, 14)])
def test_an_encoding_evaluates_the_network_above_the_clean_time_alone_as_often_as_it_says(order, calls):
    seen = []

    class Watched(Gaussian):
        def __call__(self, x_t, t, to=None, **cond):
            seen.append(float(t))
            return super().__call__(x_t, t)

    encode(Watched(Cosine(), MEAN, STD), data(2), uniform(Cosine(), 8), order=order)
    assert len(seen) == calls and min(seen) == 1 / 8


def test_an_inversion_refuses_other_orders_and_grids_that_do_not_fall():
    oracle, x0 = Gaussian(Cosine(), MEAN, STD), data(2)
    for times, order, message in (
        (uniform(Cosine(), 4), 3, "order 3 .*accepted are 1"),
        (uniform(Cosine(), 4).flip(0), 1, "accepted are 2 or more that fall"),
        (torch.tensor([0.0]), 1, "accepted are 2 or more that fall"),
    ):
        with pytest.raises(ValueError, match=message):
            encode(oracle, x0, times, order=order)


def test_the_arc_between_two_latents_has_their_norm_their_ends_and_equal_angles():
    a, b = torch.tensor([[3.0, 0.0], [1.0, 0.0]]), torch.tensor([[0.0, 3.0], [2.0, 0.0]])
    assert torch.allclose(slerp(a, b, 0.0), a) and torch.allclose(slerp(a, b, 1.0), b)
    third = slerp(a, b, 1 / 3)
    assert torch.allclose(third[0], 3 * torch.tensor([math.cos(math.pi / 6), math.sin(math.pi / 6)]))
    assert torch.allclose(third[1], torch.tensor([4 / 3, 0.0]))  # parallel vectors: the straight line


SMALL = ["--threads", "1", "--images", "8", "--steps", "2", "16", "--columns", "3"]


@pytest.mark.slow
def test_the_recipe_measures_round_trips_of_the_embedded_teacher_and_draws_them(tmp_path):
    invert.main([*SMALL, "--output-dir", str(tmp_path / "i"), "--to-label", "3"])
    out = json.loads((tmp_path / "i" / "invert.json").read_text())
    for kind in ("teacher", "teacher, no label"):
        errors, spread = (out[kind][name] for name in ("round_trip_rms", "latent_std"))
        assert list(errors) == ["2", "16"] and errors["16"] < errors["2"] / 2 and 0.5 < spread["16"] < 1.1
    assert out["to_label"] == 3
    width, height = Image.open(tmp_path / "i" / "invert.png").size
    assert height > 8 * 40 and width > 3 * 40  # image, latent, reconstruction, three edits, two arcs


@pytest.mark.parametrize(
    "sampling, words, message",
    [
        (Sampling("consistency", steps=(2,)), [], "sampler 'consistency' has no inverse: accepted are"),
        (Sampling("jump", steps=(2,)), [], "sampler 'jump' has no inverse: accepted are"),
        (Sampling(), ["--to-label", "10"], "--to-label 10: accepted are 0 to 9"),
    ],
)
def test_the_recipe_refuses_models_without_a_deterministic_sampler_and_classes_that_there_are_not(
    sampling, words, message, tmp_path, capsys, monkeypatch
):
    made = replace(teachers.load("digits"), sampling=sampling)
    monkeypatch.setattr(teachers, "load", lambda spec: made)
    with pytest.raises(SystemExit) as ended:
        invert.main([*SMALL, *words, "--output-dir", str(tmp_path / "none")])
    line = capsys.readouterr().err
    assert ended.value.code == 2 and message in line and line.count("\n") == 1, line
    assert not (tmp_path / "none").exists()


def test_a_grid_of_pure_noise_alone_is_refused():
    """With zero terminal SNR its only level has nothing of the image, and every latent would be 0."""
    with pytest.raises(ValueError, match="2 steps or more"):
        encode(Gaussian(Cosine(), MEAN, STD), torch.zeros(2, 2).double(), uniform(Cosine(), 1))
