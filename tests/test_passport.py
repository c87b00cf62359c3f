"""A few-step model says what it was made for, and loading obeys it or refuses."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from conftest import refuses, words
from pipelines import sd

import teachers
from distill.sampling import Sampling
from distill.schedule import EDM, Cosine
from recipes import audit, sample
from teachers import passport
from teachers.custom import wrap
from teachers.export import deliver


@pytest.fixture(scope="module")
def student(teacher):
    record = {"method": "progressive", "of": "digits", "guidance": 2.0, "teacher_sha256": teacher.fingerprint}
    return replace(teacher, sampling=Sampling(steps=(4, 2)), record=record)


def test_the_grid_in_a_passport_is_that_of_diffusers_trailing_ddim(student):
    from diffusers import DDIMScheduler

    theirs = DDIMScheduler(1024, beta_schedule="squaredcos_cap_v2", rescale_betas_zero_snr=True, timestep_spacing="trailing")
    made = passport.of(student)
    for n in (4, 2):
        theirs.set_timesteps(n)
        assert made.timesteps[str(n)] == pytest.approx(theirs.timesteps.tolist(), abs=1e-6)
        alpha = theirs.alphas_cumprod[theirs.timesteps].double().sqrt()
        noise = (1 - alpha**2).sqrt() / (alpha + (1 - alpha**2).sqrt())
        assert made.sigmas[str(n)] == pytest.approx([*noise.tolist(), 0.0], abs=1e-4)


def test_a_students_file_holds_its_passport(student, teacher, tmp_path):
    teachers.save(tmp_path / "student.safetensors", student)
    for where in (tmp_path, tmp_path / "student.safetensors"):
        found = passport.beside(str(where))
        assert found == passport.of(student)
    assert found.steps == (4, 2) and found.guidance == {"rule": "distilled", "scale": 2.0} and found.prediction == "v"
    assert found.teacher == {"source": "digits", "sha256": teacher.fingerprint}
    teachers.save(tmp_path / "any.safetensors", teacher)
    assert passport.beside(str(tmp_path / "any.safetensors")) is None


def test_a_passport_gives_its_sampling_back_on_other_schedules(student):
    made = passport.of(student)
    assert made.sampling(student.denoiser.schedule) == student.sampling
    for schedule in (Cosine(), EDM(t_max=1e9)):
        again = made.sampling(schedule)
        for n in (4, 2):
            theirs, ours = (passport.sigmas_of(s, grid) for s, grid in (
                (schedule, again.times_for(schedule, n)), (student.denoiser.schedule, student.times(n)),
            ))  # fmt: skip
            assert torch.allclose(theirs[1:], ours[1:])


def test_images_recognise_the_model_that_made_them(student):
    made = passport.of(student)
    assert passport.recognises(made, student) == "the same images"
    assert len(set(made.images["sha256"])) == 4 and made.images["labels"] == [0, 1, 2, 3]
    rounded = replace(made, images=made.images | {"sha256": ["of other hardware"] * 4})
    assert passport.recognises(rounded, student) == "near images"
    other = replace(student, denoiser=student.student())
    other.denoiser.net.unet.conv_out.bias.data += 0.1
    assert passport.recognises(made, other) == "other images"


def test_a_model_of_vectors_is_saved_with_a_passport_without_images(tmp_path):
    net = torch.nn.Module()
    net.forward = lambda x, t: x
    model = replace(wrap(net, shape=(2,), schedule="flow", prediction="x0"), sampling=Sampling(steps=(1,)))
    teachers.save(tmp_path / "s.safetensors", model)
    found = passport.beside(str(tmp_path / "s.safetensors"))
    assert found.images == {} and found.shift == 1.0 and found.sigmas == {"1": [1.0, 0.0]}
    assert passport.recognises(found, model) == "no images"


def test_a_passport_that_is_none_is_refused(student, tmp_path):
    whole = passport.of(student).describe()
    for change, message in (
        ({"format": "another/1"}, "format 'another/1' ... reads 'fewstep-passport/1'"),
        ({"sigmas": {"4": [1.0, 0.5, 0.6, 0.2, 0.0], "2": [1.0, 0.5, 0.0]}}, "sigmas of 4 steps ... fall within [0, 1]"),
        ({"sigmas": {"4": [1.0, 0.0], "2": [1.0, 0.5, 0.0]}}, "sigmas of 4 steps ... accepted are 4 + 1 numbers"),
        ({"sampler": "wrong"}, "unknown sampler 'wrong'"),
        ({"sigmas": {}}, "'4' is missing"),
        ({"unknown": 1}, "impossible value"),
    ):
        refuses(message, passport.from_description, whole | change, tmp_path / "passport.json")


@pytest.mark.slow
def test_a_pipeline_is_sampled_as_its_passport_says_or_refused(student, tmp_path, stock_here):
    deliver.export_pipelines(student, tmp_path)
    folder = tmp_path / "pipeline"
    again = teachers.load(str(folder))
    assert again.sampling == student.sampling and again.distilled
    made = passport.read(folder / "passport.json")
    assert passport.recognises(made, again) == "the same images"
    described = made.describe()
    (folder / "passport.json").write_text(json.dumps(described | {"prediction": "eps"}))
    refuses("made to predict 'eps', its scheduler says 'v'", teachers.load, str(folder))
    (folder / "passport.json").unlink()
    assert not teachers.load(str(folder)).distilled


@pytest.mark.slow
def test_the_images_of_a_pipelines_passport_are_those_of_plain_diffusers(student, tmp_path, stock_here):
    from diffusers import DiffusionPipeline

    model = replace(student, sampling=Sampling("consistency", 0.5, steps=(2,)))  # its times and its noise are baked in
    deliver.export_pipelines(model, tmp_path)
    made = passport.read(tmp_path / "pipeline" / "passport.json")
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    for i, thumbnail in enumerate(made.images["thumbnails"]):
        drawn = pipeline(
            class_labels=[i], num_inference_steps=2, generator=torch.Generator().manual_seed(i), output_type="np"
        ).images
        small = torch.nn.functional.adaptive_avg_pool2d(torch.from_numpy(drawn).permute(0, 3, 1, 2), 4)[0]
        assert torch.allclose(small, torch.tensor(thumbnail), atol=2e-4)


def test_sampling_warns_of_step_counts_that_a_student_was_not_made_for(student, tmp_path, capsys):
    teachers.save(tmp_path / "s.safetensors", student)
    sample.main(words("--model", tmp_path / "s.safetensors", "--steps 3 --images 4 --output", tmp_path / "3.png"))
    assert capsys.readouterr().err.startswith("warning: this student was made for 4, 2 steps, not 3\n")
    sample.main(words("--model", tmp_path / "s.safetensors", "--steps 4 --images 4 --output", tmp_path / "4.png"))
    assert "warning" not in capsys.readouterr().err


def test_searched_times_have_no_other_step_count(student, tmp_path, refused):
    found = replace(student, sampling=Sampling(grid="searched", steps=(2,), times={2: (1.0, 0.4, 0.0)}))
    teachers.save(tmp_path / "s.safetensors", found)
    assert passport.beside(str(tmp_path / "s.safetensors")).sampling(found.denoiser.schedule).times[2] == pytest.approx(
        (1, 0.4, 0)
    )
    line = refused(sample.main, "--model", tmp_path / "s.safetensors", "--steps 3 --images 4 --output", tmp_path / "3.png")
    assert "for which it has no times" in line


def test_the_audit_compares_a_model_that_has_a_passport(student, tmp_path, capsys):
    teachers.save(tmp_path / "student.safetensors", student)
    audit.main(words("--teacher digits --model", tmp_path))
    assert "has a passport, for 4 steps: it makes the same images" in capsys.readouterr().out


@pytest.mark.slow
def test_a_text_pipeline_is_recognised_without_any_prompts(tmp_path, stock_here, capsys):
    sd(tmp_path / "parts").save_pretrained(tmp_path / "origin")
    (tmp_path / "prompts.txt").write_text("a cat\ntwo dogs\n")
    teacher = teachers.load(f"{tmp_path / 'origin'},prompts={tmp_path / 'prompts.txt'}")
    deliver.export_pipelines(replace(teacher, sampling=Sampling(steps=(1,))), tmp_path / "out")
    audit.main(["--model", str(tmp_path / "out" / "pipeline"), "--teacher", str(tmp_path / "origin")])
    assert "has a passport, for 1 step: it makes the same images" in capsys.readouterr().out
