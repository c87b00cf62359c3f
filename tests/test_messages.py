"""What a user reads on the way: messages name what helps, and stock libraries have nothing to warn of."""

import warnings

import diffusers
import numpy as np
import pytest
import torch
from conftest import ROOT, words
from pipelines import sd

import teachers
from distill.sampling import Sampling
from distill.schedule import Table
from eval.features import Extractor
from recipes import consistency
from teachers.export import latent
from teachers.hub import assemble


def test_colour_images_for_the_features_of_digits_name_the_features_that_take_them():
    with pytest.raises(ValueError, match=r"cannot take images of shape .3, 32, 32.") as refused:
        Extractor.create("digits").fits((3, 32, 32))
    assert "inception-v3-compat" in str(refused.value) and "recipes/classifier.py" in str(refused.value)
    assert len(str(refused.value)) <= 280  # beyond it `recipes.common.cli.fail` cuts the middle out


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    sd(folder / "words").save_pretrained(folder / "sd")
    return folder / "sd"


@pytest.mark.parametrize("fresh", [0.0, 0.5])
def test_the_scheduler_of_a_text_student_goes_into_stable_diffusion_without_a_warning(pipeline, fresh, monkeypatch):
    monkeypatch.setattr(latent, "noisy", lambda model: fresh > 0)
    table = Table(tuple(np.cos(np.linspace(0.01, 1.5, 100)) ** 2))
    model = type("Model", (), {"parametric": type("P", (), {"schedule": table, "prediction": "v"})})
    scheduler = latent.table_scheduler(model, [1, 2, 4])
    plain = type(scheduler).from_config(scheduler.config, steps_offset=0)
    for steps in (1, 2, 4):
        for one in (scheduler, plain):
            one.set_timesteps(steps)
        assert torch.equal(scheduler.timesteps, plain.timesteps)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        warnings.filterwarnings("ignore", ".*dtype", FutureWarning)
        assemble(diffusers.StableDiffusionPipeline, pipeline, {"scheduler": scheduler})


def test_a_pipeline_is_loaded_without_a_warning(pipeline):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = assemble(diffusers.StableDiffusionPipeline, pipeline, {})
    assert loaded.unet.dtype == torch.float32


@pytest.mark.parametrize("page", ["docs/tutorials/text.md", "docs/memory.md"])
def test_the_documents_set_the_scheduler_and_the_noise_of_a_cd_student(page, monkeypatch):
    """Another class gives images that are not numbers."""
    sampling = Sampling.parse(consistency.METHODS["cd"].sampler, steps=(1, 2, 4))
    model = type("Model", (), {"sampling": sampling})
    monkeypatch.setattr(latent, "steps_of", lambda model: [1, 2, 4])
    assert latent.noisy(model) and f"eta={sampling.fresh:g})" in (text := (ROOT / page).read_text())
    assert 'pipeline.scheduler = TCDScheduler.from_pretrained("runs/mine/lora"' in text


@pytest.mark.slow
def test_the_plan_of_prompts_does_not_call_them_images(pipeline, tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tests"))
    (tmp_path / "prompts.txt").write_text("a cat\ntwo dogs\n")
    flags = "--preset smoke --batch-size 8 --images 40 --chunk 40 --sweep-steps 1 --features test_latent_runs:Pool --dry-run"
    run = words("--teacher", pipeline, "--data", f"prompts:{tmp_path / 'prompts.txt'}", flags, "--output-dir", tmp_path / "run")
    with pytest.raises(SystemExit) as ended:
        consistency.main(run)
    assert ended.value.code == 0 and "prompts: 2 prompts, samples of 4x" in capsys.readouterr().out


def test_the_run_of_a_teacher_is_a_teacher(tmp_path):
    teachers.save(tmp_path / "teacher.safetensors", teachers.load("digits"))
    assert teachers.load(str(tmp_path)).fingerprint == teachers.load("digits").fingerprint
