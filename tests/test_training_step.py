"""What makes a step cheap leaves its result: the fused optimizer, channels last, guidance in one call, bf16 teachers."""

import itertools
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from conftest import refuses
from torch import nn

import teachers
from distill import files
from distill.denoiser import Denoiser, Guided, Rescheduled, under_autocast
from distill.device import lay_out
from distill.regression import Regression
from distill.resume import Resumable, gather_state, restore_state
from distill.rng import Rng, seed_of
from distill.schedule import Cosine, Flow
from distill.train import Optimization, train
from recipes import consistency, progressive
from recipes import teacher as teacher_recipe
from teachers.experts import Experts
from teachers.oracle import Gaussian
from teachers.students import untrained

CPU = torch.device("cpu")


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(
            nn.Conv2d(3, 128, 3, padding=1), nn.GroupNorm(2, 128), nn.SiLU(), nn.Conv2d(128, 8, 1), nn.Conv2d(8, 3, 3)
        )
        self.time = nn.Linear(1, 3)

    def forward(self, x, t):
        return self.body(nn.functional.pad(x, (1, 1, 1, 1))) + self.time(t[:, None])[..., None, None]


def batches(step):
    for k in itertools.count(step):
        yield torch.randn(16, 3, 6, 6, generator=torch.Generator().manual_seed(k)), {}


def trained(o, steps=None, **kwargs):
    model = Denoiser(Convolutions(), Cosine())
    list(itertools.islice(train(Regression(), model, batches, Accelerator(cpu=True), o, seed=0, phase="p", **kwargs), steps))
    return torch.cat([p.detach().flatten() for p in model.net.parameters()])


HOW = Optimization(images=8 * 16, batch_size=16, lr=0.01, weight_decay=0.1, ema_halflife_images=64)


# -- the optimizer -----------------------------------------------------------------------------------------------------------------
def test_training_is_adamw_of_contiguous_weights_one_by_one():
    model = Denoiser(Convolutions(), Cosine())
    adam = torch.optim.AdamW(model.net.parameters(), weight_decay=0.1, foreach=False)
    for step, (x0, _) in zip(range(HOW.steps), batches(0), strict=False):
        adam.param_groups[0]["lr"] = HOW.lr_at(step)
        rng = Rng.seeded(seed_of(0, "p", step), CPU, 16, slice(0, 16))
        Regression()(model, x0, rng=rng, progress=step / HOW.steps).mean().backward()
        nn.utils.clip_grad_norm_(model.net.parameters(), 1.0)
        adam.step()
        adam.zero_grad()
    expected = torch.cat([p.detach().flatten() for p in model.net.parameters()])
    assert torch.allclose(trained(HOW), expected, atol=2e-5)
    assert not torch.allclose(Convolutions().body[0].weight.flatten(), expected[: 128 * 27], atol=1e-2)


def test_convolutions_continue_from_a_checkpoint_to_the_same_bits(tmp_path):
    """A fused optimizer pairs numbers by their place in memory: a restored moment of other strides would be another moment."""
    whole = trained(HOW)
    kept = {"resumable": Resumable(tmp_path), "save_every_images": 3 * 16}
    trained(HOW, steps=4, **kept)
    assert torch.equal(trained(HOW, **kept), whole)


def test_the_state_of_an_optimizer_that_is_not_fused_continues_in_a_fused_one():
    """So do checkpoints of older versions."""
    nets, saved = [], {}
    grads = [torch.randn(3, 128, 3, 3, generator=torch.Generator().manual_seed(k)) for k in range(4)]
    for fused in (False, True):
        net = lay_out(nn.Conv2d(128, 3, 3, bias=False), CPU) if fused else nn.Conv2d(128, 3, 3, bias=False)
        adam = torch.optim.AdamW(net.parameters(), lr=0.1, fused=fused)
        if fused:
            restore_state(saved, net, adam, None)
        else:
            torch.manual_seed(0)
        for grad in grads[2 * fused :]:
            net.weight.grad = torch.empty_like(net.weight).copy_(grad)
            adam.step()
            if grad is grads[1]:
                saved = {name: value.clone() for name, value in gather_state(net, adam, None).items()}
        nets.append(net)
    assert torch.allclose(nets[0].weight, nets[1].weight, atol=1e-6)


# -- channels last -----------------------------------------------------------------------------------------------------------------
def test_a_network_with_channels_last_gives_the_same_images_gradients_and_files(tmp_path):
    model = untrained((1, 8, 8), 10, (8, 128), 1, seed=0)
    laid = replace(model, denoiser=model.student())
    plain = replace(model, denoiser=model.student())
    assert laid.to(CPU) is laid
    weights = [m.weight for m in laid.denoiser.net.modules() if isinstance(m, nn.Conv2d)]
    assert weights and all(w.stride()[1] == 1 and w.stride()[3] == w.shape[1] for w in weights)
    x, t, labels = torch.randn(4, 1, 8, 8), torch.tensor([0.1, 0.4, 0.7, 1.0]), torch.arange(4)
    outputs = [m.denoiser(x, t, labels=labels) for m in (laid, plain)]
    assert torch.allclose(*outputs, atol=1e-5)
    for out in outputs:
        out.square().sum().backward()
    for one, two in zip(laid.denoiser.net.parameters(), plain.denoiser.net.parameters(), strict=True):
        assert torch.allclose(one.grad, two.grad, rtol=1e-4, atol=1e-4) and one.grad.stride() == one.stride()
    assert laid.fingerprint == plain.fingerprint
    for name, m in (("laid", laid), ("plain", plain)):
        teachers.save(tmp_path / name, m)
    one, two = (files.load(tmp_path / name)[0] for name in ("laid", "plain"))
    assert all(torch.equal(one[key], two[key]) and one[key].is_contiguous() for key in two)


@pytest.mark.parametrize("device, sharded", [("cuda", False), ("cpu", True)])
def test_weights_are_contiguous_on_gpus_and_where_they_are_sharded(device, sharded):
    net = lay_out(Convolutions(), CPU)
    assert not net.body[0].weight.is_contiguous()
    lay_out(net, torch.device(device), sharded)
    assert [p.stride() for p in net.parameters()] == [p.stride() for p in Convolutions().parameters()]


def test_weights_of_narrow_networks_stay_contiguous():
    assert all(p.is_contiguous() for p in lay_out(teachers.load("digits").denoiser.net, CPU).parameters())


# -- guidance ----------------------------------------------------------------------------------------------------------------------
class Conditional(nn.Module):
    """A network of conditions of several ranks; one of them, ``shared``, has no row per sample. Counts its calls."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.calls = nn.Linear(4, 4).double(), 0

    def forward(self, x, t, labels=None, text=None, shared=None, to=None):
        self.calls += 1
        extra = 0 if to is None else to[:, None]
        extra = extra + (0 if labels is None else labels[:, None]) + (0 if text is None else text.mean((1, 2))[:, None])
        return torch.tanh(self.body(x) + t[:, None] * extra) * (1 if shared is None else shared.sum())


NULL = {"labels": torch.tensor([9]), "text": torch.full((1, 2, 3), 0.5).double()}
LABELS, TEXT = torch.arange(5), torch.randn(5, 2, 3).double()
GIVEN = {
    "labels": ({"labels": LABELS}, {"labels": NULL["labels"]}, 1),
    "ranks": ({"labels": LABELS, "text": TEXT}, NULL, 1),
    "more than the null": ({"labels": LABELS, "text": TEXT}, {"labels": NULL["labels"]}, 1),
    "not per sample": ({"labels": LABELS, "shared": torch.tensor([0.3, 0.4])}, {"labels": NULL["labels"]}, 1),
    "a number": ({"labels": LABELS, "shared": torch.tensor(0.3)}, {"labels": NULL["labels"]}, 1),
    "none": ({}, {"labels": NULL["labels"]}, 2),
    "other lengths": ({"labels": LABELS, "text": torch.randn(5, 4, 3).double()}, NULL, 2),
}


@pytest.mark.parametrize("to", [None, torch.tensor(0.1), torch.linspace(0, 0.2, 5)], ids=["one time", "number", "per sample"])
@pytest.mark.parametrize("t", [torch.tensor(0.5), torch.linspace(0.3, 0.9, 5)], ids=["number", "per sample"])
@pytest.mark.parametrize("name", GIVEN)
def test_guidance_is_one_call_that_equals_two(name, t, to):
    cond, null, calls = GIVEN[name]
    net, x = Conditional(), torch.randn(5, 4).double()
    denoiser = Denoiser(net, Flow())
    with_null = cond | {k: v.expand(5, *v.shape[1:]) for k, v in null.items()}
    one, other = denoiser(x, t, to=to, **cond), denoiser(x, t, to=to, **with_null)
    net.calls = 0
    assert torch.allclose(Guided(denoiser, null, 2.5)(x, t, to=to, **cond), other + 2.5 * (one - other), atol=1e-6)
    assert net.calls == calls and not torch.allclose(one, other, atol=1e-3)


# -- precision of the teacher ------------------------------------------------------------------------------------------------------
class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(64, 64)

    def forward(self, x, t, labels=None):
        return self.body(x)


def inside(kind):
    network = Denoiser(Linear(), Flow())
    return {
        "network": network,
        "guided": Guided(network, {"labels": torch.tensor([0])}, 2.0),
        "rescheduled": Rescheduled(network, Cosine()),
        "experts": Experts(Flow(), (network, network), (0.0,)),
    }[kind]


@pytest.mark.parametrize("kind", ["network", "guided", "rescheduled", "experts"])
def test_a_teacher_in_bf16_is_within_its_rounding_and_keeps_float32_outside_of_its_network(kind):
    full = inside(kind)
    half, x, t = under_autocast(full, "bf16"), torch.randn(8, 64), torch.linspace(0.1, 0.9, 8)
    labels = torch.zeros(8, dtype=torch.long)
    one, two = full(x, t, labels=labels), half(x, t, labels=labels)
    size = 1 + x.abs().amax() * Linear().body.weight.abs().sum(1).amax()  # |F| is at most this
    assert 0 < (one - two).abs().amax() < 2 * 2**-8 * size * 1.5 and two.dtype == torch.float32
    again = half(x, t[3], labels=labels)[3]
    assert torch.allclose(again, two[3], atol=1e-5)  # a time alone multiplies as a time per sample does
    near = torch.full((8,), 1e-4)  # where x0 is x, up to 1e-4 of the network
    if kind == "network":
        assert (half(x, near) - full(x, near)).abs().amax() < 1e-4 * 2**-7 * size


def test_a_precision_that_is_not_lower_and_a_model_without_a_network_leave_the_denoiser():
    exact, network = Gaussian(Flow(), torch.zeros(2), torch.ones(2)), inside("network")
    assert under_autocast(exact, "bf16") is exact
    assert all(under_autocast(network, name) is network for name in ("no", "fp32"))


def test_the_precision_of_the_teacher_is_that_of_the_student_or_its_own():
    for mixed, own, expected in [
        ("no", "same", "no"),
        ("bf16", "same", "bf16"),
        ("bf16", "fp32", "fp32"),
        ("no", "bf16", "bf16"),
    ]:
        assert progressive.Config(mixed_precision=mixed, teacher_precision=own).autocast_of_teacher == expected
    refuses("--teacher-precision fp16: accepted are same, bf16, fp32", progressive.Config, teacher_precision="fp16")


TINY = {
    progressive: ["--start-steps", "4", "--end-steps", "2", "--images-per-stage", "32", "--batch-size", "16"],
    consistency: ["--training-images", "32", "--batch-size", "16"],
    teacher_recipe: ["--teacher", "digits", "--training-images", "32", "--batch-size", "16", "--channels", "8", "16"],
}


class Trained(Exception):
    """Ends a recipe after what a test needs."""


def without_checks(monkeypatch):
    for module in ("recipes.common.announcement", "recipes.teacher"):
        monkeypatch.setattr(f"{module}.measure_step_time", lambda *args: (0.0, 0.0))
    for module in ("recipes.common.training", "recipes.teacher"):
        monkeypatch.setattr(f"{module}.check_denoiser", lambda *args: None)
    monkeypatch.setattr("recipes.common.training.Experiment.measurement", None)  # the features of the data


def test_every_stage_of_a_ladder_has_a_teacher_of_the_precision_of_the_flag(tmp_path, monkeypatch):
    outputs, x = [], torch.randn(4, 1, 8, 8)

    def climb(config, e, student, loss, n):
        cond = {"t": torch.tensor(0.5), "labels": torch.arange(4)}
        outputs.append(torch.equal(loss.teacher(x, **cond), under_autocast(student.denoiser, "bf16")(x, **cond)))
        if n == 1:
            raise Trained
        return student, True

    without_checks(monkeypatch)
    monkeypatch.setattr(progressive, "climb", climb)
    with pytest.raises(Trained):
        progressive.main(f"--preset smoke --teacher-precision bf16 --output-dir {tmp_path / 'run'}".split())
    assert outputs == [True, True, True]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", TINY, ids=lambda recipe: recipe.__name__)
def test_a_recipe_evaluates_its_teacher_in_the_precision_of_the_flag_and_nothing_else(recipe, tmp_path, monkeypatch):
    losses = {}

    def first_loss(method, student, batches, accelerator, optimization, **kwargs):
        state = next(train(method, student, batches, accelerator, replace(optimization, lr=0.0), seed=0, phase="p"))
        losses[name] = state.loss
        raise Trained

    for module in ("recipes.common.training", "recipes.teacher"):
        monkeypatch.setattr(f"{module}.train", first_loss)
    without_checks(monkeypatch)
    for name in ("same", "fp32", "bf16"):
        with pytest.raises(Trained):
            recipe.main(["--preset", "smoke", *TINY[recipe], "--teacher-precision", name, "--output-dir", str(tmp_path / name)])
    assert torch.equal(losses["same"], losses["fp32"]) and not torch.equal(losses["bf16"], losses["fp32"])
    assert torch.allclose(losses["bf16"], losses["fp32"], rtol=0.03)


@pytest.mark.parametrize("recipe, alone", [(consistency, ["--method", "ict", "--from-scratch"]), (teacher_recipe, [])])
def test_a_precision_for_a_teacher_that_is_not_there_is_refused(recipe, alone, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        recipe.main([*alone, "--teacher-precision", "bf16", "--output-dir", str(tmp_path / "run")])
    assert end.value.code == 2 and "this run has no teacher; accepted is same" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
