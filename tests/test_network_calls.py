"""How networks are called: adapters pass both times, and a call that does not fit is refused when the network is loaded."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import teachers
from distill.sampling import Sampling
from distill.schedule import Table
from teachers.custom import wrap
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


class Net(nn.Module):
    """A network of six output channels for three. Subclasses differ in their call."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 1)
        self.scale = nn.Embedding(10, 6)

    def evaluate(self, x, t, labels):
        return self.conv(x) * self.scale(labels)[..., None, None] + t[:, None, None, None]


class Labelled(Net):
    def forward(self, x, t, labels):
        return self.evaluate(x, t, labels)


class OtherName(Net):
    def forward(self, x, t, y):
        return self.evaluate(x, t, y)[:, :3]


class TimeFirst(Net):
    def forward(self, t, x, labels):
        return self.evaluate(x, t, labels)[:, :3]


class Tuple(Net):
    def forward(self, x, t, labels):
        return (self.evaluate(x, t, labels)[:, :3],)


class Wide(Net):
    def forward(self, x, t, labels):
        return torch.cat([self.evaluate(x, t, labels)] * 2, 1)


class Unshaped(nn.Module):
    def forward(self, x, t, labels=None):
        return x * t


HOW = {"schedule": "linear_vp", "prediction": "eps", "shape": (3, 8, 8), "classes": 10}


@pytest.mark.parametrize(
    "net,reason",
    [
        (OtherName, "unexpected keyword argument 'labels'"),
        (TimeFirst, "RuntimeError"),
        (Tuple, "it returns a tuple"),
        (Wide, "it returns [2, 12, 8, 8], not [2, 3, 8, 8]"),
        (Unshaped, "RuntimeError"),
        (lambda: nn.Conv2d(3, 3, 1), "TypeError"),
    ],
)
def test_a_network_whose_call_does_not_fit_is_refused_when_it_is_loaded_in_one_line(net, reason):
    with pytest.raises(ValueError) as error:
        wrap(net(), **HOW)
    line = str(error.value)
    assert reason in line and "net(x [B, 3, 8, 8], t [B], labels=[B])" in line and "\n" not in line and len(line) < 260
    assert "def forward(self, x, t, labels): return self.net(" in line


@pytest.mark.parametrize("shape", [(2,), (3,), (3, 2), (1, 3, 3)])
def test_a_time_that_is_broadcast_along_the_sample_is_found_for_any_shape(shape):
    with pytest.raises(ValueError, match="does not fit its call"):
        wrap(Unshaped(), **HOW | {"shape": shape})


def test_the_channels_of_a_learned_variance_are_dropped_and_stay_so_in_the_file(tmp_path, monkeypatch):
    net, x, t, labels = Labelled(), torch.randn(4, 3, 8, 8), torch.tensor(0.3), torch.arange(4)
    model = wrap(net, **HOW)
    direct = replace(model.denoiser, net=lambda x, t, labels: net(x, t, labels)[:, :3])
    assert torch.equal(model.denoiser(x, t, labels=labels), direct(x, t, labels=labels))
    teachers.save(tmp_path / "m.safetensors", model)
    again = teachers.load_file(tmp_path / "m.safetensors", net=Labelled())
    assert torch.equal(again.denoiser(x, t, labels=labels), model.denoiser(x, t, labels=labels))


FACTORY = "import torch\nclass Net(torch.nn.Module):\n    def forward(self, x, t, y=None): return x\n"


def test_a_factorys_network_and_its_weights_are_called_once_when_they_are_loaded(tmp_path, monkeypatch):
    (tmp_path / "calls_once.py").write_text(FACTORY)
    monkeypatch.syspath_prepend(tmp_path)
    spec = "calls_once:Net,schedule=flow,prediction=flow,shape=3x8x8"
    assert teachers.load(spec).shape == (3, 8, 8)
    with pytest.raises(ValueError, match=r"calls_once:Net does not fit its call .* keyword argument 'labels'"):
        teachers.load(spec + ",classes=10")


def test_the_call_that_tests_a_network_is_made_with_its_own_time_input_and_without_gradients():
    class Asks(nn.Module):
        def forward(self, x, t):
            assert t.dtype == x.dtype and t.shape == x.shape[:1] and t.isfinite().all() and not torch.is_grad_enabled()
            self.t = t
            return x

    for schedule, time, expected in (("edm", "level", 0.002), ("cosine", "log_sigma", None), ("flow", "thousand_time", 1.0)):
        net = Asks()
        wrap(net, shape=(3,), schedule=schedule, prediction="x0", time=time)
        assert expected is None or torch.allclose(net.t, torch.tensor(expected))
