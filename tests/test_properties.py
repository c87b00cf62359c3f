"""Properties of the core over shapes, dtypes and noise levels, drawn by hypothesis."""

import math
from itertools import pairwise

import pytest
import torch

pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.denoiser import PREDICTIONS, Denoiser
from distill.files import load, save
from distill.progressive import steps_in_one
from distill.rng import Rng, seed_of
from distill.schedule import (
    EDM,
    VE,
    Cosine,
    Flow,
    LinearVP,
    Table,
    Trig,
    add_noise,
    describe,
    explain,
    move,
    posterior,
    schedule_from,
    to_eps,
    to_x0,
)  # fmt: skip
from distill.target import posterior_mean
from distill.train import BatchSplit, Optimization
from teachers.oracle import Gaussian

SCHEDULES = st.one_of(
    st.just(Flow()), st.just(Cosine()), st.builds(Trig, st.floats(0.1, 10)),
    st.tuples(st.floats(1e-3, 1), st.floats(2, 50)).map(lambda ends: LinearVP(*ends)),
    st.tuples(st.floats(1e-3, 0.5), st.floats(1, 500)).map(lambda ends: VE(*ends)),
    st.tuples(st.floats(1e-3, 0.5), st.floats(1, 500)).map(lambda ends: EDM(*ends)),
    st.integers(2, 2000).map(lambda n: Table((*(math.cos(math.pi / 2 * i / n) ** 2 for i in range(1, n)), 0.0))),
)  # fmt: skip
shapes = st.lists(st.integers(1, 4), min_size=1, max_size=3)
places = st.floats(0.01, 0.98)
many = settings(max_examples=60, deadline=None, derandomize=True)


def inside(schedule, place):
    """The time at ``place`` between t_min and the last level that float64 resolves, in float64."""
    return torch.tensor(schedule.t_min + place * (schedule.t_max - schedule.t_min), dtype=torch.float64)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@many
@given(SCHEDULES, places)
def test_time_is_the_inverse_of_log_snr_and_of_the_level_and_noise_grows(schedule, place):
    t = inside(schedule, place)
    assert torch.allclose(schedule.time(schedule.logsnr(t)), t, rtol=1e-6, atol=1e-9)
    assert torch.allclose(schedule.time_of(schedule.level(t)), t, rtol=1e-6, atol=1e-9)
    later = inside(schedule, place + 0.01)
    assert schedule.level(later) > schedule.level(t) and schedule_from(describe(schedule)) == schedule


@many
@given(SCHEDULES, shapes, st.integers(1, 4), places, st.floats(0.0, 0.9))
def test_explain_is_the_inverse_of_move_and_the_true_x0_stays_on_the_path(schedule, shape, batch, place, back):
    t, s = inside(schedule, place), inside(schedule, place * back)
    x0, eps = normal(batch, *shape), normal(batch, *shape, seed=1)
    x_t = add_noise(schedule, x0, eps, t)
    x_s = move(schedule, x_t, x0, t, s)
    assert torch.allclose(x_s, add_noise(schedule, x0, eps, s), atol=1e-8 * float(x_t.abs().max()))
    assert torch.allclose(explain(schedule, x_t, x_s, t, s), x0, atol=1e-5 * max(1.0, float(x_t.abs().max())))
    assert torch.allclose(to_x0(schedule, x_t, to_eps(schedule, x_t, x0, t), t), x0, atol=1e-6)


DEFINED = {  # what a network of each prediction says, by its definition
    "x0": lambda a, s, x0, eps: x0,
    "eps": lambda a, s, x0, eps: eps,
    "v": lambda a, s, x0, eps: a * eps - s * x0,
    "score": lambda a, s, x0, eps: -eps / s,
    "flow": lambda a, s, x0, eps: eps - x0,
    "edm": lambda a, s, x0, eps: (s * x0 - a * 0.25 * eps) / (0.5 * (s * s + a * a * 0.25).sqrt()),
}


@many
@given(SCHEDULES, st.sampled_from(sorted(PREDICTIONS)), shapes, places, st.sampled_from([torch.float32, torch.float64]))
def test_every_prediction_of_the_true_x0_is_read_as_x0_in_its_own_dtype(schedule, prediction, shape, place, dtype):
    t = inside(schedule, place)
    x0, eps = normal(3, *shape), normal(3, *shape, seed=1)
    output = DEFINED[prediction](schedule.alpha(t), schedule.sigma(t), x0, eps).to(dtype)
    x_t = add_noise(schedule, x0, eps, t).to(dtype)
    if prediction in ("eps", "score") and schedule.alpha(schedule.ends()[0]) < 1e-6:
        return
    read = Denoiser(lambda x, c: output, schedule, prediction)(x_t, t.to(dtype).expand(3))  # type: ignore[arg-type]
    resolution = (3e-6 if dtype == torch.float32 else 1e-11) * max(1.0, float(schedule.level(t)))
    assert read.dtype == dtype and torch.allclose(read.double(), x0, atol=30 * resolution)


@many
@given(SCHEDULES, places, st.floats(0.0, 0.9))
def test_the_noise_weights_of_the_posterior_keep_its_variance(schedule, place, back):
    t, s = inside(schedule, place), inside(schedule, place * back)
    kept, fresh = posterior(schedule, t, s)
    assert torch.allclose(kept**2 + fresh**2, schedule.sigma(s) ** 2, rtol=1e-6) and kept >= 0 and fresh >= 0


@many
@given(st.sampled_from([Flow(), Cosine(), EDM(), VE(), Trig()]), st.integers(1, 6), places)
def test_any_number_of_exact_steps_is_one_move_to_their_end(schedule, k, place):
    oracle = Gaussian(schedule, torch.tensor([0.3, -0.2]), torch.tensor([0.7, 0.4]))
    path = list(torch.linspace(float(inside(schedule, place)), schedule.t_min, k + 1, dtype=torch.float64))
    x = normal(4, 2) * torch.hypot(schedule.alpha(path[0]), schedule.sigma(path[0]))
    end = x
    for t, s in pairwise(path):
        end = move(schedule, end, oracle(end, t), t, s)
    once = move(schedule, x, steps_in_one(oracle, x, path), path[0], path[-1])
    assert torch.allclose(once, end, atol=1e-8 * max(1.0, float(x.abs().max())))


@many
@given(shapes, st.integers(1, 6), places)
def test_the_posterior_mean_lies_among_the_data_and_is_the_sample_itself_without_noise(shape, n, place):
    data = normal(n, *shape)
    schedule, t = Flow(), torch.full((n,), place, dtype=torch.float64)
    mean = posterior_mean(schedule, add_noise(schedule, data, normal(n, *shape, seed=1), t), t, data)
    assert (mean <= data.amax(0) + 1e-9).all() and (mean >= data.amin(0) - 1e-9).all()
    still = torch.full((n,), 1e-9, dtype=torch.float64)
    assert torch.allclose(posterior_mean(schedule, add_noise(schedule, data, data * 0, still), still, data), data)


@many
@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 8), st.data())
def test_parts_of_a_batch_cover_it_once_and_draw_what_the_whole_draws(world, accumulate, size, data):
    total = world * accumulate * size
    splits = [BatchSplit(total, world, rank, size) for rank in range(world)]
    rows = [i for split in splits for turn in range(split.accumulate) for i in range(total)[split.rows(turn)]]
    assert sorted(rows) == list(range(total)) and splits[0].table() == [
        [(s.rows(turn).start, s.rows(turn).stop) for turn in range(s.accumulate)] for s in splits
    ]
    part = data.draw(st.sampled_from(splits)).rows(0)
    seed = seed_of(total, "draw")
    whole = Rng(torch.Generator().manual_seed(seed), total).uniform()
    assert torch.equal(whole[part], Rng(torch.Generator().manual_seed(seed), total, part).uniform())


@many
@given(st.integers(1, 10**6), st.integers(1, 4096))
def test_what_is_trained_is_within_half_a_batch_of_what_was_asked_or_one_batch(images, batch):
    o = Optimization(images, batch)
    assert o.trained_images % batch == 0 and (abs(o.trained_images - images) <= batch / 2 or o.steps == 1)
    assert 0 < o.lr_at(o.steps - 1) <= o.lr_at(0) <= o.lr


@many
@given(shapes, st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8]), st.text(max_size=20))
def test_a_file_holds_what_was_written(tmp_path_factory, shape, dtype, text):
    path = tmp_path_factory.mktemp("f") / "x.safetensors"
    value = (normal(*shape) * 50).to(dtype)
    save(path, {"x": value}, {"text": text})
    tensors, description = load(path)
    assert torch.equal(tensors["x"], value) and tensors["x"].dtype == dtype and description["text"] == text
