"""The recipes that measure, search, sample and export a finished run."""

import errno
import importlib
import os
from dataclasses import replace

import pytest
import torch
import torch_fidelity
from conftest import here, rows, words
from PIL import Image
from processes import together
from test_progressive_runs import MACHINE

import eval.fidelity  # noqa: F401  (registers the extractor)
import teachers
from distill import files
from distill.sampling import Sampling
from eval.series import curves
from fewstep.__main__ import commands
from recipes import classifier, compare, evaluate, sample, search
from teachers.digits import digits

pytestmark = pytest.mark.slow

FEW = "--steps 1 --baseline-steps 0 --images 60 --chunk 60"


def test_numbers_are_independent_of_the_number_of_processes_and_fid_alone_needs_no_features(new, ladder, tmp_path):
    few = "--images 60 --chunk 8 --steps 1 2 --samplers ddim heun --baseline-steps 3 --threads 1"
    common = ("--model", new, ladder, few)
    here(evaluate.main, *common, "--output-dir", tmp_path / "one")
    one = rows(tmp_path / "one")
    assert len(one) == 6
    for name, more in (("many", ""), ("alone", "--metrics fid")):
        arguments = words(*common, more, "--output-dir", tmp_path / name)
        codes, out = together(3, evaluate.main, arguments, log=tmp_path / "log")
        assert codes == {0}, out
        found = rows(tmp_path / name)
        assert one.keys() == found.keys()
        for key, row in one.items():
            if name == "many":
                assert [c for c in row if row[c] != found[key][c] and c not in MACHINE] == [], key
            else:
                assert found[key]["fid"] == pytest.approx(row["fid"], rel=1e-6) and "kid" not in found[key]
                assert found[key]["fid_interval"] == pytest.approx(row["fid_interval"], rel=1e-5)


def test_samples_are_the_images_that_were_measured(ladder, tmp_path):
    """FID of the folder that sample.py writes, by torch-fidelity itself, is the FID of the report."""
    here(evaluate.main, "--model", ladder, FEW, "--images 110 --chunk 55 --output-dir", tmp_path / "e")
    sample.main(words("--model", ladder, "--images 110 --output", tmp_path / "images"))
    (tmp_path / "real").mkdir()
    for i, image in enumerate(digits()[0]):
        Image.fromarray(image[0].numpy()).save(tmp_path / "real" / f"{i:06d}.png")
    theirs = torch_fidelity.calculate_metrics(
        input1=str(tmp_path / "images"), input2=str(tmp_path / "real"), cuda=False, feature_extractor="digits", fid=True, isc=True,
        verbose=False, cache=False, save_cpu_ram=True, batch_size=256,
    )  # fmt: skip
    row = rows(tmp_path / "e")["student@1 ddim 1"]
    assert row["fid"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-6)
    assert row["isc"] == pytest.approx(theirs["inception_score_mean"], rel=1e-6)


def test_verify_searched_grids_and_a_stored_reference(new, ladder, tmp_path, capsys):
    common = ("--model", new, ladder, "--images 150 --steps 1 3 --samplers ddim ipndm --baseline-steps 0 --output-dir")
    here(evaluate.main, *common, tmp_path / "e", "--search-grid --verify")
    assert "torch_fidelity.calculate_metrics says fid" in capsys.readouterr().out
    found = rows(tmp_path / "e")
    assert found["teacher ipndm searched 3"]["times"][0] == 1 and len(found["teacher ipndm searched 3"]["times"]) == 4
    here(evaluate.main, *common, tmp_path / "r", "--reference", tmp_path / "e" / "reference.safetensors")
    assert rows(tmp_path / "r")["teacher ddim 3"]["fid"] == found["teacher ddim 3"]["fid"]


def test_finished_runs_are_compared_on_one_page(ladder, tmp_path, refused):
    for name, model in (("a", "digits"), ("b", ladder)):
        here(evaluate.main, FEW, "--model", model, "--output-dir", tmp_path / name)
    here(compare.main, "--runs", tmp_path / "a", tmp_path / "b", "--output-dir", tmp_path / "c")
    assert rows(tmp_path / "c").keys() == {"teacher ddim 1", "student@1 ddim 1"}
    assert rows(tmp_path / "c")["student@1 ddim 1"]["ratio"] > 0 and (tmp_path / "c" / "report.html").is_file()
    here(evaluate.main, FEW, "--images 50 --output-dir", tmp_path / "d")
    line = refused(compare.main, "--runs", tmp_path / "a", tmp_path / "d", "--output-dir", tmp_path / "x")
    assert "cannot be compared: images is 60 and 50" in line and not (tmp_path / "x").exists()


def test_a_full_disk_is_one_line_and_the_finished_cells_are_kept(ladder, tmp_path, monkeypatch, capsys):
    arguments = words("--model digits", ladder, FEW, "--threads 1 --output-dir", tmp_path)
    real_fsync, written = os.fsync, []

    def fsync(descriptor):
        written.append(descriptor)
        if len(written) > 4:  # config.json, the reference, and the two files of the first cell
            raise OSError(errno.ENOSPC, "No space left on device")
        real_fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(SystemExit) as stop:
        evaluate.main(arguments)
    monkeypatch.undo()
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and "No space left on device" in line and "what was finished is kept" in line
    assert {p.name for p in (tmp_path / "cells").iterdir()} == {"teacher_ddim_1.json", "teacher_ddim_1.safetensors"}
    evaluate.main(arguments)
    assert rows(tmp_path).keys() == {"teacher ddim 1", "student@1 ddim 1"}


def test_searched_step_times_are_written_into_the_student_and_its_pipelines(ladder, tmp_path, stock_here):
    few = ("--images 100 --chunk 64 --output-dir",)
    here(search.main, "--model", ladder / "stages/2", "--steps 2 3 --nodes 8 --proxy-images 64", *few, tmp_path / "s")
    _, description = files.load(tmp_path / "s" / "student.safetensors")
    times = description["sampler"]["times"]
    assert description["sampler"]["steps"] == [2, 3] and [len(t) for t in times.values()] == [3, 4]
    assert all(t[0] == 1 and t[-1] == 0 for t in times.values())
    fid = {name: row["fid"] for name, row in rows(tmp_path / "s").items()}
    assert {"student@2 ddim 2", "student@2 ddim searched 2", "student@3 ddim searched 3"} <= fid.keys()
    assert (tmp_path / "s" / "pipeline-3" / "model_index.json").is_file()
    sample.main(words("--model", tmp_path / "s", "--steps 3 --images 4 --output", tmp_path / "s.png"))
    here(evaluate.main, "--model", tmp_path / "s", "--steps 3", *few, tmp_path / "e")
    (again,) = rows(tmp_path / "e").values()
    assert again["fid"] == min(fid["student@3 ddim 3"], fid["student@3 ddim searched 3"])


def test_a_network_that_returns_nan_fails_its_cells_and_leaves_the_others(ladder, tmp_path):
    path = tmp_path / "nan" / "student.safetensors"
    tensors, description = files.load(ladder / "student.safetensors")
    tensors["unet.conv_out.bias"] = torch.full_like(tensors["unet.conv_out.bias"], float("nan"))
    files.save(path, tensors, {k: v for k, v in description.items() if k != "format"})
    here(evaluate.main, "--model digits", path, FEW, "--output-dir", tmp_path / "e")
    out = rows(tmp_path / "e")
    assert out["student@1 ddim 1"]["error"].startswith("image 0 of cell") and out["teacher ddim 1"]["fid"] > 0
    assert "is not finite" in (tmp_path / "e" / "report.html").read_text()


def test_a_student_is_refused_at_steps_it_was_not_made_for(ladder, tmp_path, refused):
    line = refused(evaluate.main, "--steps 4 --model", ladder / "student.safetensors", "--output-dir", tmp_path / "e")
    assert "was distilled for 1 steps; --steps names 4" in line


def test_a_student_with_another_sampler_has_the_numbers_of_a_file_that_names_it(ladder, tmp_path, refused):
    common = "--images 60 --chunk 60 --steps 2 --threads 1 --output-dir"
    evaluate.main(words("--model", ladder, common, tmp_path / "e", "--student-samplers ddim consistency:1"))
    found = rows(tmp_path / "e")
    assert [*found] == ["student@2 with ddim ddim 2", "student@2 with consistency:1 consistency:1 2"]
    assert [*curves([*found.values()])] == ["student with ddim", "student with consistency:1"]
    student = teachers.load(str(ladder / "stages" / "2"))
    teachers.save(tmp_path / "student.safetensors", replace(student, sampling=Sampling.parse("consistency:1", steps=(2,))))
    evaluate.main(words("--model", tmp_path / "student.safetensors", common, tmp_path / "f"))
    (row,) = rows(tmp_path / "f").values()
    ddim, fresh = (one["fid"] for one in found.values())
    assert row["fid"] == fresh != ddim
    evaluate.main(words("--model", ladder, FEW, "--output-dir", tmp_path / "one", "--student-samplers ddim consistency:1"))
    assert [*rows(tmp_path / "one")] == ["student@1 ddim 1"]
    line = refused(evaluate.main, "--model", ladder, common, tmp_path / "g", "--student-samplers jump")
    assert "sampler 'jump' needs a two-time network" in line and not (tmp_path / "g").exists()


def test_sample_finds_the_stage_of_a_step_count_in_a_run_and_overwrites_nothing(ladder, tmp_path, capsys, refused):
    for name, model in (("run", (ladder, "--steps 2")), ("stage", (ladder / "stages/2",))):
        sample.main(words("--model", *model, "--images 4 --output", tmp_path / f"{name}.png"))
    assert (tmp_path / "run.png").read_bytes() == (tmp_path / "stage.png").read_bytes()
    assert "4 images, ddim with 2 steps" in capsys.readouterr().out
    assert "exists: name another" in refused(sample.main, "--output", tmp_path / "run.png")


def test_every_recipe_has_a_smoke_preset(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    classifier.main(words("--preset smoke --output-dir c"))
    sample.main(words("--preset smoke --steps 1 --output s.png"))
    assert all((tmp_path / file).stat().st_size for file in ("c/digits.safetensors", "s.png"))
    for name in commands():
        assert "smoke" in importlib.import_module(f"recipes.{name}").PRESETS, name
