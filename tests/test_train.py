import copy
import itertools

import pytest
import torch
from accelerate import Accelerator
from conftest import refuses
from torch import nn

from distill.denoiser import Denoiser
from distill.regression import Regression
from distill.resume import Resumable
from distill.rng import Rng, seed_of
from distill.schedule import Cosine, add_noise
from distill.target import DataSample, Mix
from distill.train import BatchSplit, Optimization, train
from teachers.oracle import Gaussian

DATA = torch.randn(512, 2, generator=torch.Generator().manual_seed(1))


def student():
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(3, 32), nn.SiLU(), nn.Dropout(0.1), nn.Linear(32, 2))

        def forward(self, x, t):
            return self.body(torch.cat([x, t[:, None]], 1))

    return Denoiser(Net(), Cosine(), "v")


def batches(shares):
    def stream(step):
        while True:
            for turn in range(shares.accumulate):
                rng = Rng(torch.Generator().manual_seed(seed_of("data", step)), shares.batch_size, shares.rows(turn))
                yield DATA[rng.integers(len(DATA))], {}
            step += 1

    return stream


def trained(model, how, method=None, stream=None, **kwargs):
    """The states of a training, by default by regression on the data."""
    stream = stream or batches(BatchSplit(how.batch_size, microbatch=how.microbatch))
    return train(method or Regression(), model, stream, Accelerator(cpu=True), how, seed=0, phase="p", **kwargs)


def run(optimization, steps=None, **kwargs):
    model = student()
    return model, list(itertools.islice(trained(model, optimization, **kwargs), steps))


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.net.parameters()])


def test_the_learning_rate_rises_in_images_and_falls_linearly_to_zero():
    o = Optimization(images=1000, batch_size=10, lr=1.0, warmup_images=100)
    assert o.lr_at(0) == pytest.approx(0.1) and o.lr_at(9) == pytest.approx(0.91)
    assert o.lr_at(50) == 0.5 and o.lr_at(99) == pytest.approx(0.01)
    flat = Optimization(images=1000, batch_size=10, lr=1.0, constant=0.5)
    assert flat.lr_at(49) == 1.0 and flat.lr_at(75) == pytest.approx(0.5)


def test_ema_halves_the_weight_of_the_past_every_halflife_of_images():
    o = Optimization(images=640, batch_size=64, lr=0.01, ema_halflife_images=128)
    beta, average = 0.5 ** (64 / 128), None
    model = student()
    average = weights(model).clone()
    for state in trained(model, o):
        average = beta * average + (1 - beta) * weights(model)
    assert torch.allclose(weights(state.ema), average, atol=1e-6)
    assert not torch.allclose(weights(state.ema), weights(model), atol=1e-4)


def test_without_an_ema_the_averaged_student_is_the_student():
    model, states = run(Optimization(images=128, batch_size=64))
    assert torch.equal(weights(states[-1].ema), weights(model))


def test_microbatches_accumulate_to_the_whole_batch():
    model = student()
    model.net.body[2].p = 0.0
    results = []
    for microbatch in (None, 16, 8):
        copied = Denoiser(copy.deepcopy(model.net), Cosine(), "v")
        list(trained(copied, Optimization(images=640, batch_size=64, microbatch=microbatch, lr=0.01)))
        results.append(weights(copied))
    assert torch.allclose(results[0], results[1], atol=1e-5) and torch.allclose(results[0], results[2], atol=1e-5)


def test_shares_cover_the_batch_once_and_refuse_what_does_not_divide():
    shares = [BatchSplit(24, 3, rank, 4) for rank in range(3)]
    rows = [i for s in shares for turn in range(s.accumulate) for i in range(24)[s.rows(turn)]]
    assert sorted(rows) == list(range(24))
    refuses("choose a multiple of 3", BatchSplit, 32, 3)


def test_draws_cut_to_rows_are_the_rows_of_the_whole_draw():
    def make(rows=None):
        return Rng(torch.Generator().manual_seed(3), 8, rows)

    x = torch.zeros(8, 2, 2)
    whole, half = make(), make(slice(2, 6))
    assert torch.equal(whole.normal(x)[2:6], half.normal(x[:4]))
    assert torch.equal(whole.uniform()[2:6], half.uniform())
    assert torch.equal(whole.integers(100)[2:6], half.integers(100))


@pytest.mark.parametrize("stop", [1, 5, 9, 10, 17])
def test_a_run_stopped_anywhere_continues_to_the_same_bits(tmp_path, stop):
    o = Optimization(images=20 * 64, batch_size=64, lr=0.01, ema_halflife_images=200)
    whole, states = run(o)
    resumable = Resumable(tmp_path)
    run(o, steps=stop, resumable=resumable, save_every_images=4 * 64)
    again, resumed = run(o, resumable=resumable, save_every_images=4 * 64)
    assert torch.equal(weights(whole), weights(again))
    assert torch.equal(weights(states[-1].ema), weights(resumed[-1].ema))
    assert resumed[0].step == (stop - 1) // 4 * 4 + 1  # the checkpoint of step k is written once step k + 1 is asked for


def test_another_runs_checkpoint_is_not_taken(tmp_path):
    resumable = Resumable(tmp_path)
    run(Optimization(images=640, batch_size=64, lr=0.01), steps=6, resumable=resumable, save_every_images=128)
    _, states = run(Optimization(images=640, batch_size=64, lr=0.02), resumable=resumable, save_every_images=10**9)
    assert states[0].step == 1


def test_a_gradient_that_is_not_finite_stops_the_run_with_its_step():
    def method(student, x0, *, rng, progress, **cond):
        return student(x0, torch.full((len(x0),), 0.5)).sum(1) * (float("nan") if progress >= 0.3 else 1)

    with pytest.raises(FloatingPointError, match="step 3 of phase p"):
        list(trained(student(), Optimization(images=640, batch_size=64), method))


@pytest.mark.slow
def test_regression_on_the_teacher_reaches_the_teacher_faster_than_on_data():
    """The reason for the project: the same mean, none of the variance."""
    oracle = Gaussian(Cosine(), torch.tensor([0.3, -0.2]), torch.tensor([0.7, 0.7]))
    data = oracle.mean + oracle.std * torch.randn(4096, 2)
    t = torch.rand(4096)
    x = add_noise(Cosine(), data, torch.randn(4096, 2), t)

    def stream(step):
        for k in itertools.count(step):
            yield data[torch.randint(4096, (32,), generator=torch.Generator().manual_seed(k))], {}

    errors = []
    for target in (DataSample(), Mix(oracle)):
        model = student()
        model.net.body[2].p = 0.0
        how = Optimization(32 * 600, 32, lr=0.01, constant=0.99)  # no anneal: what is left is the noise of the target
        list(trained(model, how, Regression(target), stream))
        with torch.no_grad():
            errors.append((model(x, t) - oracle(x, t)).square().mean().item())
    assert errors[1] < errors[0] / 2
