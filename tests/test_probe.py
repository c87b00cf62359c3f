"""The probe finds every wrong convention of a good denoiser, gives the right one, and accepts every right one."""

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import here, words
from torch import nn

from distill.denoiser import PREDICTIONS, TIMES, Denoiser, on_schedule
from distill.sampling import Sampling
from distill.schedule import EDM, Cosine, Flow, LinearVP, Schedule, expand
from recipes import probe as probe_recipe
from recipes import progressive
from recipes import teacher as teacher_recipe
from recipes.common.checks import check_denoiser
from recipes.data.sets import Data
from teachers import Teacher, load, save
from teachers.codec import Codec
from teachers.digits import digits
from teachers.oracle import Gaussian
from teachers.probe import probe
from teachers.probe_readings import STATED
from teachers.students import untrained

INVERSE = {
    "time": lambda schedule, c: c,
    "thousand_time": lambda schedule, c: c / 1000,
    "index": lambda schedule, c: (c + 1) / schedule.steps,
    "log_sigma": lambda schedule, c: schedule.time(-8 * c),
    "thousand_log_sigma": lambda schedule, c: schedule.time(-c / 125),
}


class Reexpressed(nn.Module):
    """A denoiser as a network of another schedule, prediction and time. It keeps its outputs."""

    def __init__(
        self, denoiser, schedule: Schedule, prediction: str, time: str, sigma_data=0.5, reverse=False, scale=1.0, shift=0.0
    ):
        super().__init__()
        self.denoiser, self.schedule, self.time_of = on_schedule(denoiser, schedule), schedule, INVERSE[time]
        self.coefficients, self.sigma_data, self.reverse = PREDICTIONS[prediction], sigma_data, reverse
        self.scale, self.shift = scale, shift
        self.outputs: dict = {}

    def forward(self, x, c_noise, labels=None):
        key = (len(x), float(c_noise[0]), x.double().sum().item(), x.double().square().sum().item())
        if key not in self.outputs:
            self.outputs[key] = self.evaluate(x, c_noise, labels)
        return self.outputs[key]

    def evaluate(self, x, c_noise, labels):
        schedule = self.schedule
        t = self.time_of(schedule, c_noise).clamp(schedule.t_min, schedule.t_max)
        t = schedule.t_max + schedule.t_min - t if self.reverse else t
        a, s = schedule.alpha(t), schedule.sigma(t)
        c_in, c_skip, c_out = (expand(c, x) for c in self.coefficients(a, s, self.sigma_data))
        x_t = x / c_in
        plain = (x_t - expand(a, x) * self.shift) / self.scale  # of the unscaled data, at the noise sigma / scale
        u = schedule.time(schedule.logsnr(t) + 2 * torch.tensor(self.scale).log())
        ratio = expand(schedule.alpha(u) / a, x)
        x0 = self.scale * self.denoiser(ratio * plain, u, labels=labels) + self.shift
        return (x0 - c_skip * x_t) / c_out


SMALL: dict[str, Any] = {"levels": 4, "samples": 6}


@pytest.fixture(scope="module")
def real():
    images, labels = digits()
    return SimpleNamespace(images=images.float() / 127.5 - 1, labels=labels)


def table(teacher):
    return teacher.denoiser.schedule


TRUTHS = {
    "v on the table": (table, "v", "index"),
    "eps": (lambda _: LinearVP(), "eps", "thousand_time"),
    "score": (lambda _: LinearVP(), "score", "time"),
    "x0": (lambda _: Cosine(), "x0", "log_sigma"),
    "flow": (lambda _: Flow(), "flow", "thousand_time"),
    "edm": (lambda _: EDM(), "edm", "thousand_log_sigma"),
}


def of(teacher, net, schedule, prediction, time, **kwargs):
    return Teacher(Denoiser(net, schedule, prediction, time, **kwargs), teacher.shape, classes=10)


@pytest.mark.slow
@pytest.mark.parametrize("name", TRUTHS)
def test_every_wrong_convention_is_found_and_the_right_one_given(teacher, real, name):
    """Wrong predictions, times and directions of time of one network; the right ones are accepted."""
    where, prediction, time = TRUTHS[name]
    schedule = where(teacher)
    net = Reexpressed(teacher.denoiser, schedule, prediction, time)

    def found(net, prediction, time):
        return probe(of(teacher, net, schedule, prediction, time), real.images, real.labels, **SMALL)

    right = found(net, prediction, time)
    assert right.ok and right.best == STATED and right.verdict.startswith("a denoiser"), right.lines()
    wrong = {(p, time) for p in PREDICTIONS if p != prediction and not (p in ("eps", "score") and name == "v on the table")}
    wrong = {k for k in wrong if schedule.alpha(torch.tensor(schedule.t_max)) > 1e-6 or k[0] not in ("eps", "score")}
    wrong |= {(prediction, t) for t in TIMES if t != time and (t != "index" or name == "v on the table")} - {
        ("v", "thousand_time")
    }
    for p, t in sorted(wrong):
        probed = found(net, p, t)
        named = f"prediction {prediction}" if p != prediction else f"time {time}"
        assert not probed.ok and probed.best == named and "misread" in probed.verdict, (p, t, probed.lines())
    backward = found(Reexpressed(teacher.denoiser, schedule, prediction, time, reverse=True), prediction, time)
    assert not backward.ok and backward.best == "time axis reversed", backward.lines()


@pytest.mark.slow
def test_an_index_is_distinguished_from_a_thousandfold_time_on_a_table_of_1024(teacher, real):
    """The times differ by 2 % and the errors by 0.4 %; paired differences find it."""
    twin = replace(teacher, denoiser=replace(teacher.denoiser, time="thousand_time"))
    probed = probe(twin, real.images, real.labels, levels=8)
    assert not probed.ok and probed.best == "time index", probed.lines()


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_a_wrong_sigma_data_is_found(teacher, real, factor):
    net = Reexpressed(teacher.denoiser, EDM(), "edm", "log_sigma", sigma_data=0.6)
    stated = of(teacher, net, EDM(), "edm", "log_sigma", sigma_data=0.6 * factor)
    probed = probe(stated, real.images, real.labels, **SMALL)
    assert not probed.ok and probed.best == "sigma_data 0.6", probed.lines()


def test_a_network_made_for_data_in_0_to_1_and_data_passed_in_so_are_found(teacher, real):
    net = Reexpressed(teacher.denoiser, Cosine(), "v", "time", scale=0.5, shift=0.5)
    probed = probe(of(teacher, net, Cosine(), "v", "time"), real.images, real.labels, **SMALL)
    assert not probed.ok and probed.best == "network made for data in [0, 1]", probed.lines()
    probed = probe(teacher, real.images / 2 + 0.5, real.labels, **SMALL)
    assert not probed.ok and probed.best == "data passed in as [0, 1]", probed.lines()


@dataclass(frozen=True)
class Vae:
    """Latents z = x / 0.18215; a latent model needs them times 0.18215."""

    config = None

    def encode(self, images):
        return SimpleNamespace(latents=images / 0.18215)


def test_a_missing_latent_scale_is_found(teacher, real):
    right = replace(teacher, codec=Codec(Vae(), 0.18215))
    assert probe(right, real.images, real.labels, **SMALL).ok
    probed = probe(replace(teacher, codec=Codec(Vae(), 1.0)), real.images, real.labels, **SMALL)
    assert not probed.ok and probed.best == "latents times 0.18215", probed.lines()


@pytest.mark.parametrize("schedule", [Cosine(), LinearVP(), EDM()])
def test_an_oracle_meets_the_bound_and_one_of_another_mean_or_deviation_does_not(real, schedule):
    """The exact denoiser of Gaussian data with the means and deviations of these pixels has the bound as its error."""
    mean, std = real.images.mean(0), real.images.std(0)
    data = mean + std * torch.randn(1024, *mean.shape)

    def found(mean, std):
        return probe(Teacher(Gaussian(schedule, mean, std), tuple(mean.shape)), data)

    exact = found(mean, std)
    assert exact.ok and not exact.readings
    ratio = torch.tensor(exact.error) / torch.tensor(exact.bound)
    assert (ratio - 1).abs().max() < 0.1 and max(map(abs, exact.slope)) < 0.05
    assert not found(mean + 0.5, std).ok and not found(mean, 3 * std).ok


def test_the_bound_is_below_the_mean_and_the_input(teacher, real):
    probed = probe(teacher, real.images, real.labels, **SMALL)
    bound, variance = torch.tensor(probed.bound), real.images.var(0).mean()
    assert (bound <= variance * 1.01).all() and (bound <= torch.exp(-torch.tensor(probed.logsnr))).all()
    assert probed.bias[-1] < 0.02 and abs(probed.slope[-1]) < 0.01 and abs(probed.spread[-1] - 1) < 0.02


def test_an_untrained_network_is_no_denoiser_under_any_reading(real):
    new = untrained((1, 8, 8), 10, (8, 16), 1, 0)
    net = nn.Module()
    net.forward = lambda x, t, labels=None: new.denoiser.net(x, t, labels) * 100 + torch.randn(x.shape)
    probed = probe(replace(new, denoiser=replace(new.denoiser, net=net)), real.images, real.labels, **SMALL)
    assert not probed.ok and "no denoiser: at log-SNR" in probed.verdict, probed.lines()


@pytest.fixture(scope="module")
def mislabelled(tmp_path_factory, teacher):
    path = tmp_path_factory.mktemp("probe") / "x0.safetensors"
    save(path, replace(teacher, denoiser=replace(teacher.denoiser, prediction="x0")))
    return path


@pytest.mark.slow
def test_recipes_refuse_a_mislabelled_teacher_in_one_line_and_write_nothing(mislabelled, tmp_path, refused):
    for recipe in (progressive, teacher_recipe):
        said = refused(recipe.main, "--threads 1 --teacher", mislabelled, "--output-dir", tmp_path / "run")
        assert "prediction v" in said and "--force" in said, said
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_force_and_students_pass_with_a_warning(mislabelled, teacher, real):
    data = Data("digits", *digits())
    wrong = load(str(mislabelled))
    assert check_denoiser(teacher, data, 0, False) is None
    assert "misread" in str(check_denoiser(wrong, data, 0, True))
    student = replace(wrong, sampling=Sampling("ddim", steps=(4,)))
    assert "student of ddim" in str(check_denoiser(student, data, 0, False))


@pytest.mark.slow
def test_the_probe_is_printed_and_no_denoiser_ends_in_one_line(mislabelled, capsys):
    with pytest.raises(SystemExit) as stop:
        here(probe_recipe.main, "--model", mislabelled)
    said = capsys.readouterr()
    assert stop.value.code == 2 and said.err.count("\n") == 1 and "misread: with prediction v" in said.err
    assert said.out.splitlines()[0].startswith("log-SNR") and len(said.out.splitlines()) == 20
    here(probe_recipe.main, "--model oracle:digits")
    assert "oracle:digits: " in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        "--prediction edm --schedule edm",
        "--prediction flow --schedule flow --teacher digits --weight p2",
        "--prediction x0 --schedule cosine --teacher oracle:digits --times lognormal",
    ],
)
def test_the_teacher_recipe_trains_every_prediction_on_its_schedule(arguments, tmp_path):
    here(teacher_recipe.main, "--preset smoke --images 256 --channels 8 16 --output-dir", tmp_path, arguments)  # its older name
    assert {p.name for p in tmp_path.iterdir()} == set(words("teacher.safetensors samples.png metrics.jsonl config.json"))
    made = load(str(tmp_path / "teacher.safetensors"))
    options = dict(zip(words(arguments)[::2], words(arguments)[1::2], strict=True))
    assert made.denoiser.prediction == options["--prediction"] and (tmp_path / "samples.png").stat().st_size > 100
    assert type(made.denoiser.schedule).__name__.lower() == options["--schedule"].replace("_", "")
    assert (made.classes is None) == (options.get("--teacher") == "oracle:digits")
    if options["--prediction"] == "edm":
        assert made.denoiser.sigma_data == pytest.approx((digits()[0].float() / 127.5).std().item(), rel=1e-5)
