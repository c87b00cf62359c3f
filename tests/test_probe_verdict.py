"""What the probe says of a poor teacher: where its error passes the bound, what noise and bias cost, and which table it was trained on."""

from dataclasses import replace

import pytest
import torch
from test_probe import Reexpressed, of, real  # noqa: F401 (a fixture)
from torch import nn

from distill.schedule import Table
from recipes.common.checks import check_denoiser
from recipes.data.sets import Data
from teachers.diffusers_scheduler import table_of
from teachers.digits import digits
from teachers.probe import LOST, WARN, probe
from teachers.probe_readings import STATED, tables_near

SCALED = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
LINEAR, SD, SD_ZERO = table_of({}), table_of(SCALED), table_of(SCALED | {"rescale_betas_zero_snr": True})
FEW = {"levels": 6, "samples": 16}


class Spoiled(nn.Module):
    """A network with a constant and with noise of a part of its own deviation added to its output."""

    def __init__(self, net, constant=0.0, noise=0.0):
        super().__init__()
        self.net, self.constant, self.noise = net, constant, noise

    def forward(self, x, t, labels=None):
        output = self.net(x, t, labels=labels)
        return output + self.constant + self.noise * output.std() * torch.randn_like(output)


def eps(teacher, constant=0.0):
    return of(teacher, Spoiled(Reexpressed(teacher.denoiser, LINEAR, "eps", "index"), constant), LINEAR, "eps", "index")


def test_a_constant_of_a_third_in_eps_is_refused_and_the_levels_are_named(teacher, real):  # noqa: F811
    found = probe(eps(teacher, 0.3), real.images, real.labels, **FEW)
    assert not found.ok and "no denoiser: at log-SNR -8.0 the error per pixel is" in found.verdict
    assert "(too large at -8.0 to -4.8)" in found.verdict, found.verdict


def test_a_smaller_constant_passes_with_a_warning_that_says_where_the_bound_is_passed(teacher, real):  # noqa: F811
    found = probe(eps(teacher, 0.1), real.images, real.labels, **FEW)
    ratio = torch.tensor(found.error) / torch.tensor(found.bound)
    assert found.ok and f"to {float(ratio.max()):.3g} of the bound" in found.verdict and ratio.max() > 50
    assert "of the bound (above it at log-SNR -8.0 to -4.8), its skill" in found.verdict
    assert found.warning in found.verdict and found.warning.endswith(f"at log-SNR -8.0 to -4.8, more than {WARN:g}")
    assert "\n" not in found.verdict and len(found.verdict) < 260
    plain = probe(eps(teacher), real.images, real.labels, **FEW)
    assert plain.ok and plain.warning == "" and "above" not in plain.verdict


@pytest.mark.slow
def test_the_skill_lost_to_noise_in_v_is_measured_without_the_network_it_was_added_to(teacher, real):  # noqa: F811
    """The network without the noise gives the truth: (its skill - the noisy skill) / its skill."""
    noisy = replace(teacher, denoiser=replace(teacher.denoiser, net=Spoiled(teacher.denoiser.net, noise=0.5)))
    found, clean = (probe(model, real.images, real.labels, samples=24) for model in (noisy, teacher))
    skill, lost, best = (torch.tensor(x) for x in (found.skill, found.lost, clean.skill))
    told = ~skill.isnan()
    assert 2 <= told.sum() < len(told) and torch.equal(told, ~best.isnan())
    assert torch.allclose(lost[told], (1 - skill / best)[told], atol=0.12), (lost, 1 - skill / best)
    assert found.ok and found.warning == f"{float(lost.nanmean()):.0%} of its skill lost, more than {LOST:.0%}"
    assert f"its skill {float(skill.nanmean()):.2f} of a linear denoiser's" in found.verdict
    assert clean.warning == "" and torch.tensor(clean.lost).nanmean() < 0.02


MISREAD = {
    "scaled-linear as linear": (SD, LINEAR, "eps", "table scaled_linear 0.00085 to 0.012"),
    "linear as scaled-linear": (LINEAR, SD, "eps", "table linear"),
    "zero terminal SNR as none": (SD_ZERO, SD, "v", "table with zero terminal SNR"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", MISREAD)
def test_the_table_that_a_network_was_trained_on_is_named_where_another_is_stated(teacher, real, case):  # noqa: F811
    true, stated, prediction, named = MISREAD[case]
    net = Reexpressed(teacher.denoiser, true, prediction, "index")
    wrong, right = (
        probe(of(teacher, net, table, prediction, "index"), real.images, real.labels, **FEW) for table in (stated, true)
    )
    assert not wrong.ok and wrong.best == named and f"misread: with {named} it fits" in wrong.verdict, wrong.lines()
    assert right.ok and right.best == STATED, right.lines()


def test_the_tables_that_are_tried_are_never_the_stated_one_and_have_as_many_entries():
    for stated in (LINEAR, SD, SD_ZERO, table_of({"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 128})):
        tables = [table for _, table in tables_near(stated)]
        assert tables and all(isinstance(table, Table) and table.steps == stated.steps for table in tables)
        far = [(torch.tensor(t.alphas_cumprod) - torch.tensor(stated.alphas_cumprod)).abs().max() for t in tables]
        assert min(far) > 1e-4 and (stated.alphas_cumprod[-1] == 0 or any(t.alphas_cumprod[-1] == 0 for t in tables))


@pytest.mark.slow
def test_a_recipe_passes_the_warning_on(teacher):
    data = Data("digits", *digits())
    noisy = replace(teacher, denoiser=replace(teacher.denoiser, net=Spoiled(teacher.denoiser.net, noise=0.5)))
    assert "of its skill lost, more than 10%" in str(check_denoiser(noisy, data, 0, False))
    assert check_denoiser(teacher, data, 0, False) is None
