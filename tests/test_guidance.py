"""Students that take the guidance scale: exact on Gaussians, equal to the teacher at first, per sample, saved, refused and exported."""

from dataclasses import dataclass, replace

import diffusers
import pytest
import torch
from conftest import refuses, words
from pipelines import text_unet

import teachers
from distill.consistency import Consistency, Neighbours
from distill.denoiser import Denoiser, Guided
from distill.guidance import AtScale, GuidanceRange, OverRange
from distill.progressive import Progressive
from distill.regression import Regression
from distill.rng import Rng
from distill.sampling import Sampling
from distill.schedule import Cosine, Schedule
from distill.target import Mix
from eval.cells import Cell
from eval.generate import counted
from eval.series import series
from eval.verdict import with_comparisons
from recipes import consistency, evaluate, guided, progressive, sample
from recipes.common.cells import cells_of
from recipes.common.guidance import measured
from teachers.conditions import Conditions
from teachers.networks.conditional import wrap
from teachers.networks.records.stable_diffusion import TextUNet
from teachers.students import untrained, with_guidance, with_heads, with_slow_time, with_two_times

RANGE = GuidanceRange(1, 4)
MEANS, VARIANCE = torch.tensor([[0.5, -0.3], [-0.4, 0.6], [0.1, 0.2]]).double(), 0.3  # of two classes, and without a class
NULL = {"labels": torch.tensor([2])}


@dataclass(frozen=True)
class Guidable:
    """Gaussian data of two classes with equal variances. E[x0 | x_t] is linear in the mean, so that guidance moves the mean alone:

    m_null + w (m_c - m_null). With ``ends`` it is the end of the path through x_t, a consistency function.
    """

    schedule: Schedule
    ends: bool = False

    def __call__(self, x_t, t, to=None, labels=None, guidance=None):
        a, s = (c.reshape(-1, 1).to(x_t) for c in self.schedule.at(t))
        w = torch.ones(1, 1) if guidance is None else guidance[:, None]
        mean = MEANS[2] + w * (MEANS[labels] - MEANS[2])
        total = a * a * VARIANCE + s * s
        gain = (VARIANCE / total).sqrt() if self.ends else a * VARIANCE / total
        return mean + gain * (x_t - a * mean)


TEACHER, EXACT = Guidable(Cosine()), Guidable(Cosine(), ends=True)
GUIDED = Guided(TEACHER, NULL, None)
X, LABELS = torch.randn(64, 2, generator=torch.Generator().manual_seed(1)).double(), torch.arange(64) % 2


def loss(method, student, rows=None):
    rng = Rng(torch.Generator().manual_seed(3), len(X), rows)
    part = rows or slice(None)
    return OverRange(method, RANGE)(student, X[part], rng=rng, progress=0.5, labels=LABELS[part])


@dataclass(frozen=True)
class Shifted:
    """A student whose scale is wrong."""

    denoiser: Guidable
    by: float = 0.5

    schedule = TEACHER.schedule

    def __call__(self, x_t, t, to=None, guidance=None, **cond):
        return self.denoiser(x_t, t, guidance=guidance + self.by, **cond)


METHODS = {  # of which the exact student is the minimum, and the loss that the solver's error leaves it
    "stage one": (Regression(Mix(GUIDED)), TEACHER, 1e-20),
    "progressive": (Progressive(GUIDED, torch.linspace(1, 0, 513).double(), substeps=512), EXACT, 1e-4),
    "stage two": (Progressive(TEACHER, torch.linspace(1, 0, 513).double(), substeps=512), EXACT, 1e-4),
    "cd": (Consistency(Mix(GUIDED), Neighbours(lambda _: 4, grid="uniform"), order=2, substeps=32), EXACT, 1e-6),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_student_that_is_exact_at_every_scale_has_no_loss_and_one_with_another_scale_has(name):
    method, student, most = METHODS[name]
    found, wrong = loss(method, student).mean(), loss(method, Shifted(student)).mean()
    assert found < most < 0.01 * wrong, (found, wrong)


def test_guidance_of_each_sample_is_the_closed_form_and_that_of_separate_calls(teacher):
    t, w = torch.rand(64).double(), torch.linspace(0, 5, 64).double()
    mixed = GUIDED(X, t, labels=LABELS, guidance=w)
    assert torch.allclose(mixed, TEACHER(X, t, labels=LABELS, guidance=w), atol=1e-12)
    x, t, labels, w = torch.randn(4, 1, 8, 8), torch.rand(4), torch.arange(4), torch.tensor([1.0, 1.5, 2.0, 4.0])
    mixed = teacher.guided_over(RANGE)(x, t, labels=labels, guidance=w)
    for i, scale in enumerate(w.tolist()):
        alone = teacher.guided(scale)(x[i : i + 1], t[i : i + 1], labels=labels[i : i + 1])
        assert torch.allclose(mixed[i : i + 1], alone, atol=1e-5)


def test_scales_are_uniform_in_the_range_and_those_of_a_part_are_those_of_the_whole_batch():
    whole = RANGE.draw(Rng.seeded(5, torch.device("cpu"), 600))
    parts = [RANGE.draw(Rng.seeded(5, torch.device("cpu"), 600, slice(i, i + 200))) for i in (0, 200, 400)]
    assert torch.equal(whole, torch.cat(parts)) and all(float(w) in RANGE for w in whole)
    assert abs(whole.mean() - 2.5) < 0.1 and abs(whole.std() - 3 / 12**0.5) < 0.05
    assert not torch.equal(whole, RANGE.draw(Rng.seeded(6, torch.device("cpu"), 600)))


def test_the_drawn_scales_replace_those_that_the_batch_has():
    def given(student, x0, *, rng, progress, **cond):
        return cond["guidance"]

    drawn = OverRange(given, RANGE)(None, X, rng=Rng.seeded(5, X.device, 64), progress=0.0, guidance=torch.ones(64))
    assert torch.equal(drawn, RANGE.draw(Rng.seeded(5, X.device, 64)))


def learning(model):
    """The model with other weights for the scale, so that it does not ignore it."""
    for name, weight in model.parametric.net.named_parameters():
        if "scale_linear" in name or "cond_proj" in name:
            torch.nn.init.normal_(weight, std=0.1)
    return model


def test_the_gradient_of_two_halves_is_that_of_the_batch(teacher):
    target, x0 = Mix(teacher.guided_over(RANGE)), torch.randn(16, 1, 8, 8)
    method, found = OverRange(Regression(target), RANGE), []
    for parts in ((slice(0, 16),), (slice(0, 8), slice(8, 16))):
        student = learning(with_guidance(teacher, RANGE)).student()
        torch.manual_seed(0)
        torch.nn.init.normal_(student.net.unet.time_proj.scale_linear.weight, std=0.1)
        for rows in parts:
            rng = Rng.seeded(2, x0.device, 16, rows)
            (method(student, x0[rows], rng=rng, progress=0.0, labels=torch.arange(16)[rows] % 10).sum() / 16).backward()
        found.append([p.grad for p in student.net.parameters()])
    assert all(torch.allclose(one, two, atol=1e-5) for one, two in zip(*found, strict=True))
    assert student.net.unet.time_proj.scale_linear.weight.grad.abs().max() > 0


FORMS = {
    "plain": lambda m: m,
    "two times": with_two_times,
    "slow": with_slow_time,
    "heads": lambda m: with_heads(m, 16),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_student_begins_as_the_teacher_to_the_bit_takes_the_scale_and_is_saved_with_its_range(teacher, form, tmp_path):
    base = FORMS[form](teacher)
    model, x, t, labels = with_guidance(base, RANGE), torch.randn(4, 1, 8, 8), torch.rand(4), torch.arange(4)
    assert torch.equal(model.guided(3.0)(x, t, labels=labels), base.denoiser(x, t, labels=labels))
    learning(model)
    one, four = (model.guided(w)(x, t, labels=labels) for w in (1.0, 4.0))
    assert (one - four).abs().max() > 1e-3
    w = torch.tensor([1.0, 4.0, 1.0, 4.0])
    mixed = model.denoiser(x, t, labels=labels, guidance=w)
    assert torch.allclose(mixed, torch.where((w == 1)[:, None, None, None], one, four), atol=1e-6)
    teachers.save(tmp_path / "s.safetensors", model)
    again = teachers.load(str(tmp_path / "s.safetensors"))
    assert again.guidance == RANGE and again.fingerprint == model.fingerprint != base.fingerprint
    assert torch.equal(again.denoiser(x, t, labels=labels, guidance=w), mixed)


@pytest.mark.slow  # imports diffusers' pipelines
def test_a_text_network_begins_as_its_teacher_and_embeds_the_scale_as_its_pipeline_does(tmp_path):
    adapted = {"family": "adapter", "config": {"kind": "negative", "network": wrap(text_unet())[1]}}
    base = teachers.Teacher(
        Denoiser(teachers.networks.build(adapted).eval(), Cosine()), (4, 8, 8), adapted, 3, 3,
        embeddings=Conditions.of({"text": torch.randn(4, 5, 8)}),
    )  # fmt: skip
    model, x, t, cond = with_guidance(base, RANGE), torch.randn(2, 4, 8, 8), torch.rand(2), base.condition(torch.arange(2))
    assert torch.allclose(model.guided(3.0)(x, t, **cond), base.denoiser(x, t, **cond), atol=1e-6)
    assert (learning(model).guided(3.0)(x, t, **cond) - base.denoiser(x, t, **cond)).abs().max() > 1e-3
    w = torch.tensor([1.0, 2.5, 8.0])
    for width in (256, 33):
        theirs = diffusers.StableDiffusionPipeline.get_guidance_scale_embedding(None, w - 1, width)
        assert torch.equal(TextUNet(Configured({"time_cond_proj_dim": width}))._embedded(w, x), theirs)


class Configured(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config


def test_networks_without_the_scale_refuse_it_and_those_with_it_need_it(teacher):
    x, t, labels = torch.randn(2, 1, 8, 8), torch.rand(2), torch.arange(2)
    refuses("does not accept a guidance scale", AtScale(teacher.denoiser, 2.0), x, t, labels=labels)
    refuses("needs a guidance scale", with_guidance(teacher, RANGE).denoiser, x, t, labels=labels)


def test_a_student_takes_one_call_and_its_teacher_two(teacher):
    model, x, t, labels = with_guidance(teacher, RANGE), torch.randn(2, 1, 8, 8), torch.tensor(0.5), torch.arange(2)
    for of, calls in ((model, 2), (teacher, 4)):
        count = [0]
        counted(of.guided(2.0), count)(x, t, labels=labels)
        assert count == [calls] and Cell("", "student", of, Sampling(), 8, 2.0).cost == 4 * calls


def test_a_student_is_a_teacher_within_its_range(teacher):
    model = with_guidance(teacher, RANGE)
    assert model.guided_over(GuidanceRange(1, 2)) is model.denoiser
    assert with_guidance(model, GuidanceRange(1, 2)).guidance == GuidanceRange(1, 2)
    refuses("guidance range 1 to 5: the teacher takes scales of 1 to 4", with_guidance, model, GuidanceRange(1, 5))
    for given, what in ((with_two_times, "a second time"), (with_slow_time, "a slow time embedding")):
        refuses(f"{what} cannot be given to a network that takes the guidance scale", given, model)


def test_the_scale_of_a_call_that_names_none_is_the_chosen_one_or_the_nearest_to_one():
    assert [GuidanceRange(*r).scale for r in ((0, 3), (1, 4), (3, 15), (0.2, 0.5), (1, 4, 2.5))] == [1, 1, 3, 0.5, 2.5]
    assert GuidanceRange.of(GuidanceRange(1, 4, 2).describe()) == GuidanceRange(1, 4, 2)


@pytest.fixture
def files(teacher, tmp_path):
    """Teachers that cannot be guided over a range, or that take scales of 1 to 4."""
    made = {
        "no null": replace(teacher, null=None),
        "unconditional": untrained((1, 8, 8), None, (8, 16), 1, 0),
        "range": replace(with_guidance(teacher, RANGE), sampling=Sampling(steps=(2, 1))),
    }
    for name, model in made.items():
        teachers.save(tmp_path / f"{name.replace(' ', '-')}.safetensors", model)
    return tmp_path


REFUSED = {
    (
        progressive,
        "--guidance-range 4 1",
    ): "guidance range 4 to 1: accepted are two numbers, 0 or more, the second above the first",
    (progressive, "--guidance-range 2 2"): "guidance range 2 to 2: accepted are",
    (progressive, "--guidance-range 2"): "guidance range of 1 numbers: accepted are two",
    (progressive, "--guidance-range 1 -4"): "--guidance-range -4.0: accepted are finite numbers, at least 0",
    (progressive, "--guidance-range 1 4 --guidance 2"): "--guidance 2 is one scale, and the student takes a range",
    (progressive, "--guidance-range 1 4 --sweep-guidance 1 6"): "--sweep-guidance 6: the student takes scales of 1 to 4",
    (progressive, "--sweep-guidance 2"): "add --guidance-range",
    (progressive, "--guidance-range 1 4 --teacher no-null.safetensors"): "guidance needs a teacher trained with a null class",
    (progressive, "--guidance-range 1 8 --teacher range.safetensors"): "range 1 to 8: the teacher takes scales of 1 to 4",
    (guided, "--teacher unconditional.safetensors --force"): "has no null class, so that there is no guidance to distil",
    (guided, "--guidance-range 4 1"): "guidance range 4 to 1",
    (consistency, "--guidance-range 4 1"): "guidance range 4 to 1",
    (consistency, "--guidance-range 1 4 --method dmd"): "--method dmd trains for one guidance scale",
    (consistency, "--guidance-range 1 4 --method ect"): "data have no guidance scale: accepted with a guidance range are",
    (consistency, "--guidance-range 1 4 --method ict --target posterior-mean"): "data have no guidance scale",
    (consistency, "--guidance-range 1 4 --method ict --from-scratch"): "--guidance-range needs a teacher",
    (consistency, "--guidance 2 --method ict --from-scratch"): "--guidance 2 needs a teacher",
    (consistency, "--guidance-range 1 4 --teacher no-null.safetensors"): "guidance needs a teacher trained with a null class",
    (consistency, "--guidance 2 --teacher no-null.safetensors"): "guidance needs a teacher trained with a null class",
}


def test_what_cannot_be_guided_ends_in_one_line_with_nothing_written(files, refused, monkeypatch):
    monkeypatch.chdir(files)
    for (recipe, flags), message in REFUSED.items():
        assert message in refused(recipe.main, flags, "--threads 1 --output-dir out"), flags
    assert not (files / "out").exists()


def test_a_scale_outside_of_the_range_is_a_warning(files, capsys, monkeypatch):
    monkeypatch.chdir(files)
    import fewstep

    for scale, warned in (("9", True), ("4", False)):
        sample.main(words(f"--model range.safetensors --images 2 --steps 1 --guidance {scale} --output {scale}.png"))
        assert ("warning: guidance 9 is outside of 1 to 4" in capsys.readouterr().err) is warned
    model = fewstep.load("range.safetensors")
    with pytest.warns(UserWarning, match="guidance 0.5 is outside of 1 to 4"):
        model.sample(2, guidance=0.5)
    assert torch.equal(model.sample(2).pixels, model.sample(2, guidance=1.0).pixels)


def test_evaluation_measures_the_scales_that_are_given(teacher):
    model = replace(with_guidance(teacher, RANGE), sampling=Sampling(steps=(2, 1)))
    group = [("x", [("none", model)]), ("digits", [("digits", teacher)])]
    for given, student, baseline in (
        (None, {("student@2/1", 1.0)}, {("teacher", 1.0)}),
        ((2.0,), {("student@2/1 w=2", 2.0)}, {("teacher", 2.0)}),
        (2.0, {("student@2/1 w=2", 2.0)}, {("teacher", 2.0)}),
        ((1.0, 3.0), {("student@2/1 w=1", 1.0), ("student@2/1 w=3", 3.0)}, {("teacher w=1", 1.0), ("teacher w=3", 3.0)}),
    ):
        cells = cells_of(evaluate.Config(steps=(1, 2), samplers=("ddim",), guidance=given), group)
        named = {role: {(c.label, c.guidance) for c in cells if c.role == role} for role in ("student", "teacher")}
        assert named == {"student": student, "teacher": baseline}


def test_the_ratio_of_a_row_is_to_the_teacher_of_its_scale():
    def row(role, guidance, fid):
        return {
            "name": f"{role}{guidance}",
            "role": role,
            "sampler": "ddim",
            "steps": 8,
            "guidance": guidance,
            "fid": fid,
            "nfe": 8,
            "fid_left_out": [fid] * 20,
        }

    rows = [row("teacher", 1.0, 1.0), row("teacher", 2.0, 4.0), row("student", 2.0, 6.0), row("student", 3.0, 5.0)]
    kept = {one["name"]: torch.zeros(2, 1, 2, 2) for one in rows}
    assert [one["ratio"] for one in with_comparisons(rows, kept)] == [1.0, 1.0, 1.5, 5.0]


def test_the_measured_scales_are_the_ends_of_the_range_or_those_given(teacher):
    model = with_guidance(teacher, RANGE)
    assert measured(progressive.Config(), model) == {" w=1": 1.0, " w=4": 4.0}
    assert measured(progressive.Config(sweep_guidance=(2.0,)), model) == {" w=2": 2.0}
    assert measured(progressive.Config(guidance=3.0), teacher) == {"": 3.0}


def test_lcm_is_one_ddim_step_of_the_guided_teacher_between_neighbours_of_fifty():
    from recipes.common.building import method_of
    from recipes.data import sets

    config = consistency.Config(**consistency.PRESETS["lcm"])
    teacher = teachers.load("digits")
    method = method_of(config, teacher, teacher, sets.load("digits"), 0)
    t, s = method.pairs(Cosine(), Rng.seeded(0, torch.device("cpu"), 512), 0.5)
    assert torch.allclose(t - s, torch.full_like(t, 1 / 50), atol=1e-6) and (method.order, method.substeps) == (1, 1)
    assert method.averaged and config.guidance_range == (3.0, 15.0)
    assert consistency.sampling(config).fresh == 1


def test_a_curve_of_a_student_that_takes_the_scale_names_it_at_1_too():
    row = {"role": "student", "times": None, "grid": "uniform", "sampler": "ddim", "guidance": 1.0}
    assert series(row | {"model": "student@4 w=1"}) == "student w=1" and series(row | {"model": "student@4"}) == "student"
    assert series(row | {"model": "student@4 w=2", "guidance": 2.0}) == "student w=2"
