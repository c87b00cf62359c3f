"""Options of a custom spec against the same network wrapped by hand: labels_as, order and time=reversed."""

import pytest
import torch
from conftest import ROOT, refuses
from torch import nn

import teachers
from distill.denoiser import Denoiser
from distill.schedule import Cosine, Flow
from teachers.custom import wrap
from teachers.probe import probe

MEAN, DEVIATION = 0.7, 0.6
HERE = "test_custom_options"
FLOW = "schedule=flow,prediction=flow,shape=3"


def mean_of(x, t, labels):
    """E[x0 | x_t] of Gaussian data around the label, on a flow."""
    t = t.reshape(-1, 1)
    mean = labels.reshape(-1, 1) * MEAN
    gain = (1 - t) * DEVIATION**2 / ((1 - t) ** 2 * DEVIATION**2 + t**2)
    return mean + gain * (x - (1 - t) * mean)


class Interpolant(nn.Module):
    """A velocity from noise at time 0 to data at time 1, called as (t, x, y=labels)."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(1.0))

    def velocity(self, x, noise, labels):
        return self.w * (mean_of(x, noise, labels) - x) / noise.reshape(-1, 1)

    def forward(self, t, x, y):
        return self.velocity(x, 1 - t, y)


class PositionFirst(Interpolant):
    def forward(self, x, t, y):
        return self.velocity(x, 1 - t, y)


class Plain(Interpolant):
    """From data at time 0 to noise at time 1, as this project has it."""

    def forward(self, x, t, labels):
        return -self.velocity(x, t, labels)


class Twofold(PositionFirst):
    """With a learned variance behind the velocity."""

    def forward(self, x, t, y):
        return torch.cat([super().forward(x, t, y), x.cos()], 1)


class Clean(nn.Module):
    """Estimates the data; its time is 1000 at the data."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(2.0))

    def forward(self, x, t):
        return self.w * x + t.reshape(-1, 1)


SPECS = {
    "torchcfm": f"{HERE}:Interpolant,{FLOW},classes=3,order=t,x,labels_as=y,time=reversed",
    "SiT": f"{HERE}:PositionFirst,labels_as=y,time=reversed,{FLOW},classes=3",
    "learned variance": f"{HERE}:Twofold,labels_as=y,time=reversed,{FLOW},classes=3",
    "ours": f"{HERE}:Plain,order=x,t,{FLOW},classes=3",
}


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tests")


@pytest.mark.parametrize("name", SPECS)
def test_a_network_of_another_convention_is_the_denoiser_of_the_same_network_wrapped_by_hand(name, tmp_path):
    by_hand = Denoiser(Plain(), Flow(), "flow")
    model = teachers.load(SPECS[name])
    teachers.save(tmp_path / "m.safetensors", model)
    x, t, labels = torch.randn(5, 3), torch.tensor([0.01, 0.3, 0.5, 0.9, 1.0]), torch.tensor([0, 1, 2, 1, 0])
    for found in (model, teachers.load(str(tmp_path / "m.safetensors"))):
        assert torch.allclose(found.denoiser(x, t, labels=labels), by_hand(x, t, labels=labels), atol=1e-5)
        assert torch.allclose(found.denoiser(x, t, labels=labels), mean_of(x, t, labels), atol=1e-5)


def test_the_options_are_those_of_a_module_object():
    x, t, labels = torch.randn(4, 3), torch.tensor(0.3), torch.tensor([0, 1, 2, 1])
    options = {"shape": (3,), "schedule": "flow", "prediction": "flow", "classes": 3}
    model = wrap(Interpolant(), **options, order="t,x", labels="y", time="reversed")
    assert torch.allclose(model.denoiser(x, t, labels=labels), mean_of(x, t, labels), atol=1e-5)


def test_a_reversed_time_alone_leaves_other_predictions_and_goes_up_to_the_span():
    x, t = torch.randn(4, 3), torch.tensor(0.3)
    spec = f"{HERE}:Clean,schedule=cosine,prediction=x0,shape=3,time=reversed"
    assert teachers.load(spec).denoiser.schedule == Cosine()
    for end, span in (("", 1), (",span=1000", 1000)):
        assert torch.allclose(teachers.load(spec + end).denoiser(x, t), 2 * x + 0.7 * span, atol=1e-3)


def test_the_end_of_a_jump_is_reversed_too():
    from teachers.networks.adapters import Reversed

    net = Reversed(lambda x, t, to: x + 10 * t + 100 * to, sign=-1.0)
    x, t, to = torch.zeros(1), torch.tensor([0.9]), torch.tensor([0.2])
    assert torch.allclose(net(x, t, to=to), torch.tensor([-(10 * 0.1 + 100 * 0.8)]))


def test_the_probe_finds_a_time_that_is_reversed_and_one_that_is_declared_reversed_wrongly():
    labels = torch.arange(400) % 3
    data = MEAN * labels[:, None] + DEVIATION * torch.randn(400, 3, generator=torch.Generator().manual_seed(0))
    small = {"levels": 6, "samples": 40}
    right = probe(teachers.load(SPECS["SiT"]), data, labels, **small)
    assert right.ok and right.best == "as stated"
    for spec in (SPECS["SiT"].replace("time=reversed,", ""), SPECS["ours"] + ",time=reversed"):
        found = probe(teachers.load(spec), data, labels, **small)
        assert not found.ok and "misread: with time=reversed it fits" in found.verdict


def test_options_that_do_not_fit_are_refused_in_one_line():
    for spec, message in (
        (SPECS["SiT"].replace("labels_as=y", "labels_as=z"), "does not fit its call ... labels_as=NAME"),
        (SPECS["torchcfm"].replace("order=t,x,", ""), "does not fit its call ... order=t,x"),
        (f"{HERE}:Plain,{FLOW},order=t", "order=t: accepted are x,t and t,x"),
        (f"{HERE}:Plain,{FLOW},order=x,x", "unknown x"),
        (
            f"{HERE}:Plain,schedule=edm,prediction=x0,shape=3,time=reversed",
            "accepted with a schedule whose times go from 0 to 1",
        ),
        (f"{HERE}:Plain,{FLOW},span=3", "span=3: accepted with time=thousand_time and time=reversed only"),
    ):
        assert len(refuses(message, teachers.load, spec)) < 450
