"""Paths from images: the flow between two Gaussians and between an image and its low resolution are known in closed form."""

from dataclasses import dataclass, replace

import pytest
import torch
from closed_forms import rng
from conftest import Function, here, refuses, rows, words

import teachers
from distill import files
from distill.consistency import Consistency, Neighbours
from distill.grid import uniform
from distill.names import BASELINES
from distill.progressive import Progressive, steps_in_one
from distill.regression import Regression
from distill.rng import Rng
from distill.sampling import Sampling
from distill.schedule import Flow, expand, move
from distill.source import Coupled, Source, low_resolution
from distill.target import Mix
from distill.train import BatchSplit
from eval.generate import images, initial_noise, start
from recipes import consistency, evaluate, export, progressive, reflow, sample, teacher
from recipes.common.checks import check_sampler
from recipes.data import sets, source
from teachers.students import untrained

CPU = torch.device("cpu")
M0, S0 = torch.tensor([0.5, -0.3]).double(), torch.tensor([0.4, 0.8]).double()  # of the data
M1, S1 = torch.tensor([-1.0, 2.0]).double(), torch.tensor([1.5, 0.2]).double()  # of the source


def gaussian(mean, std, n, seed):
    return mean + std * torch.randn(n, 2, generator=torch.Generator().manual_seed(seed)).double()


SET = gaussian(M1, S1, 20_000, 1)
SOURCE = Source(lambda rows, device: SET[rows], len(SET), {"data": "test"})
VARIANCE, STD = 0.5, 0.3  # of the pixels of an image, and of the noise on its low resolution
PAIRED = Source(lambda rows, device: pixels(len(rows), 2), 64, {"data": "test"}, 2, STD)


def pixels(n, seed):
    return VARIANCE**0.5 * torch.randn(n, 1, 4, 4, generator=torch.Generator().manual_seed(seed)).double()


@dataclass(frozen=True)
class Between:
    """E[x0 | x_t] and the flow of two independent Gaussians: x_t ~ N(mean(t), V(t)), and paths are mean(t) + c sqrt(V(t))."""

    schedule = Flow()

    def mean(self, t):
        return (1 - t) * M0 + t * M1

    def variance(self, t):
        return (1 - t) ** 2 * S0**2 + t**2 * S1**2

    def __call__(self, x_t, t, to=None, **cond):
        t = expand(t, x_t)
        return M0 + (1 - t) * S0**2 / self.variance(t) * (x_t - self.mean(t))

    def flow(self, x, t, s):
        t, s = expand(t, x), expand(s, x)
        return self.mean(s) + (self.variance(s) / self.variance(t)).sqrt() * (x - self.mean(t))


@dataclass(frozen=True)
class Restoration:
    """E[x0 | x_t] of white images and their low resolution: x0 + t std eps in the means of boxes, (1 - t) x0 + t std eps in the rest."""

    schedule = Flow()

    def __call__(self, x_t, t, to=None, **cond):
        t, low = expand(t, x_t), low_resolution(x_t, 2)
        of_rest = VARIANCE * (1 - t) / ((1 - t) ** 2 * VARIANCE + (t * STD) ** 2)
        return VARIANCE / (VARIANCE + (t * STD) ** 2) * low + of_rest * (x_t - low)


def end_of_restoration(x1):
    """Where the path from x1 ends: each part is scaled to the standard deviation of x0."""
    low = low_resolution(x1, 2)
    return (VARIANCE / (VARIANCE + STD**2)) ** 0.5 * low + VARIANCE**0.5 / STD * (x1 - low)


CASES = {
    "independent": (Between(), SOURCE, lambda n: gaussian(M0, S0, n, 3), SET[:500], M0 + S0 / S1 * (SET[:500] - M1)),
    "paired": (
        Restoration(),
        PAIRED,
        lambda n: pixels(n, 3),
        (x1 := PAIRED.of(pixels(99, 4), rng(99))),
        end_of_restoration(x1),
    ),
}


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("case", CASES)
def test_every_sampler_without_noise_carries_the_source_to_the_data_as_the_closed_form_says(case, name):
    oracle, _, _, begin, exact = CASES[case]
    sampling = Sampling.parse(name)
    ends = [sampling.run(oracle, begin, uniform(Flow(), n), torch.randn_like) for n in (64, 256)]
    errors = [(end - exact).abs().max().item() for end in ends]
    assert errors[1] < 0.03 and (errors[1] < errors[0] / 2.5 or errors[1] < 1e-4)


def test_the_ddim_step_is_that_of_iterative_alpha_deblending():
    """x_s = x_t + (t - s) (E[x0 | x_t] - E[x1 | x_t]), 2305.03486."""
    x, t, s = SET[:100], torch.tensor(0.7).double(), torch.tensor(0.4).double()
    x0 = Between()(x, t)
    x1 = M1 + t * S1**2 / Between().variance(t) * (x - Between().mean(t))
    assert torch.allclose(move(Flow(), x, x0, t, s), x + (t - s) * (x0 - x1), atol=1e-9)


@pytest.mark.parametrize("case", CASES)
def test_the_regression_is_least_at_the_mean_of_the_coupling(case):
    oracle, found, data, *_ = CASES[case]
    t, x0 = 0.4, data(20_000)
    method = Coupled(
        Regression(weight=lambda schedule, t: torch.ones_like(t), draw=lambda schedule, rng: t + 0 * rng.uniform()), found
    )

    def loss(a, b):
        student = Function(Flow(), lambda x, t: (1 + a) * oracle(x, t) + b)
        return method(student, x0, rng=rng(20_000), progress=0.0).mean()

    best = loss(0, 0)
    for a, b in ((0.2, 0), (-0.2, 0), (0, 0.1), (0, -0.1)):
        assert loss(a, b) > best + 1e-3
    noise = (t * STD) ** 2
    quarter, rest = VARIANCE * noise / (VARIANCE + noise), VARIANCE * noise / ((1 - t) ** 2 * VARIANCE + noise)
    independent = (S0**2 * S1**2 * t**2 / Between().variance(torch.tensor(t))).mean()
    posterior = {"independent": float(independent), "paired": quarter / 4 + 3 * rest / 4}
    assert best.item() == pytest.approx(posterior[case], rel=0.03)


TIMES = uniform(Flow(), 8)
PAIRS = Neighbours(lambda _: 8, grid="uniform")
METHODS = {
    "progressive": Progressive(Between(), TIMES),
    "progressive without data": Progressive(Between(), TIMES, data_free=True),
    "cd": Consistency(Mix(Between()), PAIRS, order=2, substeps=8),
    "cd without data": Consistency(Mix(Between()), PAIRS, order=2, substeps=8, data_free=True),
    "denoise": Regression(Mix(Between())),
    "denoise without data": Regression(Mix(Between()), times=TIMES),
}
PERFECT = {
    "progressive": Function(
        Flow(), lambda x, t: steps_in_one(Between(), x, [TIMES[(t[:, None] - TIMES).abs().argmin(1) + k] for k in range(3)])
    ),
    "cd": Function(Flow(), lambda x, t: Between().flow(x, t, torch.zeros_like(t))),
    "denoise": Between(),
}


@pytest.mark.parametrize("name", METHODS)
def test_points_of_every_method_lie_between_the_batch_and_the_source_and_the_perfect_student_loses_nothing(name):
    x0, seen = gaussian(M0, S0, 64, 3), []
    student = PERFECT[name.split()[0]]
    noted = Function(Flow(), lambda x, t: seen.append((x, t)) or student(x, t))
    losses = Coupled(METHODS[name], SOURCE)(noted, x0, rng=rng(64), progress=0.0)
    x_t, t = seen[-1]
    if "without" in name:
        begin = x_t[t == 1]
    else:
        begin = (x_t - expand(1 - t, x_t) * x0) / expand(t, x_t)
    nearest = torch.cdist(begin, SET).min(1).values
    assert len(begin) >= 8 and (nearest < 1e-3).all() and len(begin.round(decimals=3).unique(dim=0)) > 6
    assert losses.shape == (64,) and losses.max() < 2e-3
    worse = Function(Flow(), lambda x, t: student(x, t) + 0.1)
    assert Coupled(METHODS[name], SOURCE)(worse, x0, rng=rng(64), progress=0.0).mean() > losses.mean() + 1e-3


def test_low_resolution_is_the_mean_of_boxes_and_a_projection():
    x = torch.randn(3, 2, 8, 4)
    low = low_resolution(x, 4)
    assert torch.allclose(low[1, 1, 4:, :], x[1, 1, 4:, :].mean().expand(4, 4), atol=1e-6)
    assert torch.allclose(low_resolution(low, 4), low, atol=1e-6) and low.shape == x.shape
    refuses("lowres=3 ... accepted are divisors", low_resolution, x, 3)


@pytest.mark.parametrize("found", [SOURCE, PAIRED], ids=["independent", "paired"])
def test_two_processes_see_the_pairs_of_one_and_a_step_that_is_taken_again_sees_them_too(found):
    x0 = pixels(64, 3) if found is PAIRED else gaussian(M0, S0, 64, 3)
    whole = found.of(x0, rng(64))
    halves = [found.of(x0[rows], Rng(torch.Generator().manual_seed(0), 64, rows)) for rows in (slice(0, 32), slice(32, 64))]
    assert torch.equal(torch.cat(halves), whole) and torch.equal(found.of(x0, rng(64)), whole)
    assert not torch.equal(found.of(x0, rng(64, 1)), whole)


def test_the_low_resolution_of_a_pair_is_that_of_its_own_image_whether_mirrored_or_not():
    pair = replace(PAIRED, std=0.01)
    data = sets.load("digits,flip")
    for world, rank in ((1, 0), (2, 1)):
        x0, _ = next(data.batches(BatchSplit(16, world, rank), 0, "test", CPU, lambda labels: {})(3))
        x1 = pair.of(x0, rng(len(x0)))
        assert (x1 - low_resolution(x0, 2)).abs().max() < 0.06 and (x1[1:] - low_resolution(x0[:-1], 2)).abs().amax(
            (1, 2, 3)
        ).min() > 0.1


# the data option, files, and refusals


def test_a_set_of_some_classes_has_their_images_numbered_in_the_order_that_is_named():
    whole, some, one = (sets.load(f"digits{option}") for option in ("", ",labels=8+3", ",labels=3"))
    assert one.labels is None and one.classes is None and torch.equal(one.images, whole.images[whole.labels == 3])
    assert some.classes == 2 and torch.equal(some.images[some.labels == 1], one.images)
    assert torch.equal(some.images[some.labels == 0], whole.images[whole.labels == 8]) and some.name == "digits, labels 8+3"
    refuses("labels=12: accepted are 0, 1", sets.load, "digits,labels=12")
    refuses("labels=3: accepted are", sets.load, "digits,labels=3+3")
    refuses("option labels is 'three'; accepted are classes", sets.load, "digits,labels=three")


@pytest.fixture
def saved(tmp_path):
    """A model whose paths start from threes, in a file."""
    model = untrained((1, 8, 8), None, (8, 16), 1, 0)
    model = replace(model, denoiser=replace(model.denoiser, schedule=Flow(), time="thousand_time"))
    model = replace(model, source=source.source_of("digits,labels=3", "digits,labels=8", sets.load("digits,labels=8")))
    teachers.save(tmp_path / "model.safetensors", model)
    return tmp_path / "model.safetensors", model


def test_samples_start_from_rows_of_the_source_and_image_i_does_not_depend_on_the_others(saved):
    path, model = saved
    loaded = source.load(str(path))
    threes = sets.load("digits,labels=3").x0(slice(None))
    drawn = start(loaded, range(40), 0).noise
    assert all((row == threes).flatten(1).all(1).any() for row in drawn) and len(drawn.unique(dim=0)) > 25
    assert torch.equal(start(loaded, [7, 3], 0).noise, drawn[[7, 3]]) and not torch.equal(
        start(loaded, range(40), 1).noise, drawn
    )
    made = next(iter(images(loaded, Sampling(), 1, [range(4)], 0, CPU))).images
    with torch.inference_mode():
        assert torch.allclose(made, loaded.denoiser(drawn[:4], torch.tensor(1.0)), atol=1e-6)
    assert loaded.fingerprint == model.fingerprint != replace(model, source=None).fingerprint
    plain = replace(model, source=None)
    assert torch.equal(start(plain, range(4), 0).noise, initial_noise(range(4), plain.shape, None, 0).noise)


def test_a_file_is_refused_where_noise_is_supposed_and_where_its_images_are_gone_or_changed(saved, tmp_path):
    path, model = saved
    refuses(f"{path}: samples start from images of 'digits,labels=3' instead of noise: accepted", teachers.load, str(path))
    for facts, message in (
        ({"data": "gone.npz"}, "images of 'gone.npz', which cannot be loaded: unknown data 'gone.npz', no such file"),
        ({"data": "digits,labels=3", "sha256": "0"}, "images of 'digits,labels=3', which have changed"),
        (
            {"data": "hf:someone/digits"},
            "which cannot be loaded: hf:someone/digits as a source: accepted are sets that are stored",
        ),
        ({"sha256": "0"}, "an entry 'data' is missing"),
    ):
        teachers.save(path, replace(model, source=replace(model.source, facts=facts)))
        refuses(message, source.load, str(path))


def test_what_assumes_gaussian_noise_is_refused_in_one_line(saved, tmp_path):
    loaded = source.load(str(saved[0]))
    for name in ("ancestral", "consistency:0.5", "sde:1", "pc", "langevin"):
        refuses(
            "draws Gaussian noise, and paths start from digits,labels=3: accepted are",
            check_sampler,
            loaded,
            Sampling.parse(name),
        )
    eights, out = sets.load("digits,labels=8"), str(tmp_path / "out")
    for wrong, message in (
        ({"method": "sid"}, "--method sid assumes Gaussian noise ... accepted are --method cd"),
        ({"target": "posterior-mean"}, "--target posterior-mean assumes"),
        ({"target_mix": "auto"}, "--target-mix auto assumes"),
        ({"regularize": ("martingale=1",)}, "--regularize assumes"),
        ({"start": "cmt"}, "--start cmt assumes"),
        ({"sampler": "consistency"}, "sampler 'consistency' draws Gaussian noise"),
        ({"student": "new"}, "accepted are students that are copied from the teacher"),
    ):
        config = consistency.Config(output_dir=out, threads=1, **wrong)
        refuses(message, consistency.prepare, config, loaded, eights)
    config = progressive.Config(output_dir=out, threads=1, student="table")
    refuses("accepted are students that are copied from the teacher", progressive.prepare, config, loaded, eights)
    refuses(
        "no stock pipeline starts from images (digits,labels=3): accepted", export.export, loaded, export.Config(output_dir=out)
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--source digits", "--source with --schedule table: accepted is --schedule flow"),
        ("--source digits --schedule flow --teacher digits", "--source with --teacher: accepted"),
        ("--source lowres=3 --schedule flow", "lowres=3 of images (1, 8, 8): accepted are divisors"),
        ("--source lowres=x --schedule flow", "--source lowres=x: accepted are a data set, lowres=4 and"),
        ("--source lowres=1 --schedule flow", "lowres=1,noise=0.1: accepted are factors from 2"),
        ("--source lowres=4 --schedule flow --data digits,bits=2", "of images without bits"),
        ("--source nowhere --schedule flow", "unknown data 'nowhere'"),
        ("--source digits --schedule flow --data digits,bits=2", "--source digits has other samples than (2, 8, 8)"),
    ],
)
def test_the_recipe_refuses_a_source_that_does_not_fit_in_one_line(refused, tmp_path, flags, message):
    assert message in refused(teacher.main, flags, "--prediction flow --threads 1 --output-dir", tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags, main, how",
    [
        ("--source digits,labels=3 --data digits,labels=8", progressive.main, "--start-steps 2 --images-per-stage 64"),
        ("--source lowres=4", consistency.main, "--training-images 64 --steps 1"),
    ],
)
def test_a_teacher_of_a_source_is_distilled_measured_and_sampled_without_naming_it_again(
    tmp_path, capsys, refused, flags, main, how
):
    data = flags.partition("--data ")[2] or "digits"
    here(
        teacher.main,
        f"--preset smoke --schedule flow {flags} --training-images 256 --channels 8 16 --output-dir",
        tmp_path / "t",
    )
    file, measured = tmp_path / "t" / "teacher.safetensors", f"--images 40 --chunk 40 --data {data}"
    here(main, how, measured, "--batch-size 32 --sweep-steps 1 --teacher", file, "--output-dir", tmp_path / "s")
    assert "no diffusers pipeline: no stock pipeline starts from images" in capsys.readouterr().out
    assert not (tmp_path / "s" / "pipeline").exists()
    student = source.load(str(tmp_path / "s"))
    assert student.source.facts == source.load(str(file)).source.facts and student.classes is None
    assert student.sampling.name == "ddim" and not files.load(tmp_path / "s" / "student.safetensors")[1]["passport"]["images"]
    one = "--steps 1 --baseline-steps 0 --samplers ddim"
    here(evaluate.main, one, measured, "--model", file, tmp_path / "s", "--output-dir", tmp_path / "e")
    before, after = rows(tmp_path / "s"), rows(tmp_path / "e")
    for name in ("teacher ddim 1", "student@1 ddim 1"):
        assert after[name]["fid"] == before[name.replace("student@1", "cd") if main is consistency.main else name]["fid"]
    sample.main(words("--steps 1 --images 4 --model", tmp_path / "s", "--output", tmp_path / "s.png"))
    assert (tmp_path / "s.png").stat().st_size > 0
    assert "instead of noise: accepted here are models that start from noise" in refused(
        reflow.main, "--teacher", file, "--output-dir", tmp_path / "r"
    )
