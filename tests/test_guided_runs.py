"""Runs whose students take the guidance scale, from the two-stage recipe to stock pipelines with the same pixels."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import here, refuses, rows
from PIL import Image
from pipelines import PROMPTS, sd, xl

import teachers
from distill import files
from distill.guidance import GuidanceRange
from distill.sampling import Sampling
from recipes import consistency, evaluate, export, guided, progressive
from recipes.common.checks import stages_of
from teachers.export import deliver
from teachers.students import with_guidance

pytestmark = pytest.mark.slow

SIZES = "--batch-size 32 --images 40 --chunk 40 --sweep-steps 1 --force"
SMALL = f"--preset smoke {SIZES}"
FEW = "--training-images 64 --steps 1"
LADDER = f"{SMALL} --start-steps 4 --images-per-stage 64"


@pytest.fixture(scope="module")
def ran(new, tmp_path_factory):
    """The directory of a run of both stages."""
    folder = tmp_path_factory.mktemp("guided") / "run"
    here(guided.main, LADDER, "--teacher", new, "--sweep-guidance 1 3 --output-dir", folder)
    return folder


def test_both_stages_leave_students_that_take_the_scale_and_a_report_of_each_scale(ran):
    assert {path.parent.name for path in ran.glob("stages/*/student.safetensors")} == {"guided", "2", "1"}
    found = rows(ran)
    cells = [("student@2", "ddim 2"), ("student@1", "ddim 1"), ("teacher", "ddim 1"), ("teacher", "ddim 4")]
    assert found.keys() == {f"{name} w={w} {rest}" for name, rest in cells for w in (1, 3)}
    assert all(found[f"student@2 w={w} ddim 2"]["nfe"] == 2 for w in (1, 3))  # and guidance doubles the teacher's
    assert [found[f"teacher w={w} ddim 4"]["nfe"] for w in (1, 3)] == [4, 8]
    description = files.load(ran / "student.safetensors")[1]
    assert description["guidance"] == [1, 4] == description["record"]["guidance"]
    width, height = Image.open(ran / "guidance.png").size
    assert width > 4 * height  # two rows, three groups of four pictures


def test_stage_one_gives_a_teacher_of_half_the_calls_for_stage_two_alone(ran, tmp_path):
    stage_one = ran / "stages/guided/student.safetensors"
    here(progressive.main, LADDER, f"--teacher {stage_one} --end-steps 2 --output-dir", tmp_path)
    assert [path.split("/")[-2] for path in stages_of(str(tmp_path))] == ["2"] and not (tmp_path / "stages/guided").exists()
    assert teachers.load(str(tmp_path)).guidance == GuidanceRange(1, 4)
    assert rows(tmp_path)["teacher w=4 ddim 4"]["nfe"] == 4


def test_pipelines_of_pixels_are_made_for_a_scale(ran, tmp_path):
    """A UNet2DModel of diffusers has no input for the scale."""
    student = teachers.load(str(ran / "stages/2"))
    for scale in (1.0, 4.0):
        torch.nn.init.normal_(student.denoiser.net.unet.time_proj.scale_linear.weight, std=0.3)
        folder = tmp_path / f"{scale:g}"
        export.export(student, export.Config(output_dir=str(folder), guidance=scale, torch_export=False))
        assert "guidance scales | 1 to 4, pipelines of pixels at" in (folder / "README.md").read_text()
        assert teachers.load(str(folder / "student.safetensors")).guidance == GuidanceRange(1, 4, scale)
    refuses("this model takes no guidance scale", export.at_scale, teachers.load("digits"), 2.0)
    refuses("guidance 5 is outside of 1 to 4", export.at_scale, student, 5.0)


def test_an_evaluation_adds_a_scale(ran, tmp_path):
    options = "--images 40 --chunk 40 --steps 1 2 --baseline-steps 0"
    here(evaluate.main, f"--model {ran} {options} --guidance 2 4.5 --output-dir", tmp_path)
    found = rows(tmp_path)
    assert found.keys() == {f"student@{n} w={w} ddim {n}" for n in (1, 2) for w in (2, 4.5)}


@pytest.mark.parametrize("more", ["--preset lcm", "--method lmd", "--method pdd --data-free"])
def test_consistency_methods_train_over_a_range(more, new, tmp_path):
    here(consistency.main, f"{more} {SIZES} {FEW} --teacher {new} --guidance-range 2 5 --output-dir", tmp_path)
    student = teachers.load(str(tmp_path))
    assert student.guidance == GuidanceRange(2, 5)
    weights = [v for k, v in student.denoiser.net.state_dict().items() if "scale_linear" in k]
    assert len(weights) == 1 and weights[0].abs().max() > 0
    assert {row["guidance"] for row in rows(tmp_path).values()} == {2, 5}


def test_a_fixed_scale_is_that_of_the_target_and_of_the_teachers_cells(new, tmp_path):
    here(consistency.main, f"{SMALL} {FEW} --teacher {new} --guidance 3 --output-dir", tmp_path)
    assert files.load(tmp_path / "student.safetensors")[1]["record"]["guidance"] == 3
    assert {row["role"]: row["guidance"] for row in rows(tmp_path).values()} == {"teacher": 3, "student": 1}


@pytest.mark.parametrize(("family", "sampler"), [(sd, "consistency:0.5"), (sd, "ddim"), (xl, "ddim")])
def test_a_text_student_is_a_stock_pipeline_that_takes_the_scale(family, sampler, tmp_path, stock_here):
    """With the pipeline's own argument ``guidance_scale``, and read again with its range."""
    family(tmp_path / "parts").save_pretrained(tmp_path / "origin")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    teacher = teachers.load(f"{tmp_path / 'origin'},prompts={tmp_path / 'prompts.txt'}")
    model = with_guidance(teacher, GuidanceRange(3, 15))
    torch.nn.init.normal_(inner(model).time_embedding.cond_proj.weight, std=0.3)
    teachers.save(tmp_path / "s.safetensors", replace(model, sampling=Sampling.parse(sampler, steps=(1, 2))))
    student = teachers.load(f"{tmp_path / 's.safetensors'},prompts={tmp_path / 'prompts.txt'}")
    drawn = []
    for scale in (3.0, 8.0):
        at = export.at_scale(student, scale)
        assert deliver.export_pipelines(at, tmp_path / f"{scale}")["pipeline"] < 1e-4
        drawn.append(deliver.own_pixels(at, 2, [0, 1], [0, 1]))
    assert (drawn[0] - drawn[1]).abs().max() > 1e-3
    again = teachers.load(f"{tmp_path / '8.0' / 'pipeline'},prompts={tmp_path / 'prompts.txt'}")
    assert again.guidance == GuidanceRange(3, 15, 8)
    config = tmp_path / "8.0/pipeline/unet/config.json"
    config.write_text(json.dumps({k: v for k, v in json.loads(config.read_text()).items() if k != "_guidance_range"}))
    elsewhere = teachers.load(f"{tmp_path / '8.0' / 'pipeline'},prompts={tmp_path / 'prompts.txt'}")
    assert 100 in elsewhere.guidance and elsewhere.guidance.scale == 7.5
    x, t, cond = torch.randn(2, *student.shape), torch.tensor(0.5), student.condition(torch.arange(2))
    assert torch.allclose(elsewhere.guided(5.0)(x, t, **cond), student.guided(5.0)(x, t, **cond), atol=1e-3)


def inner(model):
    return model.denoiser.net.net
