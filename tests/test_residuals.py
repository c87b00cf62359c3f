"""Residuals by noise level: zero for the exact denoiser, and the numbers of the recipe are those of `residuals`."""

import pytest
import torch
from closed_forms import MEAN, STD, Exact, data
from conftest import here

from distill.reading import read_json
from distill.regularize import RESIDUALS, residuals
from distill.rng import Rng
from distill.schedule import Cosine
from recipes import residuals as recipe
from recipes.data import sets
from teachers.oracle import Gaussian


def rng(n):
    return Rng(torch.Generator().manual_seed(0), n)


@pytest.mark.parametrize("level", [-5.0, 0.0, 5.0])
def test_an_exact_denoiser_has_no_residual_at_any_level_and_is_no_consistency_function(level):
    n, schedule = 20_000, Cosine()
    found = residuals(Gaussian(schedule, MEAN, STD), data(n), rng(n), level)
    assert abs(found["fokker-planck"]) < 1e-6 and abs(found["martingale"]) < 2e-3
    function = residuals(Exact(schedule), data(n), rng(n), level)
    assert function["self-consistency"] < found["self-consistency"] or level == 5.0
    assert function["fokker-planck"] > 1e-3 or level == 5.0


def test_levels_that_are_uniform_average_those_of_single_levels():
    n, exact = 20_000, Exact(Cosine())
    single = [residuals(exact, data(n), rng(n), -6 + 12 * (k + 0.5) / 24)["fokker-planck"] for k in range(24)]
    assert residuals(exact, data(n), rng(n))["fokker-planck"] == pytest.approx(sum(single) / 24, rel=0.05)


@pytest.mark.slow
def test_the_numbers_of_the_recipe_are_those_of_residuals(teacher, tmp_path, capsys):
    here(recipe.main, "--preset smoke --model digits oracle:digits --output-dir", tmp_path / "out")
    out = read_json(tmp_path / "out" / "residuals.json")
    real = sets.load("digits")
    found = residuals(teacher.denoiser, real.x0(slice(16)), rng(16), -2.0, **teacher.condition(real.labels[:16]))
    assert out["logsnr"] == [-6, -2, 2, 6] and out["residuals"] == list(RESIDUALS)
    assert {name: row[1] for name, row in out["models"][0]["at"].items()} == pytest.approx(found)
    assert out["models"][1]["model"] == "oracle:digits" and "martingale" in capsys.readouterr().out
    assert (tmp_path / "out" / "residuals.png").stat().st_size > 1000
