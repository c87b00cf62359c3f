"""Reflow: a fixed coupling of noise and data, and how straight the paths are, against closed forms."""

import json
from dataclasses import dataclass, replace

import pytest
import torch
from closed_forms import MEAN, STD, rng
from conftest import refuses

import teachers
from distill.denoiser import Denoiser
from distill.regression import Regression
from distill.sampling import Sampling
from distill.schedule import Cosine, Flow, LinearVP, Schedule, expand
from distill.straightness import straightness
from distill.train import BatchSplit
from eval.generate import generate, initial_noise
from recipes import reflow
from recipes.data import sets
from recipes.data.pairs import Pairs, read_pairs, write_pairs
from teachers.oracle import Gaussian

CPU = torch.device("cpu")
NOISE = torch.randn(64, 2, generator=torch.Generator().manual_seed(1)).double()


@dataclass(frozen=True)
class Translated:
    """E[x0 | x_t] of the coupling x0 = eps + MEAN: eps is x_t - (1 - t) MEAN."""

    schedule: Schedule

    def __call__(self, x_t, t, to=None, **cond):
        return x_t + expand(t, x_t) * MEAN


@pytest.mark.parametrize("schedule", [Flow(), Cosine(), LinearVP()], ids=lambda s: type(s).__name__)
def test_the_straightness_of_a_gaussian_flow_is_its_integral(schedule):
    """Z_t = (1 - t) m + k(t) z with k^2 = (1 - t)^2 std^2 + t^2, so that S = z^2 (int k'^2 dt - (1 - std)^2)."""
    t = torch.linspace(0, 1, 200_001, dtype=torch.float64)[:, None]
    slope = (t - (1 - t) * STD**2) / ((1 - t) ** 2 * STD**2 + t**2).sqrt()
    exact = (NOISE**2 * (torch.trapezoid(slope**2, t, dim=0) - (1 - STD) ** 2)).mean(1)
    errors = [
        (straightness(Gaussian(schedule, MEAN, STD), NOISE, steps=n).mean() / exact.mean() - 1).abs().item() for n in (64, 256)
    ]
    assert exact.mean() > 0.05 and errors[1] < 0.02 and errors[1] < errors[0] / 2


def test_the_flow_of_a_point_and_a_translation_are_straight():
    point = Gaussian(Cosine(), MEAN, torch.zeros(2).double())
    for flow in (point, Translated(Flow())):
        assert straightness(flow, NOISE).max() < 1e-20
    assert straightness(Gaussian(Flow(), MEAN, torch.ones(2).double()), NOISE).mean() > 0.1  # the same ends, not coupled


def test_a_regression_on_pairs_is_zero_at_the_mean_of_their_coupling_and_not_with_new_noise():
    x0 = NOISE + MEAN
    loss = lambda **cond: Regression()(Translated(Flow()), x0, rng=rng(64), progress=0.0, **cond)  # noqa: E731
    assert loss(noise=NOISE).max() < 1e-10 and loss().mean() > 0.1


def test_batches_of_pairs_keep_noise_sample_and_label_together():
    numbers = torch.arange(50.0)
    images, noise = numbers[:, None, None, None].expand(50, 1, 2, 2), -numbers[:, None, None, None].expand(50, 1, 2, 2)
    pairs = Pairs("pairs", images, numbers.long() % 10, noise=noise)
    made = pairs.batches(BatchSplit(16), 0, "test", CPU, lambda labels: {"labels": labels})
    x0, cond = next(made(0))
    assert torch.equal(cond["noise"], -x0) and torch.equal(cond["labels"], x0[:, 0, 0, 0].long() % 10)
    assert len(x0.unique()) > 8
    parts = [next(pairs.batches(BatchSplit(16, 2, r), 0, "test", CPU, lambda labels: {})(0)) for r in (0, 1)]
    assert torch.equal(torch.cat([x for x, _ in parts]), x0) and torch.equal(torch.cat([c["noise"] for _, c in parts]), -x0)


def test_a_file_of_pairs_holds_what_the_model_makes_of_its_noise_and_labels(tmp_path):
    model, sampling = teachers.load("digits"), Sampling()
    write_pairs(tmp_path / "p.safetensors", model, model.denoiser, sampling, 2, 7, [range(0, 3), range(3, 5)], CPU)
    pairs = read_pairs(tmp_path / "p.safetensors")
    drawn = initial_noise(range(5), model.shape, model.classes, 7)
    assert torch.equal(pairs.noise, drawn.noise) and torch.equal(pairs.labels, drawn.labels)
    times = sampling.times_for(model.denoiser.schedule, 2)
    assert torch.allclose(pairs.images, generate(model.denoiser, sampling, times, drawn, model.condition, CPU), atol=1e-5)
    with pytest.raises(ValueError, match="no pairs of noise and samples; accepted are"):
        read_pairs(teachers_file(tmp_path, model))


def teachers_file(folder, model):
    teachers.save(folder / "t.safetensors", model)
    return folder / "t.safetensors"


def test_reflow_refuses_networks_that_cannot_give_x0_at_pure_noise_and_ranges_of_guidance(tmp_path):
    digits, data = teachers.load("digits"), sets.load("digits")
    eps = replace(digits, denoiser=Denoiser(digits.parametric.net, LinearVP(), "eps", "thousand_time"))
    config = reflow.Config(output_dir=str(tmp_path / "r"))
    refuses("prediction 'eps' ... accepted are v, x0", reflow.prepare, config, eps, data)
    refuses("one guidance scale: accepted are", reflow.prepare, replace(config, guidance_range=(1.0, 3.0)), digits, data)
    assert not (tmp_path / "r").exists()


@pytest.mark.slow
def test_the_recipe_makes_pairs_once_trains_each_round_on_them_and_measures_straightness(tmp_path):
    config = reflow.Config(
        output_dir=str(tmp_path / "r"), threads=1, images=40, chunk=40, sweep_steps=(1,), rounds=2, pairs=48, pair_steps=2,
        batch_size=16, training_images=32,
    )  # fmt: skip

    def run():
        e = reflow.prepare(config, teachers.load("digits"), sets.load("digits"))
        reflow.rectify(config, e)
        e.run.close()
        return json.loads((tmp_path / "r" / "reflow.json").read_text())["straightness"], [cell.name for cell in e.cells]

    found, cells = run()
    assert list(found) == ["teacher", "reflow-1", "reflow-2"] and len(set(found.values())) == 3 and min(found.values()) > 0
    assert cells == ["reflow-1 ddim 1", "reflow-2 ddim 1"]
    files = [tmp_path / "r" / "pairs" / f"{number}.safetensors" for number in (1, 2)]
    first, second = map(read_pairs, files)
    assert len(first.images) == 48 and not torch.equal(first.noise, second.noise)
    made = [file.stat().st_mtime_ns for file in files]
    (tmp_path / "r" / "stages" / "reflow-2" / "student.safetensors").unlink()
    assert run() == (found, cells) and [file.stat().st_mtime_ns for file in files] == made
    student = teachers.load(str(tmp_path / "r" / "stages" / "reflow-2" / "student.safetensors"))
    assert student.sampling.steps == (1,) and student.record["method"] == "reflow"
