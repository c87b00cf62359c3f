"""How networks are called: adapters pass both times, and a call that does not fit is refused when the network is loaded."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from distill.sampling import Sampling
from distill.schedule import Table
from teachers.export import deliver, one_step
from teachers.networks import adapters


class Recorder(nn.Module):
    """Returns x and keeps the times of its call."""

    def forward(self, x, t, to=None):
        self.times = t, to
        return x


@pytest.mark.parametrize("adapter,scale", [({"kind": "span", "span": 999.0}, 0.999), ({"kind": "unit"}, 0.5)])
def test_an_adapter_converts_the_end_of_a_jump_as_it_converts_its_start(adapter, scale):
    net, t, to = Recorder(), torch.tensor([700.0, 40.0]), torch.tensor([300.0, 0.0])
    adapted, _ = adapters.wrap(net, {}, adapter)
    adapted(torch.zeros(2, 3), t, to=to)
    assert torch.allclose(net.times[0], scale * t) and torch.allclose(net.times[1], scale * to)
    adapted(torch.zeros(2, 3), t)
    assert net.times[1] is None


def test_a_one_step_program_starts_from_the_noise_of_the_sampler_where_terminal_snr_is_not_zero(teacher):
    schedule = Table(tuple(torch.linspace(0.99, 0.2, 16).tolist()))
    model = replace(teacher, denoiser=replace(teacher.denoiser, schedule=schedule), sampling=Sampling(steps=(1,)))
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1, 2)]
    noise = torch.cat([torch.randn((1, *model.shape), generator=generator) for generator in generators])
    with torch.inference_mode():
        made = one_step.OneStep(model)(noise, torch.arange(3))
    pixels = (made / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    assert torch.allclose(pixels, deliver.own_pixels(model, 1, [0, 1, 2], [0, 1, 2]), atol=1e-5)
