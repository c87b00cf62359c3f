"""Networks that take their previous estimate of x0: the state of samplers, of training steps, and of files."""

from dataclasses import dataclass, field, replace
from itertools import islice, pairwise

import pytest
import torch
from accelerate import Accelerator
from conftest import here, refuses
from test_train import batches, weights
from torch import nn

import teachers
from distill import files, grid
from distill.consistency import Consistency, Neighbours
from distill.denoiser import Denoiser, Guided
from distill.distance import one
from distill.grid_search import trajectory
from distill.progressive import Progressive
from distill.regression import Regression
from distill.resume import Resumable
from distill.rng import Rng
from distill.samplers import SAMPLERS
from distill.sampling import Sampling
from distill.schedule import Cosine, move
from distill.self_conditioning import carrying, first_estimate, self_conditioned
from distill.target import Mix
from distill.train import BatchSplit, Optimization, train
from eval.generate import Counted, images
from recipes import consistency, export, progressive
from recipes import teacher as teacher_recipe
from teachers.experts import Experts
from teachers.export.deliver import check_exportable
from teachers.students import on_table, untrained, with_self_conditioning, with_two_times

X = torch.randn(6, 2, generator=torch.Generator().manual_seed(3)).double()


@dataclass(frozen=True)
class Recording:
    """A self-conditioned denoiser in closed form, x0 = (x + previous) / 2, that notes what it is given and returns."""

    schedule: Cosine = field(default_factory=Cosine)
    seen: list = field(default_factory=list)
    self_conditioned: bool = True

    def __call__(self, x_t, t, to=None, previous=None, **cond):
        out = (x_t + (0 if previous is None else previous)) / 2
        self.seen.append((previous, out))
        return out


class Net(nn.Module):
    """A small self-conditioned network."""

    self_conditioned = True

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(5, 32), nn.SiLU(), nn.Linear(32, 2))

    def forward(self, x, t, previous=None):
        return self.body(torch.cat([x, torch.zeros_like(x) if previous is None else previous, t[:, None]], 1))


def run(name, denoiser, x=X, steps=4):
    sampling = Sampling(name)
    return sampling.run(denoiser, x, sampling.times_for(denoiser.schedule, steps), torch.zeros_like)


@pytest.fixture(scope="module")
def models():
    """A network, and the same one with the input of a previous estimate; only the second has other weights there."""
    plain = untrained((1, 8, 8), 10, (8, 16), 1, 0)
    zero = with_self_conditioning(plain)
    other = with_self_conditioning(plain)
    nn.init.normal_(other.denoiser.net.net.unet.conv_in.weight[:, 1:].data, std=0.1)
    return plain, zero, other


def test_a_network_whose_added_weights_are_zero_ignores_the_previous_estimate(models):
    plain, zero, other = models
    x, t, labels = torch.randn(5, 1, 8, 8), torch.linspace(0.1, 1, 5), torch.arange(5)
    expected = plain.denoiser(x, t, labels=labels)
    assert torch.equal(zero.denoiser(x, t, labels=labels), expected)
    assert torch.equal(zero.denoiser(x, t, labels=labels, previous=torch.randn_like(x)), expected)
    assert torch.equal(other.denoiser(x, t, labels=labels), expected)
    assert not torch.allclose(other.denoiser(x, t, labels=labels, previous=torch.randn_like(x)), expected, atol=1e-2)


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name != "jump"])
def test_every_sampler_gives_each_call_exactly_the_estimate_of_the_call_before(name):
    oracle = Recording()
    run(name, oracle)
    given, returned = zip(*oracle.seen, strict=True)
    assert 4 <= len(given) <= SAMPLERS[name].calls(4) and given[0] is None
    assert all(one is other for one, other in zip(given[1:], returned, strict=False))


def test_ddim_of_a_linear_denoiser_is_the_recurrence_by_hand():
    x, previous, times = X, torch.zeros_like(X), grid.uniform(Cosine(), 4)
    for t, s in pairwise(times):
        previous = (x + previous) / 2
        x = move(Cosine(), x, previous, t, s)
    assert torch.equal(run("ddim", Recording()), x)


def test_the_state_of_one_batch_does_not_reach_the_next():
    oracle = Recording()
    first, _ = run("ddim", oracle), run("ddim", oracle, X + 5)
    assert torch.equal(run("ddim", oracle), first) and [given is None for given, _ in oracle.seen] == [True, *[False] * 3] * 3


def test_generated_images_do_not_depend_on_how_they_are_cut_into_batches(models):
    *_, other = models
    device = torch.device("cpu")
    (both,) = images(other, Sampling(), 3, [range(8)], 0, device)
    one, two = images(other, Sampling(), 3, [range(4), range(4, 8)], 0, device)
    assert torch.allclose(torch.cat([one.images, two.images]), both.images, atol=1e-5)
    plain = replace(other, denoiser=models[0].denoiser)
    assert not torch.allclose(next(iter(images(plain, Sampling(), 3, [range(8)], 0, device))).images, both.images, atol=1e-3)


def test_the_state_is_found_through_every_wrapper_and_guidance_gives_it_to_both_halves():
    oracle = Recording()
    for wrapped in (Counted(oracle, [0]), Guided(oracle, {}, 1), Experts(Cosine(), (oracle, oracle), (0.0,))):
        assert self_conditioned(wrapped)
    assert not self_conditioned(Experts(Cosine(), (oracle, Denoiser(nn.Linear(2, 2), Cosine())), (0.0,)))
    plain = Denoiser(nn.Identity(), Cosine())
    assert carrying(plain) is plain
    denoiser = carrying(Guided(oracle, {"labels": torch.tensor([0])}, 2.0))
    x0s = [denoiser(X, torch.tensor(t), labels=torch.ones(6, dtype=torch.long)) for t in (0.9, 0.5)]
    assert torch.equal(oracle.seen[1][0], torch.cat([x0s[0], x0s[0]]))


def test_a_search_of_times_walks_with_the_state():
    times = grid.uniform(Cosine(), 5)
    assert torch.equal(trajectory(Recording(), X, times)[0][-1], run("ddim", Recording(), steps=5))


def test_a_random_half_of_a_batch_is_fed_its_own_estimate_and_the_rest_zeros():
    x, t = torch.randn(4000, 2), torch.rand(4000)
    whole = first_estimate(Recording(), x, t, Rng(torch.Generator().manual_seed(0), 4000))
    fed = whole.ne(0).any(1)
    assert 0.47 < fed.float().mean() < 0.53 and torch.equal(whole[fed], x[fed] / 2) and not whole.requires_grad
    part = first_estimate(Recording(), x[1000:], t[1000:], Rng(torch.Generator().manual_seed(0), 4000, slice(1000, 4000)))
    assert torch.equal(part, whole[1000:])
    assert first_estimate(Denoiser(nn.Identity(), Cosine()), x, t, None) is None


def taken(method, student):
    """The loss of a training step on X, and what the student got and returned: (previous, output) of each call."""
    return method(student, X, rng=Rng(torch.Generator().manual_seed(0), 6), progress=0.5), student.seen


def half_of(previous, estimate):
    fed = previous.ne(0).any(1)
    return 0 < fed.sum() < 6 and torch.equal(previous, torch.where(fed[:, None], estimate, 0.0))


def test_regression_is_on_the_output_that_the_previous_estimate_gives():
    teacher = Recording()
    loss, ((absent, estimate), (previous, out)) = taken(Regression(weight=one), Recording())
    assert absent is None and half_of(previous, estimate) and torch.equal(loss, (out - X).square().mean(1))
    _, (_, (previous, _)) = taken(Regression(Mix(teacher)), Recording())
    assert torch.equal(teacher.seen[0][0], previous)


def test_a_step_of_progressive_distillation_begins_teacher_and_student_with_one_state_and_the_teacher_carries_it():
    teacher = Recording()
    _, ((_, estimate), (previous, _)) = taken(Progressive(teacher, grid.uniform(Cosine(), 8)), Recording())
    (first, x0), (second, _) = teacher.seen
    assert half_of(previous, estimate) and torch.equal(first, previous) and torch.equal(second, x0)


def test_without_data_the_teacher_carries_its_state_along_the_whole_path_from_noise():
    teacher = Recording()
    taken(Progressive(teacher, grid.uniform(Cosine(), 4), data_free=True), Recording())
    assert teacher.seen[0][0] is None and all(b[0] is a[1] for a, b in zip(teacher.seen[:-1], teacher.seen[1:], strict=True))
    assert len(teacher.seen) == 4


@pytest.mark.parametrize("averaged", [False, True])
def test_both_ends_of_a_consistency_pair_have_one_state_and_the_teacher_carries_it(averaged):
    teacher, student = Recording(), Recording()
    average = Recording() if averaged else student
    method = Consistency(Mix(teacher), Neighbours(lambda _: 4, grid="uniform"), substeps=2, averaged=averaged)
    method(student, X, rng=Rng(torch.Generator().manual_seed(0), 6), progress=0.5, average=average)
    (_, estimate), *_, (at_t, _) = student.seen
    at_s = average.seen[0 if averaged else 1][0]
    assert half_of(at_t, estimate) and torch.equal(at_s, at_t) and torch.equal(teacher.seen[0][0], at_t)
    assert teacher.seen[1][0] is teacher.seen[0][1] and len(teacher.seen) == 2


def test_a_plain_network_is_called_and_draws_as_before():
    calls = []

    class Plain(nn.Module):
        def forward(self, x, t):
            calls.append(t)
            return x

    draws = Rng(torch.Generator().manual_seed(0), 6)
    Regression()(Denoiser(Plain(), Cosine()), X, rng=draws, progress=0.0)
    expected = Rng(torch.Generator().manual_seed(0), 6)
    expected.uniform(), expected.normal(X)
    assert len(calls) == 1 and torch.equal(draws.uniform(), expected.uniform())


def test_a_training_continues_to_the_same_bits(tmp_path):
    how = Optimization(images=8 * 64, batch_size=64, lr=0.01, ema_halflife_images=200)

    def trained(resumable=None, steps=None):
        student = Denoiser(Net(), Cosine())
        list(islice(train(
            Regression(), student, batches(BatchSplit(64)), Accelerator(cpu=True), how, seed=0, phase="p",
            resumable=resumable, save_every_images=64,
        ), steps))  # fmt: skip
        return weights(student)

    whole = trained()
    trained(Resumable(tmp_path), steps=5)
    assert torch.equal(trained(Resumable(tmp_path)), whole)
    student = Denoiser(Net(), Cosine())
    assert not torch.equal(whole, weights(student))


def test_a_file_gives_the_same_network_and_the_same_images(models, tmp_path):
    plain, _, other = models
    teachers.save(tmp_path / "m.safetensors", other)
    again = teachers.load_file(tmp_path / "m.safetensors")
    draw = [next(iter(images(m, Sampling(), 3, [range(4)], 0, torch.device("cpu")))).images for m in (other, again)]
    assert torch.equal(*draw) and again.fingerprint == other.fingerprint and self_conditioned(again.denoiser)
    teachers.save(tmp_path / "plain.safetensors", plain)
    assert files.load(tmp_path / "plain.safetensors")[1]["network"]["family"] == "unet2d"
    assert with_self_conditioning(again) is again


def test_what_cannot_carry_the_state_is_refused_in_one_line(models):
    *_, other = models
    refuses("no stock pipeline carries the previous estimate", check_exportable, replace(other, sampling=Sampling(steps=(1,))))
    refuses("no previous estimate", on_table, other)
    refuses("a two-time network can be made only of", with_two_times, other)
    refuses(
        "only to a UNet2DModel with one time",
        with_self_conditioning,
        replace(other, denoiser=Denoiser(nn.Identity(), Cosine())),
    )


@pytest.mark.slow
def test_a_self_conditioned_teacher_is_trained_sampled_and_distilled_and_its_students_are_files_alone(
    tmp_path, refused, capsys
):
    made = tmp_path / "teacher/teacher.safetensors"
    tiny = "--preset smoke --batch-size 32 --threads 1"
    here(
        teacher_recipe.main, tiny, "--channels 8 16 --training-images 64 --self-conditioning --output-dir", tmp_path / "teacher"
    )
    few = f"{tiny} --images 60 --chunk 60 --sweep-steps 1 --force --teacher {made} --output-dir"
    here(progressive.main, few, tmp_path / "p", "--start-steps 4 --images-per-stage 64")
    assert "no diffusers pipeline: no stock pipeline carries" in capsys.readouterr().out
    here(consistency.main, few, tmp_path / "c", "--method cd --training-images 64")
    for run in ("p", "c"):
        student = teachers.load(str(tmp_path / run))
        assert self_conditioned(student.denoiser) and student.network["config"]["kind"] == "self_conditioned"
        assert not (tmp_path / run / "pipeline").exists()
    weight = "net.unet.conv_in.weight"
    before, after = (files.load(path)[0][weight][:, 1:] for path in (made, tmp_path / "p/student.safetensors"))
    assert before.abs().max() > 0 and not torch.equal(before, after)  # both are trained
    line = refused(consistency.main, few, tmp_path / "no", "--method scd")
    assert "--method scd does not carry the previous estimate" in line and not (tmp_path / "no").exists()
    assert "--start cmt does not carry" in refused(consistency.main, few, tmp_path / "no", "--start cmt")
    assert "no stock pipeline carries" in refused(export.main, "--model", tmp_path / "p", "--output-dir", tmp_path / "e")
