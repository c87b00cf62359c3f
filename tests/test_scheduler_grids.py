"""The times of a pipeline's own scheduler, for the configurations that published models have."""

import diffusers
import pytest
import torch
from pipelines import PROMPTS, sd

import teachers
from distill.samplers import ddim
from distill.schedule import Flow
from teachers import diffusers_scheduler
from teachers.networks.records import RECORDS

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
LEVELS = {  # with a list of noise levels: class -> options beside the table
    "Euler": ("EulerDiscreteScheduler", {}),
    "Euler, karras": ("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
    "Euler, trailing": ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}),
    "Euler ancestral": ("EulerAncestralDiscreteScheduler", {"timestep_spacing": "leading", "steps_offset": 1}),
    "DPM++ 2M": ("DPMSolverMultistepScheduler", {}),
    "DPM++ 2M, karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "DPM++ 2M SDE, karras": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True}),
    "DPM++ 2M, log-SNR": ("DPMSolverMultistepScheduler", {"use_lu_lambdas": True}),
    "DPM++ 2S": ("DPMSolverSinglestepScheduler", {"use_karras_sigmas": True}),
    "UniPC": ("UniPCMultistepScheduler", {}),
    "UniPC, exponential": ("UniPCMultistepScheduler", {"use_exponential_sigmas": True}),
    "DEIS": ("DEISMultistepScheduler", {}),
    "LMS": ("LMSDiscreteScheduler", {"use_karras_sigmas": True}),
    "Heun": ("HeunDiscreteScheduler", {}),
    "Heun, karras": ("HeunDiscreteScheduler", {"use_karras_sigmas": True}),
    "KDPM2": ("KDPM2DiscreteScheduler", {}),
    "KDPM2 ancestral": ("KDPM2AncestralDiscreteScheduler", {"use_karras_sigmas": True}),
}


def config_of(scheduler):
    return {**scheduler.config, "_class_name": type(scheduler).__name__}


SLOW = ("KDPM2", "KDPM2 ancestral")  # their constructors take seconds


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in LEVELS])
def test_the_times_of_a_scheduler_are_at_its_own_noise_levels(name):
    kind, options = LEVELS[name]
    theirs = getattr(diffusers, kind)(**SD, **options)
    theirs.set_timesteps(8)
    times = diffusers_scheduler.times(config_of(theirs), 8, (4, 64, 64))
    schedule = diffusers_scheduler.read(config_of(theirs), "it").schedule
    expected = torch.unique_consecutive(theirs.sigmas[theirs.sigmas > 0].double())
    assert len(times) == 9 and float(times[-1]) == 0 and len(expected) in (8, 9)
    assert torch.allclose(schedule.level(times[:-1]), expected[:8], rtol=1e-4)


@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "LCMScheduler", "TCDScheduler"])
def test_the_times_of_a_scheduler_of_entries_are_at_its_own_entries(name):
    theirs = getattr(diffusers, name)(**SD, **({"skip_prk_steps": True} if name == "PNDMScheduler" else {}))
    theirs.set_timesteps(10)
    times = diffusers_scheduler.times(config_of(theirs), 10, (4, 64, 64))
    schedule = diffusers_scheduler.read(config_of(theirs), "it").schedule
    entries = list(dict.fromkeys(theirs.timesteps.tolist()))
    assert len(times) == 11 and torch.allclose(
        schedule.alpha(times[:-1]) ** 2, theirs.alphas_cumprod[entries].double(), rtol=1e-5
    )


FLOWS = {
    "static shift": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, "SD3Transformer2DModel"),
    "Heun": ("FlowMatchHeunDiscreteScheduler", {"shift": 3.0}, "SD3Transformer2DModel"),
    "karras": ("FlowMatchEulerDiscreteScheduler", {"use_karras_sigmas": True}, "SanaTransformer2DModel"),
    "flow sigmas of DPM++": (
        "DPMSolverMultistepScheduler",
        {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0},
        "SanaTransformer2DModel",
    ),
}


@pytest.mark.parametrize("name", FLOWS)
def test_the_times_of_a_flow_scheduler_are_its_own(name):
    kind, options, network = FLOWS[name]
    theirs = getattr(diffusers, kind)(**options)
    theirs.set_timesteps(6)
    config = config_of(theirs)
    assert diffusers_scheduler.read(config, "it").schedule == Flow()
    times = diffusers_scheduler.times(config, 6, (16, 64, 64), RECORDS[network].grid)
    assert torch.allclose(times, torch.unique_consecutive(theirs.sigmas).double(), atol=1e-6)


def test_eulers_method_along_the_times_of_an_euler_scheduler_gives_the_latents_of_its_pipeline(tmp_path):
    made = sd(tmp_path / "words")
    made.scheduler = diffusers.EulerDiscreteScheduler(**SD, timestep_spacing="trailing", prediction_type="v_prediction")
    made.save_pretrained(tmp_path / "pipeline")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    teacher = teachers.load(f"{tmp_path / 'pipeline'},prompts={tmp_path / 'prompts.txt'}")
    noise = torch.randn(2, *teacher.shape)
    options = {"num_inference_steps": 5, "guidance_scale": 1.0, "output_type": "latent", "height": 16, "width": 16}
    expected = made(PROMPTS[:2], latents=noise, **options).images
    times = diffusers_scheduler.times(teacher.record["scheduler"], 5, teacher.shape)
    schedule = teacher.denoiser.schedule
    start = noise * schedule.sigma(times[0])  # the pipeline has level times noise
    with torch.no_grad():
        x0 = ddim(teacher.denoiser, start.float(), times, **teacher.condition(torch.tensor([0, 1])))
    assert torch.allclose(x0, expected, atol=1e-4 * float(expected.std()))
