"""The Python face: a model of one's own from nn.Module to export, without a command line."""

import pytest
import torch
from conftest import refuses
from torch import nn

import fewstep as fs
from teachers.digits import digits
from teachers.students import untrained

pytestmark = pytest.mark.slow

IMAGES, LABELS = digits()
FEW = {"samplers": ("ddim",), "steps": (1, 2), "baseline_steps": 3, "chunk": 60, "threads": 1}
QUICK = {"images_per_stage": 256, "images": 60, "chunk": 60, "sweep_steps": (1,), "threads": 1}


class Mine(nn.Module):
    """Somebody's network, which takes its labels as ``y``."""

    def __init__(self):
        super().__init__()
        self.unet = untrained((1, 8, 8), 10, (32, 48), 1, 0).parametric.net

    def forward(self, x, t, y=None):
        return self.unet(x, 1024 * t - 1, labels=y)


@pytest.fixture(scope="module")
def trained():
    """An x0 network that is a denoiser: the embedded teacher's weights behind somebody's interface."""
    teacher, mine = fs.load("digits"), Mine()
    mine.unet = teacher.inner.parametric.net
    return mine


@pytest.fixture(scope="module")
def students(trained, tmp_path_factory):
    out = tmp_path_factory.mktemp("python") / "mine"
    teacher = fs.Teacher(trained, schedule=fs.load("digits").inner.denoiser.schedule, prediction="v", shape=(1, 8, 8), classes=10,
                         null=10, labels="y")  # fmt: skip
    return teacher, fs.distil(teacher, IMAGES, LABELS, method="progressive", steps=[2, 1], out=out, **QUICK), out


def test_a_module_of_ones_own_is_probed_distilled_sampled_evaluated_saved_and_loaded(students, trained, tmp_path):
    teacher, made, _ = students
    assert teacher.probe(IMAGES, LABELS).ok and made.keys() == {2, 1} and made[1].steps == (1,)
    samples = made[1].sample(10, labels=range(10), seed=0)
    assert samples.pixels.shape == (10, 1, 8, 8) and samples.grid(tmp_path / "ten.png").stat().st_size > 100
    few = FEW | {"n": 60, "out": tmp_path / "report"}
    report = fs.evaluate(teacher, *made.values(), against=IMAGES, labels=LABELS, **few)
    assert report.plot().is_file() and report.verdict
    assert {row["role"] for row in report.rows} == {"teacher", "student"}
    made[1].save(tmp_path / "student.safetensors")
    again = fs.load(tmp_path / "student.safetensors", net=Mine())
    assert torch.equal(again.sample(4, seed=3).pixels, made[1].sample(4, seed=3).pixels)
    refuses("Mine", fs.load, tmp_path / "student.safetensors")


def test_a_network_of_ones_own_has_no_stock_pipeline(students, tmp_path):
    refuses("UNet2DModel", students[1][1].export, tmp_path / "export")
    assert not (tmp_path / "export").exists()


def test_a_finished_distillation_is_continued_and_another_one_is_refused(students):
    teacher, made, out = students
    folder = {"steps": [2, 1], "out": out}
    again = fs.distil(teacher, IMAGES, LABELS, **folder, **QUICK)
    assert again[1].inner.fingerprint == made[1].inner.fingerprint
    refuses("holds another run", fs.distil, teacher, IMAGES, LABELS, **folder, **QUICK, seed=1)


def test_a_consistency_student_takes_all_its_step_counts_and_exports(tmp_path, monkeypatch):
    monkeypatch.setattr("teachers.export.deliver.verify", lambda *a: 0.0)  # tested with the pipelines themselves
    settings = {"training_images": 256, "images": 60, "chunk": 60, "sweep_steps": (1,), "threads": 1}
    made = fs.distil(fs.load("digits"), IMAGES, LABELS, method="cd", steps=(1, 2), out=tmp_path / "cd", **settings)
    assert made[1].inner is made[2].inner and made[1].steps == (1, 2)
    assert (made[2].export(tmp_path / "x") / "pipeline" / "model_index.json").is_file()


def test_what_does_not_fit_is_refused_in_one_line(tmp_path):
    teacher = fs.load("digits")
    bad = Mine()
    wrong = fs.Model(bad, schedule="cosine", prediction="v", shape=(1, 8, 8), classes=10, labels="y")
    for call, message in (
        (lambda: fs.distil(teacher, IMAGES, LABELS, method="progresive", out=tmp_path / "a"), "unknown method 'progresive'"),
        (lambda: fs.distil(teacher, IMAGES, LABELS, steps=(4, 1), out=tmp_path / "a"), "step counts that halve each time"),
        (lambda: fs.distil(teacher, IMAGES, LABELS, images_per_stages=1, out=tmp_path / "a"), "accepted are images_per_stage"),
        (lambda: fs.distil(teacher, IMAGES, None, out=tmp_path / "a"), "has no labels"),
        (lambda: fs.distil(teacher, IMAGES.int(), LABELS, out=tmp_path / "a"), "uint8"),
        (lambda: wrong.probe(IMAGES, LABELS), "no denoiser: at log-SNR"),
        (lambda: teacher.sample(2, labels=[11]), "classes 0 to 9"),
        (lambda: fs.Model(bad, schedule="cosine", prediction="epsilon", shape=(1, 8, 8)), "unknown prediction"),
        (lambda: fs.load("digits", net=bad), "there is no such file"),
    ):
        refuses(message, call)
    assert not list(tmp_path.iterdir())
