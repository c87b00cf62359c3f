"""Distribution matching with a second network: its rest on closed forms, and the second network as exact as the student."""

import copy
import itertools
from dataclasses import dataclass, field

import pytest
import torch
from accelerate import Accelerator
from closed_forms import ORACLE, Small, mixture, rng
from torch import nn

from distill.denoiser import Denoiser
from distill.grid import uniform
from distill.matching import Matching
from distill.regression import Regression
from distill.resume import Resumable
from distill.rng import Rng, seed_of
from distill.schedule import Cosine
from distill.second import Second, SecondTrainer, without_gradient
from distill.target import Mix
from distill.train import BatchSplit, Optimization, train
from recipes import consistency
from teachers.oracle import Gaussian

MEAN, STD = torch.tensor([0.5, -0.3]), torch.tensor([0.4, 0.8])


class Line(nn.Module):
    """A student of one step whose images are N(mean, exp(log_std)^2)."""

    def __init__(self, mean, std):
        super().__init__()
        self.mean, self.log_std = nn.Parameter(mean.clone()), nn.Parameter(std.log())

    def forward(self, x, t):
        return self.mean + self.log_std.exp() * x


@dataclass(frozen=True)
class WithNet(Gaussian):
    """The exact denoiser of the student's images, in the place of a trained one."""

    net: nn.Module = field(default_factory=nn.Identity)


def one_step(sid=None):
    begin = Denoiser(Small(), Cosine())
    return Matching(Gaussian(Cosine(), MEAN, STD), Second(begin, period=2), 1, sid)


def loss_of(method, line, seed, n=512):
    student = Denoiser(line, Cosine(), "x0")
    fake = WithNet(Cosine(), line.mean.detach(), line.log_std.detach().exp())
    return method(student, torch.zeros(n, 2), rng=rng(n, seed), progress=0.0, second=fake).mean()


@pytest.mark.parametrize("sid", [None, 1.0, 1.2])
def test_both_losses_are_at_rest_on_the_teachers_distribution_and_lead_there_from_any_other(sid):
    method = one_step(sid)
    there = Line(MEAN, STD)
    loss_of(method, there, 0).backward()
    assert max(p.grad.abs().max() for p in there.parameters()) < 1e-5
    line = Line(torch.tensor([-0.5, 0.5]), torch.tensor([1.0, 0.3]))
    optimizer = torch.optim.Adam(line.parameters(), lr=0.03)
    for step in range(250):
        optimizer.param_groups[0]["lr"] = 0.03 * (1 - step / 250)
        optimizer.zero_grad()
        loss_of(method, line, step).backward()
        optimizer.step()
    assert (line.mean - MEAN).abs().max() < 0.03 and (line.log_std - STD.log()).abs().max() < 0.05, (
        line.mean,
        line.log_std.exp(),
    )


def test_no_gradient_reaches_the_fake_denoiser_from_the_students_loss():
    method, student = one_step(1.0), Denoiser(Small(), Cosine())
    fake = Denoiser(Small(), Cosine())
    method(student, torch.zeros(8, 2), rng=rng(8), progress=0.0, second=fake).mean().backward()
    assert all(p.grad is None and p.requires_grad for p in fake.net.parameters())
    assert all(p.grad is not None for p in student.net.parameters())
    with without_gradient(fake.net):
        x = torch.ones(2, 2, requires_grad=True)
        fake(x, torch.tensor(0.5)).sum().backward()
    assert x.grad is not None


def test_images_take_every_number_of_steps_with_a_gradient_through_the_last():
    """A student that returns x0 = t: the images show at which step each sample ended."""
    student = Denoiser(Small(), Cosine())
    object.__setattr__(student, "net", lambda x, t: t[:, None].expand(len(x), 2))
    times = uniform(Cosine(), 4)
    method = Matching(ORACLE, Second(student), 4)
    x = method.images(Denoiser(student.net, Cosine(), "x0"), torch.zeros(400, 2), rng(400), {})
    ends, counts = x[:, 0].unique(return_counts=True)
    assert torch.allclose(ends.double(), times[:4].flip(0)) and counts.min() > 70


def batches(split):
    def stream(step):
        while True:
            for turn in range(split.accumulate):
                rows = Rng(torch.Generator().manual_seed(seed_of("data", step)), split.batch_size, split.rows(turn))
                yield torch.zeros(split.rows(turn).stop - split.rows(turn).start, 2) + 0 * rows.normal()[:, None], {}
            step += 1

    return stream


def trained(student, how, method, **options):
    stream = batches(BatchSplit(how.batch_size, microbatch=how.microbatch))
    return train(method, student, stream, Accelerator(cpu=True), how, seed=0, phase="p", **options)


def fresh():
    torch.manual_seed(3)
    return Denoiser(Small(), Cosine())


def weights(student):
    return torch.cat([p.detach().flatten() for p in student.net.parameters()])


def matching():
    torch.manual_seed(4)
    return Matching(ORACLE, Second(Denoiser(Small(), Cosine()), period=2), 2)


def test_a_killed_run_continues_with_the_bits_of_both_networks(tmp_path):
    how = Optimization(images=640, batch_size=64, lr=1e-3, ema_halflife_images=256)
    whole = fresh()
    list(trained(whole, how, matching()))
    first = fresh()
    resumable = Resumable(tmp_path)
    list(itertools.islice(trained(first, how, matching(), resumable=resumable, save_every_images=192), 7))
    second = fresh()
    states = list(trained(second, how, matching(), resumable=resumable, save_every_images=192))
    assert states[0].step == 7 and torch.equal(weights(second), weights(whole))


def test_microbatches_accumulate_in_both_networks():
    results = []
    for microbatch in (None, 16):
        student = fresh()
        list(trained(student, Optimization(images=256, batch_size=64, microbatch=microbatch, lr=1e-3), matching()))
        results.append(weights(student))
    assert torch.allclose(*results, atol=2e-5)


@pytest.mark.parametrize("lr", [0.0, 1e-5, 0.1])
def test_the_second_network_learns_at_its_own_rate(lr):
    """Adam's first step moves a weight by at most its learning rate, and most of them by nearly as much."""
    begin, student = Denoiser(Small(), Cosine()), fresh()
    fakes = []

    @dataclass(frozen=True)
    class Seen(Matching):
        def __call__(self, student, x0, *, second, **options):
            fakes.append(weights(second))
            return super().__call__(student, x0, second=second, **options)

    before = weights(begin)
    list(trained(student, Optimization(images=64, batch_size=64, lr=1e-3), Seen(ORACLE, Second(begin, lr=lr, period=1), 2)))
    moved = (fakes[0] - before).abs()
    assert moved.max() <= 1.01 * lr + 1e-7 and moved.median() >= 0.9 * lr - 1e-7


@pytest.mark.parametrize("progress", [0.25, 0.75, 1.0])
def test_the_rate_of_the_second_network_falls_to_zero_as_that_of_the_student_does(progress):
    begin, how = Denoiser(Small(), Cosine()), Optimization(images=64 * 100, batch_size=64)
    trainer = SecondTrainer(Matching(ORACLE, Second(begin, lr=0.1, period=1)), Accelerator(cpu=True))
    trainer.steps(fresh(), [(torch.zeros(64, 2), {}, slice(0, 64))], (0, "p", 0), 64, progress)
    moved, lr = (weights(trainer.denoiser) - weights(begin)).abs(), 0.1 * how.lr_at(round(100 * progress)) / how.lr
    assert moved.max() <= 1.01 * lr + 1e-7 and moved.median() >= 0.9 * lr - 1e-7


def energy_distance(a, b):
    return 2 * torch.cdist(a, b).mean() - torch.cdist(a, a).mean() - torch.cdist(b, b).mean()


@pytest.mark.slow
@pytest.mark.parametrize("sid", [None, 1.0])
def test_matching_makes_a_rough_student_of_one_step_draw_the_mixture(sid):
    """Beginning with the mean of the data, which is what a denoiser gives in one step."""
    torch.manual_seed(0)
    teacher = Denoiser(Small(), Cosine())
    for _ in trained(teacher, Optimization(images=256 * 500, batch_size=256, lr=4e-3), Regression(Mix(ORACLE))):
        pass
    student = Denoiser(copy.deepcopy(teacher.net), Cosine())
    z, real = torch.randn(2000, 2, generator=torch.Generator().manual_seed(5)), mixture(2000, 99)

    def distance():
        with torch.no_grad():
            return float(energy_distance(student(z, torch.ones(2000)), real))

    before = distance()
    method = Matching(ORACLE, Second(teacher, lr=2e-3, period=3), 1, sid)
    for _ in trained(student, Optimization(images=256 * 600, batch_size=256, lr=1e-3), method):
        pass
    assert distance() < before / 10, (before, distance())


def test_matching_is_for_one_step_count_and_a_teacher(refused, tmp_path):
    out = ("--output-dir", tmp_path / "run")
    line = refused(consistency.main, "--method dmd --steps 1 2", *out)
    assert "one number in --steps" in line
    line = refused(consistency.main, "--method sid --from-scratch", *out)
    assert "distils a teacher" in line
