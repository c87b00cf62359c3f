"""Flow maps on Gaussian data, where every jump is a closed form: each loss vanishes there, and training on a mixture reaches them."""

from dataclasses import dataclass

import pytest
import torch
from closed_forms import MEAN, ORACLE, STD, Exact, ExactJump, Small, SmallHeads, data, mixture, rng
from conftest import refuses
from torch import nn

from distill import grid
from distill.consistency import Consistency, Gap, Neighbours, ct_steps, ict_steps, inverse_gap, truncated_snr
from distill.decoding import ParallelDecoding, decoding_times
from distill.denoiser import Denoiser
from distill.distance import PseudoHuber
from distill.jumps import FLOW, GapFirst, SortedTimes, beginning
from distill.landing import Landing
from distill.meanflow import MeanFlow
from distill.midtraining import MidTraining
from distill.rng import Rng
from distill.samplers import ddim, heun, jump, path
from distill.schedule import Cosine, Schedule, add_noise
from distill.scm import ContinuousConsistency
from distill.splitting import AlphaFlow, SelfSplitting, falling, fixed
from distill.target import DataSample, Mix, teacher_of
from teachers.oracle import Gaussian
from teachers.students import untrained, with_heads

TEACHER, DATA = Mix(ORACLE, 1), DataSample()
LEARNED = {  # with the distance to the exact map that 1000 steps of 256 samples reach, and a third more
    "cd": (Consistency(TEACHER, Neighbours(lambda _: 4, grid="uniform"), truncated_snr, order=2, substeps=2), 0.13),
    "ct": (Consistency(DATA, Neighbours(ct_steps(2, 60))), 0.23),
    "ict": (Consistency(DATA, Neighbours(ict_steps(10, 80), (-1.1, 2.0)), inverse_gap, PseudoHuber()), 0.16),
    "ect": (Consistency(DATA, Gap(), inverse_gap), 0.15),
    "ect with the teacher": (Consistency(TEACHER, Gap(), inverse_gap), 0.12),
    "scd": (ContinuousConsistency(TEACHER), 0.1),
    "sct": (ContinuousConsistency(DATA), 0.16),
    "meanflow": (MeanFlow(TEACHER, power=0.0), 0.18),
    "meanflow from data": (MeanFlow(DATA), 0.22),
    "meanflow of AYF": (MeanFlow(TEACHER, GapFirst(-1, 1.4, 0, 0.5), normalised=True, warmup=0.25), 0.12),
    "cmt": (MidTraining(ORACLE), 0.12),
    "jumps by cmt": (MidTraining(ORACLE, jumps=True), 0.13),
    "lmd, jumps": (Landing(TEACHER), 0.115),
    "lmd without data, jumps": (Landing(TEACHER, data_free=True), 0.115),
    "pdd": (ParallelDecoding(TEACHER, 8), 0.2),
    "psd, jumps": (SelfSplitting(TEACHER), 0.22),
    "alpha_flow, jumps": (AlphaFlow(TEACHER), 0.17),
    "alpha_flow, normalised, jumps": (AlphaFlow(TEACHER, jumps=GapFirst(-1, 1.4, 0, 0.5), normalised=True), 0.135),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LEARNED)
def test_every_method_learns_the_map_of_a_mixture(name):
    """In one step from pure noise, root mean square distance to where 200 Heun steps of the oracle end; its own single step, the
    mean of the data, is 0.63 away."""
    method, within = LEARNED[name]
    student = Denoiser(SmallHeads() if name.startswith("pdd") else Small(), Cosine())
    optimizer = torch.optim.Adam(student.net.parameters())
    steps, batch = 1000, 256
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * (1 - step / steps)
        loss = method(student, mixture(batch, step), rng=rng(batch, step), progress=step / steps).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(student.net.parameters(), 1.0)
        optimizer.step()
    x = torch.randn(2000, 2, generator=torch.Generator().manual_seed(5))
    exact = heun(ORACLE, x.double(), grid.uniform(Cosine(), 200)).float()
    end = {"to": torch.zeros(2000)} if any(word in name for word in ("meanflow", "jumps", "pdd")) else {}
    with torch.no_grad():
        error = (student(x, torch.ones(2000), **end) - exact).square().mean().sqrt()
    assert error < within, error


def test_the_loss_of_meanflow_vanishes_on_the_exact_jumps_and_not_on_the_denoiser():
    method = MeanFlow(Mix(Gaussian(FLOW, MEAN, STD), 1), power=0)
    assert method(ExactJump(FLOW), data(500), rng=rng(500), progress=0.0).max() < 1e-6
    assert method(Gaussian(FLOW, MEAN, STD), data(500), rng=rng(500), progress=0.0).mean() > 2e-3


def test_the_normalised_tangent_of_meanflow_is_e_by_e_plus_a_tenth_for_the_plain_error_times_the_cosine_of_scm():
    """The loss is the square of the tangent, and that of power 0 is the plain error squared."""
    student = Gaussian(FLOW, MEAN, STD)
    plain, normalised = (
        MeanFlow(EXACT_TEACHER, power=0, normalised=how)(student, data(100), rng=rng(100), progress=1.0)
        for how in (False, True)
    )
    t, _ = SortedTimes()(rng(100))
    e = plain.sqrt() * torch.cos(torch.atan(t / (1 - t)))
    torch.testing.assert_close(normalised, (e / (e + 0.1)).square())


def test_the_tangent_of_meanflow_has_no_weight_at_the_start_of_its_warm_up():
    """The denoiser then loses nothing: its rate is the teacher's, and only du/dt would show that it does not jump."""
    method = MeanFlow(EXACT_TEACHER, power=0, warmup=0.5)
    losses = [method(EXACT_TEACHER.teacher, data(100), rng=rng(100), progress=at).mean() for at in (0.0, 0.25, 0.5, 1.0)]
    assert losses[0] < 1e-12 and losses[1] < 0.5 * losses[2] and losses[2] == losses[3]


def test_jumps_of_the_exact_student_land_on_the_data_in_any_number_of_steps():
    schedule, x = Cosine(), torch.randn(100, 2).double()
    exact = Exact(schedule)(x, torch.ones(100).double())
    for steps in (1, 2, 5):
        assert torch.allclose(jump(ExactJump(schedule), x, grid.uniform(schedule, steps)), exact)


EXACT_TEACHER = Mix(Gaussian(FLOW, MEAN, STD), 1)
VANISHING = {  # with the most that the exact jumps lose, and the least that the denoiser does
    "meanflow, gap first": (MeanFlow(EXACT_TEACHER, GapFirst(), power=0), 1e-6, 1e-2),
    "lmd": (Landing(EXACT_TEACHER, step=1e-3), 1e-6, 1e-2),
    "lmd without data": (Landing(EXACT_TEACHER, step=1e-3, data_free=True), 1e-6, 1e-2),
    "psd": (SelfSplitting(EXACT_TEACHER), 1e-9, 3e-3),
    "psd without data": (SelfSplitting(EXACT_TEACHER, data_free=True), 1e-9, 3e-3),
    "alpha_flow": (AlphaFlow(EXACT_TEACHER, fixed(1e-3)), 1e-6, 5e-5),
}


@pytest.mark.parametrize("name", VANISHING)
def test_the_loss_vanishes_on_the_exact_jumps_and_not_on_the_denoiser(name):
    method, most, least = VANISHING[name]
    assert method(ExactJump(FLOW), data(500), rng=rng(500), progress=0.0).max() < most
    assert method(EXACT_TEACHER.teacher, data(500), rng=rng(500), progress=0.0).mean() > least


class Droppy(nn.Module):
    """Return its input with dropout, and keep the masks."""

    def __init__(self):
        super().__init__()
        self.drop, self.masks = nn.Dropout(0.5), []

    def forward(self, x, t, to=None, head=None):
        self.masks.append(self.drop(torch.ones_like(x)))
        return x * self.masks[-1]


SHARING = {
    "meanflow": (MeanFlow(EXACT_TEACHER, power=0, jvp="finite"), 4),
    "scd": (ContinuousConsistency(EXACT_TEACHER, jvp="finite"), 4),
    "lmd": (Landing(EXACT_TEACHER), 3),
    "psd": (SelfSplitting(EXACT_TEACHER), 3),
    "alpha_flow": (AlphaFlow(EXACT_TEACHER, fixed(0.5)), 2),
    "pdd": (ParallelDecoding(EXACT_TEACHER, 8), 2),
}


@pytest.mark.parametrize("name", SHARING)
def test_all_calls_of_one_loss_drop_the_same_units_and_the_next_step_others(name):
    (method, calls), net = SHARING[name], Droppy().train()
    for _ in range(2):
        method(Denoiser(net, FLOW), data(32).float(), rng=rng(32), progress=0.9)
    assert len(net.masks) == 2 * calls
    assert all(torch.equal(mask, net.masks[0]) for mask in net.masks[:calls])
    assert not torch.equal(net.masks[0], net.masks[calls])


def test_midtraining_vanishes_on_the_exact_maps_as_its_grid_refines():
    teacher = Gaussian(Cosine(), MEAN, STD)
    for student, jumps in ((Exact(Cosine()), False), (ExactJump(Cosine()), True)):
        losses = []
        for n in (16, 64):
            method = MidTraining(teacher, steps=n, jumps=jumps)
            losses.append(method(student, data(640), rng=rng(640), progress=0.0).mean().item())
        assert losses[1] < 1e-3 and losses[0] / losses[1] > 8, losses
        assert MidTraining(teacher, jumps=jumps)(teacher, data(640), rng=rng(640), progress=0.0).mean() > 2e-3


def test_the_target_of_midtraining_is_the_end_of_the_path():
    teacher, x0 = Gaussian(Cosine(), MEAN, STD), data(16)
    method = MidTraining(teacher, steps=4, sampler=ddim)
    times = grid.GRIDS[method.grid](Cosine(), 4)
    start = add_noise(Cosine(), x0[::4], rng(16).normal(x0)[::4], times[0])
    end = ddim(teacher, start, times).repeat_interleave(4, 0)
    loss = method(Constant(Cosine()), x0, rng=rng(16), progress=0.0)
    torch.testing.assert_close(loss, end.square().mean(1))


def test_psd_regresses_samples_without_a_jump_on_the_rate_of_the_teacher():
    method = SelfSplitting(EXACT_TEACHER, apart=0.0)
    loss = method(Constant(FLOW), data(500), rng=rng(500), progress=0.0)
    assert loss.min() > 1e-9  # the student says 0 everywhere: its own jumps agree with each other
    split = SelfSplitting(EXACT_TEACHER, apart=1.0)(Constant(FLOW), data(500), rng=rng(500), progress=0.0)
    assert split.max() < 1e-12


@dataclass(frozen=True)
class Constant:
    """A student whose x0 is always 0."""

    schedule: Schedule

    def __call__(self, x_t, t, to=None, **cond):
        return torch.zeros_like(x_t)


@pytest.mark.parametrize("data_free", [False, True])
def test_midtraining_takes_every_nth_sample_so_that_processes_share_the_paths_of_one(data_free):
    method = MidTraining(Gaussian(Cosine(), MEAN, STD), steps=4, data_free=data_free)
    student = Exact(Cosine())
    whole = method(student, data(32), rng=rng(32), progress=0.0)
    halves = [
        method(student, data(32)[rows], rng=Rng(torch.Generator().manual_seed(0), 32, rows), progress=0.0)
        for rows in (slice(0, 16), slice(16, 32))
    ]
    assert whole.shape == (32,) and torch.equal(whole, torch.cat(halves))


def test_a_path_is_what_the_sampler_visits_and_its_end():
    teacher, x = Gaussian(Cosine(), MEAN, STD), torch.randn(5, 2).double()
    times = grid.uniform(Cosine(), 4)
    states = path(ddim, teacher, x, times)
    assert torch.equal(states[0], x) and torch.equal(states[-1], ddim(teacher, x, times))
    assert torch.equal(states[2], ddim(teacher, x, times[:3]))
    with pytest.raises(ValueError, match="one call per step"):
        path(heun, teacher, x, times)


def test_alpha_flow_is_flow_matching_at_one_and_meanflow_in_the_limit():
    """Of a student that is not exact. The gradient of MeanFlow's loss is the limit of alpha-Flow's gradient for alpha -> 0."""
    student, x0 = Denoiser(Small(), FLOW, "flow"), data(64).float()

    def gradient(method):
        student.net.zero_grad()
        method(student, x0, rng=rng(64), progress=0.0).mean().backward()
        return torch.cat([p.grad.flatten() for p in student.net.parameters()])

    limit = gradient(MeanFlow(EXACT_TEACHER, GapFirst(), power=0))
    errors = [(gradient(AlphaFlow(EXACT_TEACHER, fixed(a))) - limit).norm() / limit.norm() for a in (0.1, 0.01)]
    assert errors[1] < 0.02 and errors[0] > 4 * errors[1], errors
    limit = gradient(MeanFlow(EXACT_TEACHER, GapFirst(), normalised=True))
    errors = [
        (gradient(AlphaFlow(EXACT_TEACHER, fixed(a), normalised=True)) - limit).norm() / limit.norm() for a in (0.1, 0.01)
    ]
    assert errors[1] < 0.02 and errors[0] > 4 * errors[1], errors
    matching = AlphaFlow(EXACT_TEACHER, fixed(1.0))(student, x0, rng=rng(64), progress=0.0)
    again = AlphaFlow(EXACT_TEACHER, falling())(student, x0, rng=rng(64), progress=0.0)
    assert torch.equal(matching, again)


def test_the_gap_is_drawn_first_and_parts_of_the_jumps_begin_at_noise_and_end_at_the_data():
    t, s = GapFirst()(rng(20_000))
    gap = (t - s).double()
    assert (s >= 0).all() and (t <= 1).all()
    logits = torch.logit(gap)
    assert abs(float(logits.mean()) + 0.8) < 0.03 and abs(float(logits.std()) - 1) < 0.03
    share = s / (1 - gap)  # uniform in [0, 1]
    assert abs(float(share.mean()) - 0.5) < 0.01 and abs(float(share.std()) - 12**-0.5) < 0.01
    t, s = GapFirst(from_noise=0.5, to_data=0.2)(rng(20_000))
    assert abs(float((t > 1 - 1e-6).float().mean()) - 0.5) < 0.02
    assert abs(float((s == 0).float().mean()) - 0.2) < 0.02
    t, s = SortedTimes()(rng(20_000))
    assert (t >= s).all()
    GapFirst(from_noise=0.9, to_data=0.1)
    for wrong in ({"from_noise": 0.7, "to_data": 0.4}, {"to_data": -0.1}, {"deviation": 0.0}):
        refuses("sum to at most 1", lambda wrong=wrong: GapFirst(**wrong))


def test_without_data_jumps_begin_where_the_student_lands():
    t = torch.tensor([1.0, 0.5, 0.2]).double()
    x = beginning(ExactJump(FLOW), torch.full((3, 2), torch.nan).double(), t, rng(3), True, {})
    noise = rng(3).normal(torch.zeros(3, 2).double())
    assert torch.allclose(x, Gaussian(FLOW, MEAN, STD).flow(noise, torch.ones(3).double(), t), atol=1e-6)


def test_midtraining_needs_the_teacher_alone():
    refuses("--target-mix 1", lambda: teacher_of(DataSample()))
    refuses("--target-mix 1", lambda: teacher_of(Mix(ORACLE, 0.5)))
    assert teacher_of(Mix(ORACLE)) is ORACLE


def heads_of(seed=0):
    """A two-dimensional student with 8 heads on the grid of the cosine schedule, beside the network that they are copies of."""
    torch.manual_seed(seed)
    model = untrained((1, 8, 8), None, (8, 16), 1, seed)
    return model, with_heads(model, 8)


def test_a_student_with_heads_begins_as_the_model_and_jumps_by_the_mean_of_the_rates():
    model, student = heads_of()
    x, t = torch.randn(5, 1, 8, 8), torch.tensor([1.0, 1.0, 0.5, 0.25, 0.125])
    for to in (None, torch.zeros(5)):
        assert torch.allclose(student.denoiser(x, t, to=to), model.denoiser(x, t), atol=1e-5)
    last = student.denoiser.net.unet.conv_out
    with torch.no_grad():
        last.conv.weight.normal_(std=0.1)
        last.conv.bias.normal_()
    times, straight = decoding_times(student.denoiser.schedule, 8)
    start, end = times[2].float(), times[6].float()
    single = [student.denoiser(x, start, head=torch.full((5,), i)) for i in range(2, 6)]
    shares = (straight[2:6] - straight[3:7]) / (straight[2] - straight[6])
    mean = sum(float(share) * one for share, one in zip(shares, single, strict=True))
    assert torch.allclose(student.denoiser(x, start, to=end), mean, atol=1e-5)
    assert torch.allclose(student.denoiser(x, start), single[0], atol=1e-5)
    weight, bias = last.fused(last.weights_of(torch.tensor([511.0]), torch.tensor([-1.0]), None)[0])
    assert weight.shape == model.denoiser.net.unet.conv_out.weight.shape and bias.shape == (1,)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("data_free", [False, True])
def test_parallel_decoding_is_at_rest_where_every_head_gives_the_teachers_rate_at_its_time(data_free, order):
    """With Euler or midpoint steps of a Gaussian teacher, whose path is linear in the state at t_n: exact heads can be written down."""
    teacher, n = Gaussian(FLOW, MEAN, STD), 8
    times = decoding_times(FLOW, n)[1]

    def rates(x, first):
        out, state = [], x
        for i in range(n):
            v = (state - teacher(state, times[i])) / times[i]
            if order == 2:
                half = (times[i] + times[i + 1]) / 2
                middle = state - (times[i] - half) * v
                v = (middle - teacher(middle, half)) / half
            out.append(torch.where((first <= i)[:, None], v, torch.zeros_like(v)))
            state = torch.where((first <= i)[:, None], state - (times[i] - times[i + 1]) * v, state)
        return torch.stack(out, 1)

    class Exact:
        schedule = FLOW

        def __call__(self, x, t, to=None, head=None, **cond):
            first = (times[None, :-1] - t[:, None]).abs().argmin(1)
            u = rates(x, first)
            lengths = (times[:-1] - times[1:]).expand(len(x), n)
            low = times[1:] if head is None else None
            weights = (
                nn.functional.one_hot(head, n).double()
                if head is not None
                else (lengths * ((times[:-1] <= t[:, None] + 1e-6) & (low >= to[:, None] - 1e-6)))
            )
            mean = (weights / weights.sum(1, keepdim=True)).unsqueeze(2).mul(u).sum(1)
            return x - t[:, None] * mean

    method = ParallelDecoding(Mix(teacher), n, starts=4, order=order, data_free=data_free)
    assert method(Exact(), data(400), rng=rng(400), progress=0.0).max() < 1e-8
    assert method(WithoutHeads(teacher), data(400), rng=rng(400), progress=0.0).mean() > 1e-2


class WithoutHeads:
    """A denoiser whose heads are all the same."""

    schedule = FLOW

    def __init__(self, denoiser):
        self.denoiser = denoiser

    def __call__(self, x, t, to=None, head=None, **cond):
        return self.denoiser(x, t)
