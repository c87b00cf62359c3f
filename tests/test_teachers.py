import json
import math
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, refuses
from safetensors.torch import save_file
from torch import nn

import teachers
from distill.denoiser import Rescheduled
from distill.sampling import Sampling
from distill.schedule import EDM, Cosine, Flow, Table, add_noise
from teachers.custom import wrap
from teachers.export import deliver
from teachers.oracle import Gaussian, Mixture, finite
from teachers.students import with_two_times


def test_a_saved_model_is_loaded_unchanged(tmp_path, teacher):
    teachers.save(tmp_path / "m.safetensors", teacher)
    again = teachers.load(str(tmp_path / "m.safetensors"))
    x, t, labels = torch.randn(2, 1, 8, 8), torch.tensor([0.3, 0.9]), torch.tensor([3, 7])
    assert torch.equal(again.denoiser(x, t, labels=labels), teacher.denoiser(x, t, labels=labels))
    assert again.describe() == teacher.describe() and again.fingerprint == teacher.fingerprint
    assert again.denoiser.schedule == teacher.denoiser.schedule


class ByLabel(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(2.0))

    def forward(self, x, t, y=None):
        return self.w * x + (0 if y is None else y[:, None])


def test_a_module_object_is_a_teacher_and_is_loaded_into_a_module_of_the_caller(tmp_path):
    net, x, t, labels = ByLabel().requires_grad_(True), torch.randn(3, 2), torch.tensor(0.5), torch.arange(3)
    model = wrap(net, shape=(2,), schedule="flow", prediction="x0", classes=3, labels="y")
    assert torch.equal(model.denoiser(x, t, labels=labels), 2 * x + labels[:, None])
    assert torch.equal(model.denoiser(x, t), 2 * x)
    assert not net.training and not net.w.requires_grad and model.denoiser.schedule == Flow()
    model.denoiser.net.net.w.fill_(3.0)
    path = tmp_path / "m.safetensors"
    teachers.save(path, model)
    again = teachers.load_file(path, net=ByLabel())
    assert torch.equal(again.denoiser(x, t, labels=labels), 3 * x + labels[:, None])
    assert again.describe() == model.describe() and again.fingerprint == model.fingerprint
    plain = wrap(ByLabel(), shape=(2,), schedule=Cosine(), prediction="v")  # without an adapter
    assert plain.network == {"family": "given", "config": {"class": f"{__name__}.ByLabel"}}


def test_a_module_is_refused_where_none_is_needed_and_missed_where_one_is(tmp_path, teacher):
    mine, digits = tmp_path / "mine.safetensors", tmp_path / "digits.safetensors"
    teachers.save(mine, wrap(ByLabel(), shape=(2,), schedule="flow", prediction="x0", labels="y"))
    teachers.save(digits, teacher)
    for path, net, message in (
        (mine, None, f"needs your module {__name__}.ByLabel: use teachers.load_file"),
        (mine, nn.Linear(2, 2), "weights missing"),
        (digits, ByLabel(), "net=ByLabel: this model's file builds its own network"),
    ):
        refuses(message, teachers.load_file, path, net=net)
    refuses("no network description", teachers.save, tmp_path / "x.safetensors", replace(teacher, network=None))
    refuses("unknown schedule 'flaw': accepted are flow", wrap, ByLabel(), shape=(2,), schedule="flaw", prediction="x0")


class Scale(nn.Module):
    def __init__(self, scale=1):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(float(scale)))

    def forward(self, x, t):
        return self.scale * x


def three():
    return 3


def test_a_factory_makes_a_teacher(tmp_path):
    mine, rest = f"{__name__}:Scale", "schedule=flow,prediction=x0,shape=2"
    teacher, x = teachers.load(f"{mine},{rest},arg.scale=3"), torch.randn(4, 2)
    assert torch.equal(teacher.denoiser(x, torch.tensor(0.5)), 3 * x)
    teachers.save(tmp_path / "m.safetensors", teacher)
    assert torch.equal(teachers.load(str(tmp_path / "m.safetensors")).denoiser(x, torch.tensor(0.5)), 3 * x)
    for spec, message in {
        f"{mine},schedule=flow,shape=2": "schedule, prediction, shape are required",
        f"{mine},{rest},wrong=1": "unknown wrong",
        f"{__name__}:nothing,{rest}": "cannot import",
        f"nomodule:make,{rest}": "cannot import",
        f"{__name__}:three,{rest}": "made a int",
        f"{mine},schedule=flow,prediction=eps,shape=2": "divides by alpha",
        "nobody/nothing": "'nobody/nothing' is no folder here and cannot be fetched from the hub",
    }.items():
        refuses(message, teachers.load, spec)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(1.0))

    def forward(self, x, t, labels=None):
        return self.w * torch.tanh(x) + t[:, None].log1p() / 9


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tests")


def test_networks_of_other_code_bases_are_read_in_their_own_conventions():
    """score_sde (2011.13456): VE scores of images in [0, 1] with time input sigma, and VP eps with 999 t. EDM (2206.00364): the
    preconditioned network with sigma, and the network inside it with ln(sigma) / 4."""
    net, x = Net(), torch.randn(5, 2)
    output = lambda z, c_noise: net(z, torch.full((5,), c_noise)).detach()  # noqa: E731
    ve = teachers.load("test_teachers:Net,schedule=ve,prediction=score,time=level,range=unit,shape=2").denoiser
    sigma = 0.6  # of images in [0, 1], half of that on [-1, 1]
    unit = (x + 1) / 2
    t = ve.schedule.time_of(torch.tensor(2 * sigma))
    assert torch.allclose(ve(x, t), 2 * (unit + sigma**2 * output(unit, sigma)) - 1, atol=1e-4)
    wide = teachers.load(
        "test_teachers:Net,schedule=ve,schedule.sigma_max=348,prediction=score,time=level,range=unit,shape=2"
    ).denoiser
    assert float(wide.schedule.sigma(torch.tensor(1.0))) == pytest.approx(348)
    vp = teachers.load("test_teachers:Net,schedule=linear_vp,prediction=eps,time=thousand_time,span=999,shape=2").denoiser
    t = torch.tensor(0.4)
    alpha, s = vp.schedule.alpha(t), vp.schedule.sigma(t)
    assert torch.allclose(vp(x, t), (x - s * output(x, 999 * 0.4)) / alpha, atol=1e-4)
    whole = teachers.load("test_teachers:Net,schedule=edm,prediction=x0,time=level,shape=2").denoiser
    assert torch.allclose(whole(x, torch.tensor(7.0)), output(x, 7.0), atol=1e-5)
    inside = teachers.load("test_teachers:Net,schedule=edm,prediction=edm,time=log_sigma,sigma_data=0.7,shape=2").denoiser
    scale = (7.0**2 + 0.7**2) ** 0.5
    expected = 0.49 / scale**2 * x + 7 * 0.7 / scale * output(x / scale, math.log(7.0) / 4)
    assert torch.allclose(inside(x, torch.tensor(7.0)), expected, atol=1e-5)
    for wrong, message in (
        ("time=level,range=unit", "accepted is range=unit with prediction=score, time=level and schedule=ve or edm"),
        ("span=9", "accepted with time="),
        ("time=thousand_time,span=x", "span=x: accepted is a number"),
        ("schedule.sigma=3", "schedule ve:  ... sigma"),
        ("part=ema", "accepted together with weights=FILE"),
    ):
        refuses(message, teachers.load, "test_teachers:Net,schedule=ve,prediction=eps,shape=2," + wrong)


def test_weights_come_from_safetensors_and_from_pickles_of_tensors_alone(tmp_path):
    weights, spec = {"w": torch.tensor(3.0)}, "test_teachers:Net,schedule=flow,prediction=x0,shape=2,weights="
    save_file(weights, tmp_path / "a.safetensors")
    torch.save(weights, tmp_path / "b.pt")
    torch.save({f"module.{k}": v for k, v in weights.items()}, tmp_path / "c.pth")
    torch.save(weights | {"epoch": 3}, tmp_path / "e.pt")
    torch.save({"ema": weights, "model": {"w": torch.tensor(5.0)}, "step": 3}, tmp_path / "d.pt")
    for file in ("a.safetensors", "b.pt", "c.pth", "d.pt,part=ema", "e.pt"):
        assert float(teachers.load(f"{spec}{tmp_path}/{file}").denoiser.net.w) == 3.0
    torch.save(nn.Linear(2, 2), tmp_path / "code.pt")
    torch.save({"v": torch.ones(1)}, tmp_path / "other.pt")
    torch.save({"w": 3}, tmp_path / "number.pt")
    (tmp_path / "torn.pt").write_bytes((tmp_path / "b.pt").read_bytes()[:300])
    (tmp_path / "page.pt").write_text("<html>not found</html>")
    for file, message in {
        "code.pt": "would run code from it, which is refused; if you trust it, convert it: python -c",
        "d.pt": "no state dict None in this file; accepted are part=ema or part=model",
        "d.pt,part=best": "no state dict 'best'",
        "torn.pt": "not a complete file of tensors; accepted is a state dict as .safetensors or .pt",
        "page.pt": "not a complete file of tensors",
        "other.pt": "1 weights missing: w",
        "number.pt": "holds no tensors",
        "none.pt": "there is no such file",
    }.items():
        refuses(message, teachers.load, f"{spec}{tmp_path}/{file}")


def test_a_mixture_of_one_is_a_gaussian_and_its_mean_is_numeric():
    schedule, t = Cosine(), torch.linspace(0.1, 0.9, 5).double()
    x = torch.randn(5, 2).double()

    def mixture(*parts):
        return Mixture(schedule, *(torch.tensor(part, dtype=torch.float64) for part in parts))

    one = mixture([[0.3, -0.2]], [0.5], [1.0])
    assert torch.allclose(one(x, t), Gaussian(schedule, torch.tensor([0.3, -0.2]), torch.tensor(0.5).double())(x, t), atol=1e-7)
    two = mixture([[-1.0], [0.5]], [0.2, 0.4], [0.3, 0.7])
    z = torch.linspace(-6, 6, 20001).double()[:, None]
    prior = sum(w * torch.exp(-((z - m) ** 2) / (2 * s**2)) / s for w, m, s in ((0.3, -1.0, 0.2), (0.7, 0.5, 0.4)))
    for ti, xi in zip(t, x[:, :1]):
        weight = prior * torch.exp(-((xi - schedule.alpha(ti) * z) ** 2) / (2 * schedule.sigma(ti) ** 2))
        assert torch.allclose(two(xi[None], ti), (weight * z).sum() / weight.sum(), atol=1e-6)


def test_the_exact_denoiser_of_a_data_set_is_the_softmax_over_its_points():
    data, t = torch.randn(20, 1, 2, 2).double(), torch.tensor(0.4).double()
    x = add_noise(Cosine(), data[:3], torch.randn(3, 1, 2, 2).double(), t)
    a, s = Cosine().alpha(t), Cosine().sigma(t)
    weights = torch.softmax(-(x[:, None] - a * data[None]).flatten(2).square().sum(2) / (2 * s * s), 1)
    expected = (weights @ data.flatten(1)).reshape(3, 1, 2, 2)
    assert torch.allclose(finite(Cosine(), data)(x, t), expected)


def test_powers_of_two_steps_meet_the_entries_of_the_embedded_teachers_table(teacher):
    schedule = teacher.denoiser.schedule
    assert isinstance(schedule, Table) and schedule.steps % 64 == 0
    assert schedule.alphas_cumprod[-1] == 0 and teacher.denoiser.prediction == "v"


def test_guidance_needs_a_null_class(teacher):
    refuses("needs a teacher trained with a null class", replace(teacher, null=None).guided, 2.0)
    assert teacher.guided(1.0) is teacher.denoiser and teacher.guided(2.0).scale == 2.0


SAMPLINGS = {
    "searched": Sampling("ddim", grid="searched", steps=(3,), times={3: (1.0, 0.61, 0.3333, 0.0)}),
    "not a divisor": Sampling("ddim", steps=(5,)),
    "consistency": Sampling("consistency", steps=(3,)),
    "consistency at searched times": Sampling("consistency", grid="searched", steps=(2,), times={2: (0.99, 0.4, 0.0)}),
    "gamma 0.5": Sampling("consistency", 0.5, steps=(4,)),
    "jump": Sampling("jump", steps=(3,)),
    "gamma 0.3": Sampling("consistency", 0.3, steps=(7,)),
    "twenty steps": Sampling("consistency", 0.5, steps=(20,)),
}


@pytest.mark.slow
@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
def test_any_time_grid_is_baked_into_a_pipeline_of_stock_classes(teacher, two_times, tmp_path, sampling, stock_here):
    model = replace(two_times if sampling.two_times else teacher, sampling=sampling)
    assert deliver.export_pipelines(model, tmp_path)["pipeline"] < 1e-4
    classes = json.loads((tmp_path / "pipeline" / "model_index.json").read_text())
    assert classes["unet"] == ["diffusers", "UNet2DModel"] and classes["_class_name"] == "ConsistencyModelPipeline"


@pytest.mark.slow
def test_a_student_of_several_baked_step_counts_gets_a_pipeline_for_each(teacher, tmp_path, stock_here):
    model = replace(teacher, sampling=Sampling("consistency", steps=(1, 2, 3)))
    assert deliver.export_pipelines(model, tmp_path).keys() == {"pipeline", "pipeline-2", "pipeline-3"}


def test_a_two_time_network_starts_as_the_one_time_network_and_survives_its_file(teacher, two_times, tmp_path):
    x, t, labels = torch.randn(4, 1, 8, 8), torch.tensor([1.0, 0.7, 0.3, 0.1]), torch.arange(4)
    same = with_two_times(teacher)
    assert torch.equal(same.denoiser(x, t, t / 2, labels=labels), teacher.denoiser(x, t, labels=labels))
    model = two_times
    teachers.save(tmp_path / "t.safetensors", model)
    again = teachers.load(str(tmp_path / "t.safetensors"))
    here, there = (m.denoiser(x, t, t / 2, labels=labels) for m in (model, again))
    assert torch.equal(here, there) and not torch.allclose(here, model.denoiser(x, t, labels=labels), atol=1e-3)
    refuses("has one time input", teacher.denoiser, x, t, t / 2, labels=labels)


def test_the_end_of_a_jump_is_converted_to_the_networks_own_time(two_times):
    """On another schedule, the network is evaluated at the same noise levels."""
    denoiser = two_times.denoiser
    flow, x, labels = Rescheduled(denoiser, Flow()), torch.randn(4, 1, 8, 8), torch.arange(4)
    t, s = torch.tensor([0.9, 0.6, 0.4, 0.2]), torch.tensor([0.5, 0.4, 0.0, 0.1])
    schedule = denoiser.schedule
    u, v = schedule.time(Flow().logsnr(t)), schedule.time(Flow().logsnr(s))
    scale = (torch.hypot(schedule.alpha(u), schedule.sigma(u)) / torch.hypot(1 - t, t))[:, None, None, None]
    assert torch.allclose(flow(x, t, s, labels=labels), denoiser(scale * x, u, v, labels=labels), atol=1e-5)


def test_a_two_time_network_needs_a_time_input_that_is_finite_at_the_data(teacher):
    endless = replace(teacher, denoiser=replace(teacher.denoiser, schedule=EDM(), prediction="edm", time="log_sigma"))
    refuses("finite at the data", with_two_times, endless)


def test_a_run_that_has_not_ended_names_its_students(tmp_path):
    (tmp_path / "stages" / "cd").mkdir(parents=True)
    student = tmp_path / "stages" / "cd" / "student.safetensors"
    student.touch()
    with pytest.raises(ValueError, match="a run that has not ended") as raised:
        teachers.load(str(tmp_path))
    assert str(student) in str(raised.value)
