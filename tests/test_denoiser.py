import pytest
import torch
from conftest import refuses
from torch import nn

from distill.denoiser import PREDICTIONS, TIMES, Denoiser, Guided, Rescheduled
from distill.schedule import EDM, VE, Cosine, Flow, LinearVP, Table, Trig, add_noise
from teachers.oracle import Gaussian


class Says(nn.Module):
    """A network that returns a given output and records its input."""

    def __init__(self, output):
        super().__init__()
        self.output = output

    def forward(self, x, t, **cond):
        self.x, self.t = x, t
        return self.output


def outputs(prediction, schedule, x0, eps, t):
    """What a perfect network of each kind would say, by the definition of the prediction."""
    a, s = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None]
    x_t = a * x0 + s * eps
    return {
        "x0": x0,
        "eps": eps,
        "v": a * eps - s * x0,
        "score": -eps / s,
        "flow": eps - x0,
        "edm": (x0 - a * 0.25 / (s**2 + a**2 * 0.25) * x_t) * (s**2 + a**2 * 0.25).sqrt() / (s * 0.5),
    }[prediction]


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("schedule", [Flow(), Cosine(), LinearVP(), EDM(), VE(), Trig()], ids=lambda s: type(s).__name__)
def test_a_perfect_network_of_any_prediction_gives_back_x0(prediction, schedule):
    if prediction in ("eps", "score") and isinstance(schedule, (Flow, Cosine, Trig)):
        refuses("divides by alpha", Denoiser, nn.Identity(), schedule, prediction)
        return
    t = torch.linspace(schedule.t_min, schedule.t_max, 7, dtype=torch.float64)[1:-1]
    x0, eps = torch.randn(5, 3).double(), torch.randn(5, 3).double()
    denoiser = Denoiser(Says(outputs(prediction, schedule, x0, eps, t)), schedule, prediction)
    assert torch.allclose(denoiser(add_noise(schedule, x0, eps, t), t), x0, atol=1e-6)


def test_edm_preconditioning_is_table_1_of_karras_et_al():
    sd, sigma = 0.5, torch.tensor([0.1, 1.0, 40.0])
    c_in, c_skip, c_out = PREDICTIONS["edm"](torch.ones(3), sigma, sd)
    assert torch.allclose(c_skip, sd**2 / (sigma**2 + sd**2))
    assert torch.allclose(c_out, sigma * sd / (sigma**2 + sd**2).sqrt())
    assert torch.allclose(c_in, 1 / (sigma**2 + sd**2).sqrt())
    net = Says(torch.zeros(3, 2))
    Denoiser(net, EDM(), "edm", "log_sigma")(torch.ones(3, 2), sigma)
    assert torch.allclose(net.t, sigma.log() / 4, atol=1e-6)
    assert torch.allclose(net.x, c_in[:, None] * torch.ones(3, 2))


def test_the_time_input_of_a_table_model_is_the_index_of_its_entry():
    net = Says(torch.zeros(3, 2))
    schedule = Table(tuple(torch.linspace(0.999, 0.001, 1000).double().tolist()))
    Denoiser(net, schedule, "v", "index")(torch.zeros(3, 2), torch.tensor([1.0, 0.5, 0.001]))
    assert torch.allclose(net.t, torch.tensor([999.0, 499.0, 0.0]), atol=1e-3)


def test_time_is_expanded_to_the_batch():
    net = Says(torch.zeros(3, 2))
    for time in TIMES.keys() - {"index"}:
        Denoiser(net, Cosine(), "v", time)(torch.zeros(3, 2), torch.tensor(0.5))
        assert net.t.shape == (3,) and net.t.dtype == torch.float32


@pytest.mark.parametrize("inner", [Flow(), EDM(), LinearVP(), Trig(), VE()], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("outer", [Flow(), EDM(), Cosine()], ids=lambda s: type(s).__name__)
def test_changing_the_schedule_leaves_the_posterior_mean(inner, outer):
    mean, std = torch.tensor([0.3, -1.0]).double(), torch.tensor([0.5, 1.5]).double()
    t = outer.time(torch.linspace(-5, 5, 6, dtype=torch.float64))
    x_t = torch.randn(6, 2).double()
    found = Rescheduled(Gaussian(inner, mean, std), outer)(x_t, t)
    assert torch.allclose(found, Gaussian(outer, mean, std)(x_t, t), atol=1e-9)


class ByLabel(nn.Module):
    def forward(self, x, t, labels):
        return labels[:, None].float().expand_as(x)


def test_guidance_is_null_plus_scale_times_the_difference():
    denoiser = Denoiser(ByLabel(), Cosine(), "x0")
    guided = Guided(denoiser, {"labels": torch.tensor([10])}, 3.0)
    out = guided(torch.zeros(2, 4), torch.tensor(0.5), labels=torch.tensor([1, 2]))
    assert torch.equal(out[:, 0], torch.tensor([10 + 3 * (1 - 10.0), 10 + 3 * (2 - 10.0)]))


def test_wrong_names_and_pairs_are_refused_with_what_is_accepted():
    refuses("unknown prediction 'epsilon': accepted are x0, eps", Denoiser, nn.Identity(), Flow(), "epsilon")
    refuses("divides by alpha", Denoiser, nn.Identity(), Flow(), "eps")
    refuses("unknown time convention", Denoiser, nn.Identity(), Flow(), "v", "sigma")
    refuses("needs a schedule of kind 'table'", Denoiser, nn.Identity(), Flow(), "v", "index")


@pytest.mark.parametrize("inner", [EDM(), VE(), Cosine()], ids=["EDM", "VE", "Cosine"])
@pytest.mark.parametrize("outer", [Cosine(), Flow()], ids=["Cosine", "Flow"])
def test_pure_noise_is_clamped_to_t_max_of_a_denoiser_without_it(inner, outer):
    """Where alpha is 0 there is no time of equal log-SNR; the answer is near the mean of the data, of deviation 1 here."""
    x0 = Rescheduled(Gaussian(inner, torch.full((2,), 0.5), torch.ones(2)), outer)(torch.randn(100, 2), torch.ones(()))
    assert torch.isfinite(x0).all() and torch.allclose(x0, torch.full((2,), 0.5), atol=0.1)
