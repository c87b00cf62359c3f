"""A teacher on a discrete table is measured at diffusers' own time steps, also where the step count does not divide the table."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, EulerDiscreteScheduler
from pipelines import unet

import teachers
from distill.sampling import Sampling
from distill.schedule import Cosine, Table
from recipes.common.measurement import baselines


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddpm")
    DDPMPipeline(unet(), DDIMScheduler()).save_pretrained(folder)
    return teachers.load(str(folder))


@pytest.mark.parametrize("steps", [1, 3, 4, 7, 30, 64])
def test_the_cells_of_a_teacher_visit_the_time_steps_of_diffusers_and_name_their_grid(model, steps):
    theirs = DDIMScheduler(timestep_spacing="trailing")
    theirs.set_timesteps(steps)
    (cell,) = baselines(model, "teacher", (steps,), ("ddim",))
    assert torch.allclose(cell.times[:-1] * 1000 - 1, theirs.timesteps.double(), atol=1e-9, rtol=0)
    assert cell.sampling.grid == ("uniform" if 1000 % steps == 0 else "trailing")


@pytest.mark.parametrize("steps", [3, 7])
def test_ddim_at_such_a_step_count_is_the_sampling_of_a_diffusers_scheduler(model, steps):
    """Euler's method in sigma / alpha, whose next time is the next of its list; DDIMScheduler's is t - T // steps."""
    theirs, net = EulerDiscreteScheduler(timestep_spacing="trailing"), model.denoiser.net.unet
    theirs.set_timesteps(steps)
    (cell,) = baselines(model, "teacher", (steps,), ("ddim",))
    start = torch.randn(2, 3, 8, 8)
    x = start * (theirs.sigmas[0] ** 2 + 1) ** 0.5
    with torch.no_grad():
        for t in theirs.timesteps:
            x = theirs.step(net(theirs.scale_model_input(x, t), t).sample, t, x).prev_sample
        ours = cell.sampling.run(cell.denoiser, start, cell.times, torch.randn_like)
    assert torch.allclose(ours, x, atol=2e-5 * float(x.std()))


def test_other_grids_and_schedules_and_step_counts_that_meet_the_entries_are_left_alone():
    table = Table(tuple(torch.linspace(0.99, 0.01, 12).tolist()))
    for sampling, schedule, steps in (
        (Sampling(), table, 4),
        (Sampling(), table, 12),
        (Sampling(), table, 13),
        (Sampling(grid="logsnr"), table, 5),
        (Sampling(times={5: (1.0, 0.0)}), table, 5),
        (Sampling(), Cosine(), 5),
    ):
        assert sampling.on_entries(schedule, steps) == sampling
