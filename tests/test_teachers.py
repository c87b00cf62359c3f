import json
import math
import sys
from dataclasses import replace

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from torch import nn

import teachers
from distill.denoiser import Rescheduled
from distill.schedule import EDM, Cosine, Flow, Table, add_noise
from teachers.oracle import Gaussian, Mixture, finite
from teachers.unet import with_two_times


def small_unet(**options):
    return UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"), **options,
    )  # fmt: skip


@pytest.mark.parametrize("pipeline, scheduler", [(DDPMPipeline, DDPMScheduler), (DDIMPipeline, DDIMScheduler)])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("betas", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_a_pipeline_folder_gives_its_schedulers_pred_original_sample(tmp_path, pipeline, scheduler, prediction, betas):
    unet = small_unet().eval()
    pipeline(unet, scheduler(prediction_type=prediction, beta_schedule=betas)).save_pretrained(tmp_path)
    teacher = teachers.load(str(tmp_path))
    assert teacher.shape == (3, 8, 8) and teacher.classes is None
    theirs = DDIMScheduler(prediction_type=prediction, beta_schedule=betas, clip_sample=False)
    theirs.set_timesteps(1000)
    x = torch.randn(2, 3, 8, 8)
    for index in (0, 300, 900):
        with torch.no_grad():
            expected = theirs.step(unet(x, index).sample, index, x).pred_original_sample
            got = teacher.denoiser(x, torch.tensor((index + 1) / 1000, dtype=torch.float64))
        assert torch.allclose(got, expected, rtol=1e-4, atol=1e-3)


def test_class_labels_reach_a_conditional_pipelines_network(tmp_path):
    DDPMPipeline(small_unet(num_class_embeds=5), DDPMScheduler()).save_pretrained(tmp_path)
    teacher = teachers.load(str(tmp_path))
    x, t = torch.randn(1, 3, 8, 8), torch.tensor(0.5)
    a, b = (teacher.denoiser(x, t, **teacher.condition(torch.tensor([c]))) for c in (0, 4))
    assert teacher.classes == 5 and not torch.allclose(a, b)


def test_a_saved_model_comes_back_whole(tmp_path, teacher):
    teachers.save(tmp_path / "m.safetensors", teacher)
    again = teachers.load(str(tmp_path / "m.safetensors"))
    x, t, labels = torch.randn(2, 1, 8, 8), torch.tensor([0.3, 0.9]), torch.tensor([3, 7])
    assert torch.equal(again.denoiser(x, t, labels=labels), teacher.denoiser(x, t, labels=labels))
    assert again.describe() == teacher.describe() and again.fingerprint == teacher.fingerprint
    assert again.denoiser.schedule == teacher.denoiser.schedule


def tiny(width=4):
    class Tiny(nn.Module):
        def __init__(self):
            super().__init__()
            self.c = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x, t, labels=None):
            return self.c(x) * t[:, None, None, None]

    return Tiny()


def test_any_module_is_a_teacher_through_its_factory(tmp_path, monkeypatch):
    (tmp_path / "mymodule.py").write_text(
        "import torch\n"
        "class Net(torch.nn.Module):\n"
        "    def __init__(self, scale):\n        super().__init__(); self.scale = torch.nn.Parameter(torch.tensor(float(scale)))\n"
        "    def forward(self, x, t):\n        return self.scale * x\n"
        "def make(scale=1): return Net(scale)\n"
        "def wrong(): return 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    teacher = teachers.load("mymodule:make,schedule=flow,prediction=x0,shape=2,arg.scale=3")
    x = torch.randn(4, 2)
    assert torch.equal(teacher.denoiser(x, torch.tensor(0.5)), 3 * x)
    teachers.save(tmp_path / "m.safetensors", teacher)
    assert torch.equal(teachers.load(str(tmp_path / "m.safetensors")).denoiser(x, torch.tensor(0.5)), 3 * x)
    for spec, message in {
        "mymodule:make,schedule=flow,shape=2": "schedule, prediction and shape must be named",
        "mymodule:make,schedule=flow,prediction=x0,shape=2,wrong=1": "unknown wrong",
        "mymodule:nothing,schedule=flow,prediction=x0,shape=2": "cannot import",
        "nomodule:make,schedule=flow,prediction=x0,shape=2": "cannot import",
        "mymodule:wrong,schedule=flow,prediction=x0,shape=2": "made a int",
        "mymodule:make,schedule=flow,prediction=eps,shape=2": "divides by alpha",
    }.items():
        with pytest.raises(ValueError, match=message):
            teachers.load(spec)


NETS = (
    "import torch\n"
    "class Net(torch.nn.Module):\n"
    "    def __init__(self):\n        super().__init__(); self.w = torch.nn.Parameter(torch.tensor(1.0))\n"
    "    def forward(self, x, t, labels=None):\n        return self.w * torch.tanh(x) + t[:, None].log1p() / 9\n"
)


@pytest.fixture()
def factory(tmp_path, monkeypatch):
    """A module of nets.Net with the weight 3, and its state dict."""
    (tmp_path / "nets.py").write_text(NETS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "nets", raising=False)
    return {"w": torch.tensor(3.0)}


def test_networks_of_other_code_bases_are_read_by_their_own_conventions(factory):
    """score_sde (Song et al. 2021): VE scores of images in [0, 1], told sigma, and VP eps, told 999 t; Karras et al. 2022: their whole
    preconditioned network, told sigma, and its inside, told ln(sigma) / 4."""
    from nets import Net

    net, x = Net(), torch.randn(5, 2)
    tell = lambda z, told: net(z, torch.full((5,), told)).detach()  # noqa: E731
    ve = teachers.load("nets:Net,schedule=ve,prediction=score,time=level,range=unit,shape=2").denoiser
    sigma = 0.6  # of images in [0, 1], half of that on [-1, 1]
    unit = (x + 1) / 2
    t = ve.schedule.time(-2 * torch.tensor(2 * sigma).log())
    assert torch.allclose(ve(x, t), 2 * (unit + sigma**2 * tell(unit, sigma)) - 1, atol=1e-4)
    wide = teachers.load("nets:Net,schedule=ve,schedule.sigma_max=348,prediction=score,time=level,range=unit,shape=2").denoiser
    assert float(wide.schedule.sigma(torch.tensor(1.0))) == pytest.approx(348)
    vp = teachers.load("nets:Net,schedule=linear_vp,prediction=eps,time=thousand_time,span=999,shape=2").denoiser
    t = torch.tensor(0.4)
    alpha, s = vp.schedule.alpha(t), vp.schedule.sigma(t)
    assert torch.allclose(vp(x, t), (x - s * tell(x, 999 * 0.4)) / alpha, atol=1e-4)
    whole = teachers.load("nets:Net,schedule=edm,prediction=x0,time=level,shape=2").denoiser
    assert torch.allclose(whole(x, torch.tensor(7.0)), tell(x, 7.0), atol=1e-5)
    inside = teachers.load("nets:Net,schedule=edm,prediction=edm,time=log_sigma,sigma_data=0.7,shape=2").denoiser
    scale = (7.0**2 + 0.7**2) ** 0.5
    expected = 0.49 / scale**2 * x + 7 * 0.7 / scale * tell(x / scale, math.log(7.0) / 4)
    assert torch.allclose(inside(x, torch.tensor(7.0)), expected, atol=1e-5)
    for wrong, message in (
        ("time=level,range=unit", "accepted is unit, with prediction=score, time=level and schedule=ve or edm"),
        ("span=9", "accepted with time="),
        ("time=thousand_time,span=x", "span=x: a number is accepted"),
        ("schedule.sigma=3", "schedule ve: .*sigma"),
        ("part=ema", "accepted with weights=FILE"),
    ):
        with pytest.raises(ValueError, match=message):
            teachers.load("nets:Net,schedule=ve,prediction=eps,shape=2," + wrong)


def test_weights_come_from_safetensors_and_from_pickles_of_tensors_alone(factory, tmp_path):
    from safetensors.torch import save_file

    spec = "nets:Net,schedule=flow,prediction=x0,shape=2,weights="
    save_file(factory, tmp_path / "a.safetensors")
    torch.save(factory, tmp_path / "b.pt")
    torch.save({f"module.{k}": v for k, v in factory.items()}, tmp_path / "c.pth")
    torch.save(factory | {"epoch": 3}, tmp_path / "e.pt")
    torch.save({"ema": factory, "model": {"w": torch.tensor(5.0)}, "step": 3}, tmp_path / "d.pt")
    for file in ("a.safetensors", "b.pt", "c.pth", "d.pt,part=ema", "e.pt"):
        assert float(teachers.load(f"{spec}{tmp_path}/{file}").denoiser.net.w) == 3.0
    torch.save(nn.Linear(2, 2), tmp_path / "code.pt")
    torch.save({"v": torch.ones(1)}, tmp_path / "other.pt")
    torch.save({"w": 3}, tmp_path / "number.pt")
    (tmp_path / "torn.pt").write_bytes((tmp_path / "b.pt").read_bytes()[:300])
    (tmp_path / "page.pt").write_text("<html>not found</html>")
    for file, message in {
        "code.pt": "which is never done here: where you trust that code, python -c .* makes a file that is accepted",
        "d.pt": "holds several state dicts, one has to be named: part=ema or part=model",
        "d.pt,part=best": "holds several state dicts",
        "torn.pt": "not a whole file of tensors; a state dict as .safetensors or .pt is accepted",
        "page.pt": "not a whole file of tensors",
        "other.pt": "1 weights missing: w",
        "number.pt": "holds no tensors",
        "none.pt": "there is no such file",
    }.items():
        with pytest.raises(ValueError, match=message) as error:
            teachers.load(f"{spec}{tmp_path}/{file}")
        assert "\n" not in str(error.value)


def test_unknown_specs_say_what_is_accepted(tmp_path):
    with pytest.raises(ValueError, match="unknown teacher 'digts': accepted are 'digits'"):
        teachers.load("digts")
    with pytest.raises(ValueError, match="unknown oracle"):
        teachers.load("oracle:delphi")
    with pytest.raises(ValueError, match="no such file"):
        teachers.load(str(tmp_path / "x.safetensors"))
    with pytest.raises(ValueError, match="no diffusers pipeline"):
        teachers.load(str(tmp_path))
    with pytest.raises(ValueError, match="cannot fetch 'nobody/nothing' from the hub"):
        teachers.load("nobody/nothing")


def test_pipelines_that_cannot_be_read_are_refused_by_what_is_wrong(tmp_path):
    DDPMPipeline(small_unet(), DDPMScheduler()).save_pretrained(tmp_path)
    config = tmp_path / "scheduler" / "scheduler_config.json"
    original = config.read_text()
    for change, message in (
        ({"prediction_type": "velocity"}, "prediction_type 'velocity'; accepted are epsilon"),
        ({"_class_name": "EulerScheduler"}, "scheduler EulerScheduler; accepted are DDPMScheduler"),
    ):
        config.write_text(json.dumps({**json.loads(original), **change}))
        with pytest.raises(ValueError, match=message):
            teachers.load(str(tmp_path))
    config.write_text(
        json.dumps({**json.loads(original), "beta_schedule": "squaredcos_cap_v2", "rescale_betas_zero_snr": True})
    )
    with pytest.raises(ValueError, match="divides by alpha"):
        teachers.load(str(tmp_path))
    config.write_text(original)
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ValueError, match="lacks its weights"):
        teachers.load(str(tmp_path))


def test_oracles_have_no_weights_to_copy():
    with pytest.raises(ValueError, match="an oracle has no network"):
        teachers.load("oracle:gaussian").student()


def test_a_mixture_of_one_is_a_gaussian_and_its_mean_is_numeric():
    schedule, t = Cosine(), torch.linspace(0.1, 0.9, 5).double()
    x = torch.randn(5, 2).double()
    one = Mixture(schedule, torch.tensor([[0.3, -0.2]]).double(), torch.tensor([0.5]).double(), torch.ones(1).double())
    assert torch.allclose(one(x, t), Gaussian(schedule, torch.tensor([0.3, -0.2]), torch.tensor(0.5).double())(x, t), atol=1e-7)
    two = Mixture(
        schedule, torch.tensor([[-1.0], [0.5]]).double(), torch.tensor([0.2, 0.4]).double(), torch.tensor([0.3, 0.7]).double()
    )
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


def test_the_embedded_teachers_table_meets_every_ladder_of_powers_of_two(teacher):
    schedule = teacher.denoiser.schedule
    assert isinstance(schedule, Table) and schedule.steps % 64 == 0
    assert schedule.alphas_cumprod[-1] == 0 and teacher.denoiser.prediction == "v"


def test_guidance_needs_a_null_class(tmp_path, teacher):
    DDPMPipeline(small_unet(num_class_embeds=5), DDPMScheduler()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="needs a teacher trained with a null class"):
        teachers.load(str(tmp_path)).guided(2.0)
    assert teacher.guided(1.0) is teacher.denoiser and teacher.guided(2.0).scale == 2.0


@pytest.mark.parametrize(
    "sampler",
    [
        {"name": "ddim", "grid": "searched", "steps": [3], "times": {"3": [1.0, 0.61, 0.3333, 0.0]}},
        {"name": "ddim", "grid": "uniform", "steps": [5]},
        {"name": "consistency", "grid": "uniform", "steps": [3]},
        {"name": "consistency", "grid": "searched", "steps": [2], "times": {"2": [0.99, 0.4, 0.0]}},
        {"name": "consistency:0.5", "grid": "uniform", "steps": [4]},
        {"name": "jump", "grid": "uniform", "steps": [3]},
        {"name": "consistency:0.3", "grid": "uniform", "steps": [7]},
        {"name": "consistency:0.5", "grid": "uniform", "steps": [20]},
    ],
    ids=[
        "searched",
        "not a divisor",
        "consistency",
        "consistency at searched times",
        "gamma 0.5",
        "jump",
        "gamma 0.3",
        "twenty steps",
    ],
)
def test_any_step_times_are_baked_into_a_pipeline_of_stock_classes(teacher, tmp_path, sampler):
    from teachers import export

    model = replace(two_timed(teacher) if sampler["name"] == "jump" else teacher, sampler=sampler)
    assert export.deliver(model, tmp_path)["pipeline"] < 1e-4
    classes = json.loads((tmp_path / "pipeline" / "model_index.json").read_text())
    assert classes["unet"] == ["diffusers", "UNet2DModel"] and classes["_class_name"] == "ConsistencyModelPipeline"


def two_timed(teacher):
    """The teacher in a network of two times that heeds the second."""
    model = with_two_times(teacher)
    torch.nn.init.normal_(model.denoiser.net.unet.time_proj.length_linear.weight, std=0.02)
    return model


def test_a_network_given_a_second_time_starts_as_it_was_and_survives_its_file(teacher, tmp_path):
    x, t, labels = torch.randn(4, 1, 8, 8), torch.tensor([1.0, 0.7, 0.3, 0.1]), torch.arange(4)
    same = with_two_times(teacher)
    assert torch.equal(same.denoiser(x, t, labels=labels, to=t / 2), teacher.denoiser(x, t, labels=labels))
    told = two_timed(teacher)
    teachers.save(tmp_path / "t.safetensors", told)
    again = teachers.load(str(tmp_path / "t.safetensors"))
    here, there = (m.denoiser(x, t, labels=labels, to=t / 2) for m in (told, again))
    assert torch.equal(here, there) and not torch.allclose(here, told.denoiser(x, t, labels=labels), atol=1e-3)
    with pytest.raises(ValueError, match="knows one time"):
        teacher.denoiser(x, t, labels=labels, to=t / 2)


def test_the_end_of_a_jump_is_told_in_the_networks_own_time(teacher):
    """Asked on another schedule, the network hears of the same noise levels."""
    told = two_timed(teacher).denoiser
    flow, x, labels = Rescheduled(told, Flow()), torch.randn(4, 1, 8, 8), torch.arange(4)
    t, s = torch.tensor([0.9, 0.6, 0.4, 0.2]), torch.tensor([0.5, 0.4, 0.0, 0.1])
    schedule = told.schedule
    u, v = schedule.time(Flow().logsnr(t)), schedule.time(Flow().logsnr(s))
    scale = (torch.hypot(schedule.alpha(u), schedule.sigma(u)) / torch.hypot(1 - t, t))[:, None, None, None]
    assert torch.allclose(flow(x, t, labels=labels, to=s), told(scale * x, u, labels=labels, to=v), atol=1e-5)


def test_a_second_time_needs_times_that_reach_the_data(teacher):
    endless = replace(teacher, denoiser=replace(teacher.denoiser, schedule=EDM(), prediction="edm", time="log_sigma"))
    with pytest.raises(ValueError, match="finite up to the data"):
        with_two_times(endless)


def test_a_student_of_several_baked_step_counts_gets_a_pipeline_for_each(teacher, tmp_path):
    from teachers import export

    model = replace(teacher, sampler={"name": "consistency", "grid": "uniform", "steps": [1, 2, 3]})
    assert export.deliver(model, tmp_path).keys() == {"pipeline", "pipeline-2", "pipeline-3"}
