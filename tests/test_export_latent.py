"""Students of every latent family are exported into the stock pipeline of their teacher, which gives the pixels of our sampler."""

import shutil
from dataclasses import replace

import pytest
import torch
from conftest import refuses
from pipelines import FAMILIES, PROMPTS, dit, ldm, sd, sd3, vae

import teachers
from distill.sampling import Sampling
from teachers.export import deliver, latent
from teachers.hub import read_json
from teachers.lora import rounded, with_adapter
from teachers.networks.records import ENCODERS
from teachers.students import untrained

pytestmark = pytest.mark.slow


def student(tmp_path, made, sampler, steps):
    """A model of the pipeline with other weights, loaded from its own file."""
    made.save_pretrained(tmp_path / "origin")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    spec = str(tmp_path / "origin")
    prompted = type(made).__name__ in ENCODERS
    teacher = teachers.load(f"{spec},prompts={tmp_path / 'prompts.txt'}" if prompted else spec)
    with torch.no_grad():
        for p in teacher.denoiser.net.parameters():
            p.mul_(1.05)
    teachers.save(tmp_path / "s.safetensors", replace(teacher, sampling=Sampling.parse(sampler, steps=steps)))
    return teachers.load(f"{tmp_path / 's.safetensors'}" + (f",prompts={tmp_path / 'prompts.txt'}" if prompted else ""))


CASES = dict.fromkeys(FAMILIES, ("consistency:0.5", (1, 2, 4)))
CASES |= dict.fromkeys(("DiT", "SD3", "latent of a VQ model", "latent of a KL model"), ("ddim", (1, 4)))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_student_is_exported_into_its_teachers_own_pipeline(tmp_path, family, request):
    if family != "SDXL":  # which runs in a process with diffusers alone
        request.getfixturevalue("stock_here")
    sampler, steps = CASES[family]
    made = FAMILIES[family](tmp_path / "parts")
    model = student(tmp_path, made, sampler, steps)
    worst = deliver.export_pipelines(model, tmp_path / "out")
    assert worst and max(worst.values()) < 1e-4
    images = deliver.own_pixels(model, steps[-1], None if model.classes is None else [0, 1], [0, 1])
    assert images.std() > 0.01 and len(images.unique()) > 100
    theirs = read_json(tmp_path / "out" / "pipeline" / "model_index.json", "")
    assert theirs["_class_name"] == type(made).__name__
    again = f"{tmp_path / 'out' / 'pipeline'}" + (f",prompts={tmp_path / 'prompts.txt'}" if model.embeddings else "")
    x, t = torch.randn(2, *model.shape), torch.tensor(0.5)
    cond = model.condition(torch.tensor([0, 1]))
    assert torch.allclose(teachers.load(again).denoiser(x, t, **cond), model.denoiser(x, t, **cond), atol=1e-3)


def test_what_a_stock_pipeline_cannot_do_is_refused_in_one_line(tmp_path):
    for made, sampler, steps, message in (
        (dit(tmp_path), "consistency:0.5", (2,), "a DiTPipeline draws noise without a generator"),
        (sd3(tmp_path / "words"), "consistency:0.5", (1, 2), "flow pipelines add no noise between steps"),
        (sd(tmp_path / "words"), "ddim", (3,), "3 steps of ddim do not meet the 1000 entries"),
        (sd(tmp_path / "words"), "consistency:0.5", (8,), "8 steps of consistency:0.5 do not meet"),
        (ldm(tmp_path, vae()), "jump", (1,), "cannot hold a UNet2DModel conditioned on nothing and sampled by jump"),
    ):
        model = student(tmp_path, made, sampler, steps)
        refuses(message, deliver.check_exportable, model)
        shutil.rmtree(tmp_path / "origin")


def test_a_network_that_is_not_the_pipelines_own_is_refused_before_anything_is_trained(tmp_path):
    of_sd = student(tmp_path, sd(tmp_path / "words"), "ddim", (1,))
    for classes, conditions in ((None, "nothing"), (10, "labels")):
        model = replace(untrained((4, 8, 8), classes, (8, 16), 1, 0), codec=of_sd.codec)
        message = f"a StableDiffusionPipeline, ... hold a UNet2DModel conditioned on {conditions}"
        refuses(message, deliver.check_exportable, model)
    shutil.rmtree(tmp_path / "origin")
    of_ldm = student(tmp_path, ldm(tmp_path, vae()), "ddim", (1,))
    message = "a LDMPipeline, which cannot hold a UNet2DModel conditioned on labels"
    refuses(message, deliver.check_exportable, replace(model, codec=of_ldm.codec))


def test_other_time_grids_are_refused_on_flows_and_consistency_sampling_is_exact(tmp_path, stock_here):
    flow = student(tmp_path, sd3(tmp_path / "words"), "ddim", (2,))
    elsewhere = replace(flow, sampling=replace(flow.sampling, times={2: (1.0, 0.3, 0.0)}))
    refuses("no pipeline supports the time grid of 2 steps", deliver.check_exportable, elsewhere)
    shutil.rmtree(tmp_path / "origin")
    model = student(tmp_path, sd(tmp_path / "words"), "consistency", (1, 2, 4))
    assert deliver.export_pipelines(model, tmp_path / "out")["pipeline"] < 1e-4


def test_the_scheduler_of_a_flow_has_the_uniform_grid():
    for n in (1, 2, 5):
        made = latent.flow_scheduler(n)
        made.set_timesteps(n)
        assert torch.allclose(made.sigmas, torch.linspace(1, 0, n + 1), atol=1e-6)


def test_the_plan_says_before_training_why_no_pipeline_will_hold_a_student(tmp_path):
    sd3(tmp_path / "words").save_pretrained(tmp_path / "sd3")
    model = teachers.load(str(tmp_path / "sd3"))
    for one in (model, with_adapter(rounded(model), str(tmp_path / "sd3"), 2)):
        before = {name: weight.data_ptr() for name, weight in one.tensors().items()}
        noisy, plain = (replace(one, sampling=Sampling.parse(name, steps=(2,))) for name in ("consistency:0.5", "ddim"))
        assert "flow pipelines add no noise between steps" in (deliver.reason_against(noisy) or "")
        assert deliver.reason_against(plain) is None
        assert before == {name: weight.data_ptr() for name, weight in one.tensors().items()}
