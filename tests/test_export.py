import json
import sys
from dataclasses import replace

import pytest
import torch
from conftest import words

import teachers
from distill.grid import uniform
from distill.samplers import jump
from distill.sampling import Sampling
from recipes import export
from teachers.export import deliver, one_step
from teachers.export.card import card, measured


def of_one_step(teacher):
    record = {"method": "progressive", "of": "digits", "data": "digits"}
    return replace(teacher, sampling=Sampling("ddim", steps=(1,)), record=record)


@pytest.fixture()
def student(teacher, tmp_path):
    path = tmp_path / "run" / "student.safetensors"
    teachers.save(path, of_one_step(teacher))
    return path


@pytest.mark.slow
def test_an_export_holds_all_requested_files_and_loads_again_as_a_teacher(student, tmp_path, capsys, stock_here):
    folder, more = tmp_path / "out", "--variants fp16 bf16 --torch-export --onnx --license apache-2.0"
    export.main(words("--model", student, "--output-dir", folder, more))
    files = {"student.safetensors", "pipeline", "README.md", "samples.png", "one-step.pt2", "one-step.onnx"}
    assert {p.name for p in folder.iterdir()} == files and [p.name for p in tmp_path.iterdir() if p.name[0] == "."] == []
    weights = {p.name for p in (folder / "pipeline" / "unet").iterdir()}
    assert {"diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.bf16.safetensors"} < weights
    again, x = teachers.load(str(folder)).denoiser, torch.randn(2, 1, 8, 8)
    t, labels = torch.tensor([1.0, 0.3]), torch.tensor([3, 4])
    assert torch.equal(again(x, t, labels=labels), teachers.load(str(student)).denoiser(x, t, labels=labels))
    through_diffusers = teachers.load(str(folder / "pipeline")).denoiser
    assert torch.allclose(through_diffusers(x, t, labels=labels), again(x, t, labels=labels), atol=1e-5)
    out = capsys.readouterr().out
    assert "pipeline, fp16: largest difference" in out and "one-step.onnx: largest difference" in out


@pytest.mark.slow
@pytest.mark.parametrize("write", [one_step.torch_export, one_step.onnx])
def test_the_one_step_program_of_a_two_time_student_is_our_jump(two_times, tmp_path, write):
    model = replace(two_times, sampling=Sampling("jump", steps=(1,)))
    assert write(model, tmp_path / "program") < 1e-4
    noise, labels = one_step.inputs(model, 3, 5)
    with torch.inference_mode():
        ours = jump(model.denoiser, noise, uniform(model.denoiser.schedule, 1), labels=labels)
        assert torch.allclose(one_step.OneStep(model)(noise, labels), ours, atol=1e-5)


@pytest.mark.slow
def test_a_program_that_differs_from_the_sampler_is_not_left_behind(teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(one_step, "TOLERANCE", -1.0)
    with pytest.raises(RuntimeError, match="differs from our sampler"):
        one_step.torch_export(of_one_step(teacher), tmp_path / "p.pt2")
    assert not (tmp_path / "p.pt2").exists()


@pytest.mark.slow
def test_a_pipeline_whose_images_are_not_finite_is_not_left_behind(teacher, tmp_path, stock_here):
    broken = replace(teacher.denoiser, net=teacher.student().net)
    broken.net.unet.conv_out.bias.data[:] = torch.nan
    with pytest.raises(RuntimeError, match="differs from our sampler by nan"):
        deliver.export_pipelines(replace(of_one_step(teacher), denoiser=broken), tmp_path)
    assert not (tmp_path / "pipeline").exists()


def test_a_card_has_the_rows_of_this_very_model_and_the_settings_to_run_it(student):
    model = teachers.load(str(student))
    mine = {"steps": 1, "sampler": "ddim", "fid": 0.5, "fid_interval": [0.4, 0.6], "images": 100}
    mine["model_sha256"] = model.fingerprint
    (student.parent / "report.json").write_text(json.dumps({"rows": [mine, mine | {"model_sha256": "other", "fid": 9.0}]}))
    rows = measured(str(student), model.fingerprint, "ddim")
    assert rows == [mine] == measured(str(student.parent), model.fingerprint, "consistency:1")  # with one step they are one
    call = {"batch_size": 2, "class_labels": [0, 1]}
    text = card(model, ["pipeline", "pipeline-3"], call, rows, "mit", None)
    assert text.startswith("---\nlicense: mit\nlibrary_name: diffusers\n") and "| 1 | ddim | 0.5 | 0.4 - 0.6 | 100 |" in text
    assert "num_inference_steps=1" in text and 'from_pretrained("pipeline-3")' in text and "num_inference_steps=3" in text
    assert "| teacher | digits |" in text and "pipeline(batch_size=2, class_labels=[0, 1], num_inference_steps=1)" in text


def test_a_card_of_several_steps_has_the_rows_of_its_own_sampler(student):
    of = {"steps": 2, "role": "student", "fid": 0.5, "model_sha256": teachers.load(str(student)).fingerprint}
    both = [of | {"sampler": name} for name in ("consistency:0.5", "consistency:1")]
    (student.parent / "report.json").write_text(json.dumps({"rows": both}))
    assert measured(str(student), of["model_sha256"], "consistency:1") == both[1:]


@pytest.mark.slow
def test_an_export_takes_another_sampler_for_a_students_steps(teacher, tmp_path, stock_here, refused):
    made = replace(of_one_step(teacher), sampling=Sampling.parse("consistency:0.5", steps=(1, 2)))
    teachers.save(tmp_path / "run" / "student.safetensors", made)
    given = ("--model", tmp_path / "run", "--sampler consistency:1 --output-dir", tmp_path / "out")
    export.main(words(*given))
    assert teachers.load(str(tmp_path / "out")).sampling == replace(made.sampling, gamma=1.0)
    assert "this model was not distilled" in refused(export.main, "--model digits --sampler ddim --output-dir", tmp_path / "no")


def test_what_cannot_be_exported_is_one_line_and_leaves_nothing(student, tmp_path, refused, monkeypatch):
    arguments = ("--onnx --output-dir", tmp_path / "out", "--model")
    line = refused(export.main, *arguments, "digits")
    assert "needs a student of one step; this model was made for any number of steps" in line
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert "pip install -e '.[onnx]'" in refused(export.main, *arguments, student)
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


@pytest.mark.slow
def test_a_hub_that_cannot_be_reached_is_one_line_and_the_export_stays(student, tmp_path, refused, monkeypatch, stock_here):
    import huggingface_hub

    out, pushed = tmp_path / "out", []

    class Hub:
        def create_repo(self, repository, private, exist_ok):
            pushed.append((repository, private))

        def upload_folder(self, folder_path, repo_id, commit_message):
            raise ConnectionError("no route to the hub")

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    line = refused(export.main, "--model", student, "--output-dir", out, "--push-to-hub me/it --private")
    assert "--push-to-hub me/it: no route to the hub; the export stays in" in line
    assert (out / "README.md").is_file() and pushed == [("me/it", True)]
