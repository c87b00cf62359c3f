import pytest
import torch
from diffusers import DDIMScheduler

from distill.grid import GRIDS, karras, trailing
from distill.schedule import EDM, VE, Cosine, Flow, LinearVP, Table


def table(**options):
    return Table(tuple(DDIMScheduler(**options).alphas_cumprod.double().tolist()))


SCHEDULES = [Flow(), Cosine(), LinearVP(), VE(), EDM(), table(rescale_betas_zero_snr=True), table()]


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("steps", [1, 2, 5, 18])
def test_grids_fall_from_t_max_to_the_data(name, schedule, steps):
    times = GRIDS[name](schedule, steps)
    assert times.dtype == torch.float64 and len(times) == steps + 1
    assert times[0] == schedule.t_max and times[-1] == schedule.t_clean
    assert (times.diff() < 0).all()


def test_karras_is_equation_5_of_karras_et_al():
    i = torch.arange(18, dtype=torch.float64)
    expected = (80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    assert torch.allclose(karras(EDM(), 18)[:-1], expected)


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 8, 30])
def test_trailing_visits_the_indices_of_diffusers(steps):
    scheduler = DDIMScheduler(timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    indices = (trailing(table(), steps)[:-1] * 1000).round().long() - 1
    assert indices.tolist() == scheduler.timesteps.tolist()
