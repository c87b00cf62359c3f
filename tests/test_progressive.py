import pytest
import torch
from accelerate import Accelerator
from conftest import Function
from torch import nn

from distill import grid
from distill.denoiser import Denoiser
from distill.distance import DISTANCES, WEIGHTS, PseudoHuber, l2
from distill.progressive import Progressive, steps_in_one
from distill.rng import Rng
from distill.samplers import ddim
from distill.schedule import EDM, Cosine, Flow, add_noise, move
from distill.train import Optimization, train
from teachers.oracle import Gaussian


def gaussian(schedule):
    return Gaussian(schedule, torch.tensor([0.5, -0.25]), torch.tensor([0.5, 0.2]))


def rng(n, seed=0):
    return Rng(torch.Generator().manual_seed(seed), n)


@pytest.mark.parametrize("schedule", [Cosine(), Flow(), EDM()], ids=lambda s: type(s).__name__)
def test_one_step_to_the_target_is_two_exact_solver_steps(schedule):
    oracle, times = gaussian(schedule), grid.karras(schedule, 16).float()
    for i in range(0, 16, 2):
        t, mid, s = times[i : i + 3]
        x = torch.randn(256, 2) * torch.hypot(schedule.alpha(t), schedule.sigma(t))
        target = steps_in_one(oracle, x, [t, mid, s])
        landed = move(schedule, x, target, t, s)
        exact = ddim(oracle, x.double(), times[i : i + 3].double())
        assert (landed - exact).abs().max() < 1e-5 * max(1, x.abs().max())


def test_at_the_last_step_the_target_is_the_teachers_x0_at_mid():
    oracle, schedule = gaussian(Cosine()), Cosine()
    t, mid, clean = torch.tensor(0.5), torch.tensor(0.25), torch.tensor(0.0)
    x = torch.randn(32, 2)
    x_mid = move(schedule, x, oracle(x, t), t, mid)
    assert torch.allclose(steps_in_one(oracle, x, [t, mid, clean]), oracle(x_mid, mid), atol=1e-6)


def test_the_loss_is_zero_for_the_student_that_does_two_steps_in_one():
    oracle, times = gaussian(Cosine()), grid.uniform(Cosine(), 8)
    method = Progressive(oracle, times)

    def perfect(x, t):
        i = (t[:, None] - times.float()).abs().argmin(1)
        return steps_in_one(oracle, x, [times[i + k].float() for k in range(3)])

    loss = method(Function(Cosine(), perfect), torch.randn(512, 2), rng=rng(512), progress=0.0)
    assert loss.shape == (512,) and loss.max() < 1e-6


def test_only_the_students_own_grid_is_trained_on():
    seen, method = [], Progressive(gaussian(Cosine()), grid.uniform(Cosine(), 8))
    spy = Function(Cosine(), lambda x, t: seen.append(t) or x)
    method(spy, torch.randn(400, 2), rng=rng(400), progress=0.0)
    assert sorted(set(seen[0].tolist())) == [0.25, 0.5, 0.75, 1.0]


def test_the_teacher_gets_no_gradient_and_the_student_does():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(()))

        def forward(self, x, t):
            return self.w * x

    teacher, student = (Denoiser(Scale(), Cosine(), "x0") for _ in range(2))
    Progressive(teacher, grid.uniform(Cosine(), 4))(student, torch.randn(8, 2), rng=rng(8), progress=0.0).mean().backward()
    assert teacher.net.w.grad is None and student.net.w.grad is not None


def test_weights_turn_the_x0_error_into_the_errors_of_eps_and_v():
    schedule, t = Cosine(), torch.linspace(0.1, 0.9, 5)
    x0, guess, eps = torch.randn(3, 5, 4)
    x_t = add_noise(schedule, x0, eps, t)
    a, s = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None]
    eps_guess = (x_t - a * guess) / s
    v, v_guess = a * eps - s * x0, a * eps_guess - s * guess
    x_mse, eps_mse, v_mse = l2(x0, guess), l2(eps, eps_guess), l2(v, v_guess)
    assert torch.allclose(WEIGHTS["snr"](schedule, t) * x_mse, eps_mse, rtol=1e-4)
    assert torch.allclose(WEIGHTS["snr_plus_one"](schedule, t) * x_mse, v_mse, rtol=1e-4)
    assert torch.allclose(WEIGHTS["truncated_snr"](schedule, t) * x_mse, torch.maximum(x_mse, eps_mse), rtol=1e-4)


def test_pseudo_huber_takes_the_norm_of_the_whole_image():
    x = torch.zeros(2, 3, 4, 4)
    y = torch.ones(2, 3, 4, 4) * torch.tensor([1.0, 2.0])[:, None, None, None]
    c = 0.5 * 48**0.5
    expected = torch.sqrt(torch.tensor([48.0, 192.0]) + c**2) - c
    assert torch.allclose(PseudoHuber(0.5)(x, y), expected)
    assert all(d(x, y).shape == (2,) for d in DISTANCES.values())


class AffineInTable(nn.Module):
    """A network that is exactly as rich as a Gaussian's denoiser on a fixed grid: F = w_i x + b_i, one pair a time."""

    def __init__(self, steps):
        super().__init__()
        self.steps = steps
        self.w = nn.Parameter(torch.zeros(steps + 1, 2))
        self.b = nn.Parameter(torch.zeros(steps + 1, 2))

    def forward(self, x, t):
        i = (t * self.steps).round().long()
        return self.w[i] * x + self.b[i]


@pytest.mark.slow
def test_a_ladder_on_gaussian_data_reaches_the_closed_form_map():
    schedule, start = Cosine(), 64
    oracle = gaussian(schedule)
    data = oracle.mean + oracle.std * torch.randn(4096, 2)
    teacher, steps = oracle, start
    accelerator = Accelerator(cpu=True)

    def batches(step):
        while True:
            g = torch.Generator().manual_seed(step)
            yield data[torch.randint(4096, (256,), generator=g)], {}
            step += 1

    while steps > 1:
        steps //= 2
        student = Denoiser(AffineInTable(start), schedule, "v")
        method = Progressive(teacher, grid.uniform(schedule, 2 * steps))
        optimization = Optimization(256 * 400, 256, lr=0.1)
        for _ in train(method, student, batches, accelerator, optimization, seed=0, phase=str(steps)):
            pass
        teacher = student
    x = torch.randn(1000, 2)
    ladder = ddim(teacher, x, grid.uniform(schedule, 1))
    many = ddim(oracle, x.double(), grid.uniform(schedule, start))
    flow = oracle.flow(x.double(), torch.tensor(1.0).double(), torch.tensor(0.0).double())
    assert (ladder - many).abs().max() < 0.01  # one step does what 64 did,
    assert (ladder - flow).abs().max() < 0.01 + (many - flow).abs().max()  # which is the exact map but for DDIM's own error
    assert (many - flow).abs().max() < 0.06
