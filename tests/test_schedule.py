import copy
import json
import math

import pytest
import torch
from conftest import refuses
from diffusers import DDIMScheduler

from distill import schedule as schedules
from distill.schedule import EDM, VE, Cosine, Flow, LinearVP, Table, Trig, add_noise, expand, explain, move


def ddim_table(**config) -> Table:
    return Table(tuple(DDIMScheduler(**config).alphas_cumprod.double().tolist()))


ZERO_SNR = ddim_table(num_train_timesteps=64, beta_schedule="squaredcos_cap_v2", rescale_betas_zero_snr=True)
LINEAR = ddim_table(beta_schedule="linear")
SCHEDULES = [Flow(), Cosine(), LinearVP(), VE(), EDM(), Trig(), ZERO_SNR, LINEAR]
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)


def times(schedule, n=101, dtype=torch.float64):
    return torch.linspace(schedule.t_min, schedule.t_max, n, dtype=dtype)


@every_schedule
def test_noise_over_signal_strictly_increases(schedule):
    assert (schedule.logsnr(times(schedule)).diff() < 0).all()


@every_schedule
def test_time_inverts_logsnr(schedule):
    t = times(schedule)
    assert torch.allclose(schedule.time(schedule.logsnr(t)), t, rtol=1e-9, atol=1e-9)


@every_schedule
def test_sigma_is_zero_and_alpha_one_at_the_clean_end(schedule):
    clean = torch.tensor(schedule.t_clean, dtype=torch.float64)
    assert schedule.sigma(clean) == 0 and schedule.alpha(clean) == 1


@pytest.mark.parametrize("schedule", [Cosine(), LinearVP(), ZERO_SNR, LINEAR], ids=lambda s: type(s).__name__)
def test_variance_preserving_schedules_have_unit_norm(schedule):
    t = times(schedule)
    assert torch.allclose(schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2, torch.ones_like(t))


def test_linear_vp_integrates_its_beta():
    schedule, t = LinearVP(), torch.tensor(0.7, dtype=torch.float64)
    grid = torch.linspace(0, 0.7, 100001, dtype=torch.float64)
    integral = torch.trapezoid(schedule.beta_min + grid * (schedule.beta_max - schedule.beta_min), grid)
    assert torch.allclose(schedule.alpha(t), torch.exp(-integral / 2))


def test_zero_terminal_snr_reaches_alpha_zero():
    for schedule in (ZERO_SNR, Flow(), Cosine()):
        assert schedule.alpha(torch.tensor(1.0, dtype=torch.float64)) == 0


@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_a_table_returns_diffusers_alphas_at_its_entries(beta_schedule, zero_snr):
    scheduler = DDIMScheduler(beta_schedule=beta_schedule, rescale_betas_zero_snr=zero_snr)
    schedule = Table(tuple(scheduler.alphas_cumprod.double().tolist()))
    t = (torch.arange(1000, dtype=torch.float64) + 1) / 1000
    assert torch.allclose(schedule.alpha(t) ** 2, scheduler.alphas_cumprod.double(), atol=1e-14)


def test_a_table_that_does_not_fall_is_refused():
    for table in ((), (0.5, 0.6), (1.0, 0.5), (0.5, -0.1)):
        refuses("fall strictly", Table, table)


@every_schedule
def test_explain_inverts_move(schedule):
    t = times(schedule, 9, torch.float32)[1:]
    s = times(schedule, 9, torch.float32)[:-1]
    x_t, x0 = torch.randn(8, 3), torch.randn(8, 3)
    x_s = move(schedule, x_t, x0, t, s)
    scale = (schedule.sigma(s) / schedule.sigma(t) * 80).clamp(min=1)[:, None]  # on VE, x0 drowns in sigma
    assert ((explain(schedule, x_t, x_s, t, s) - x0).abs() < 2e-5 * scale).all()


@every_schedule
def test_a_move_to_the_clean_end_returns_x0_and_explain_agrees(schedule):
    t, clean = torch.tensor(schedule.t_max), torch.tensor(schedule.t_clean)
    x_t, x0 = torch.randn(4, 3), torch.randn(4, 3)
    assert torch.equal(move(schedule, x_t, x0, t, clean), x0)
    assert torch.allclose(explain(schedule, x_t, x0, t, clean), x0)


def test_explain_keeps_its_digits_where_t_and_s_are_near():
    schedule, t = Cosine(), torch.tensor([0.3])
    s = t - 1e-4
    x_t, x0 = torch.randn(1, 1000), torch.randn(1, 1000)
    exact = move(schedule, x_t.double(), x0.double(), t.double(), s.double())
    error = (explain(schedule, x_t, exact.float(), t, s) - x0).abs().max()
    assert error < 3e-3  # x_s rounded to float32 leaves 1e-7 / 1e-4; a denominator of cancelling floats would leave 0.1


def test_two_moves_with_one_x0_are_one_move():
    schedule = Cosine()
    x_t, x0 = torch.randn(4, 3), torch.randn(4, 3)
    t, mid, s = torch.tensor(0.9), torch.tensor(0.6), torch.tensor(0.2)
    halfway = move(schedule, x_t, x0, t, mid)
    assert torch.allclose(move(schedule, halfway, x0, mid, s), move(schedule, x_t, x0, t, s), atol=1e-6)


def test_eps_and_x0_are_each_others_inverse_and_what_noise_was_added():
    x0, eps, t = torch.randn(5, 2), torch.randn(5, 2), torch.linspace(0.1, 0.9, 5)
    x_t = add_noise(Flow(), x0, eps, t)
    assert torch.allclose(schedules.to_eps(Flow(), x_t, x0, t), eps, atol=1e-5)
    assert torch.allclose(schedules.to_x0(Flow(), x_t, eps, t), x0, atol=1e-5)


def test_a_coefficient_multiplies_samples_not_columns_when_batch_height_and_width_are_equal():
    x = torch.ones(8, 8, 8, 8)
    scaled = expand(torch.arange(8.0), x) * x
    assert all((scaled[i] == i).all() for i in range(8))
    with pytest.raises(AssertionError):
        expand(torch.ones(3), x)


@every_schedule
def test_a_schedule_survives_json(schedule):
    assert schedules.schedule_from(json.loads(json.dumps(schedules.describe(schedule)))) == schedule


def test_unknown_schedules_and_fields_are_named():
    refuses("unknown schedule 'cosin': accepted are flow, cosine", schedules.schedule_from, "cosin")
    refuses("sigma_min", schedules.schedule_from, {"kind": "flow", "sigma_min": 1})


def test_edm_and_trig_agree_on_x_t_up_to_scale():
    """x_t / alpha is x0 + (sigma / alpha) eps on every schedule; only its clock differs."""
    logsnr = torch.tensor(0.4, dtype=torch.float64)
    ratios = [s.sigma(s.time(logsnr)) / s.alpha(s.time(logsnr)) for s in SCHEDULES]
    assert all(math.isclose(float(r), math.exp(-0.2), rel_tol=1e-6) for r in ratios)


def test_a_table_that_is_first_evaluated_in_forward_mode_keeps_nothing_of_it():
    """Its angles are computed once and kept; a tensor of the differentiation could not be copied after it."""
    table = Table((0.9, 0.5, 0.1))
    t = torch.tensor(0.5, dtype=torch.float64)
    torch.func.jvp(table.alpha, (t,), (torch.ones_like(t),))
    assert copy.deepcopy(table).alpha(t) == table.alpha(t)
