"""Every class of network with a record has the E[x0 | x_t], steps and images of its own pipeline."""

import pytest
import torch
from flow_pipelines import FLOWS
from pipelines import PROMPTS

import teachers
from distill.samplers import ddim
from distill.schedule import Flow

CALLS = {  # guidance in our convention -> arguments of the pipeline's call
    "Flux schnell": lambda w: {"true_cfg_scale": w, "negative_prompt": ["", ""]},
    "Flux dev": lambda w: {"true_cfg_scale": w, "negative_prompt": ["", ""], "guidance_scale": 3.5},
    "Chroma": lambda w: {"guidance_scale": w},
    "Flux2 klein": lambda w: {"guidance_scale": w},
    "Qwen-Image": lambda w: {"true_cfg_scale": w, "negative_prompt": ["", ""]} if w > 1 else {},
    "Z-Image": lambda w: {"guidance_scale": w - 1},
    "Sana": lambda w: {"guidance_scale": w, "use_resolution_binning": False},
    "Lumina2": lambda w: {"guidance_scale": w},
}
SIDES = {"Lumina2": 64, "Sana": 32}  # the pipeline of Lumina2 takes latents to be 8 times smaller than the image
SIZED = ("Sana", "Lumina2")  # their configurations state the size of the latents


@pytest.fixture(scope="module", params=FLOWS)
def family(request, tmp_path_factory):
    """Name, pipeline and teacher of one class."""
    folder = tmp_path_factory.mktemp("flows")
    torch.manual_seed(0)
    made = FLOWS[request.param](folder / "parts")
    made.save_pretrained(folder / "pipeline")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    pipeline = type(made).from_pretrained(folder / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    size = "" if request.param in SIZED else ",size=16"
    return request.param, pipeline, teachers.load(f"{folder / 'pipeline'},prompts={folder / 'prompts.txt'}{size}")


def watched(name, pipeline, guidance, steps):
    """Run a pipeline. Returns its images [B, C, H, W] in [0, 1], its sigmas, and (latents, output) of each step as [B, C, H, W]."""
    seen, step, side = [], pipeline.scheduler.step, SIDES.get(name, 16)

    def spread(tokens):
        if tokens.dim() == 4:
            return tokens
        if name == "Flux2 klein":
            return tokens.transpose(1, 2).unflatten(2, (4, 4))
        return pipeline._unpack_latents(tokens, 16, 16, pipeline.vae_scale_factor).reshape(len(tokens), -1, 8, 8)

    def watch(output, t, x, **options):
        seen.append((spread(x), spread(output)))
        return step(output, t, x, **options)

    pipeline.scheduler.step = watch
    options = {"generator": torch.Generator().manual_seed(5), "height": side, "width": side, "output_type": "np"}
    try:
        images = pipeline(prompt=PROMPTS[1:], num_inference_steps=steps, **options, **CALLS[name](guidance)).images
    finally:
        pipeline.scheduler.step = step
    return torch.from_numpy(images).permute(0, 3, 1, 2), pipeline.scheduler.sigmas, seen


def again(model, tmp_path):
    """The model from its own file."""
    teachers.save(tmp_path / "model.safetensors", model)
    return teachers.load(str(tmp_path / "model.safetensors"))


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_eulers_method_gives_the_steps_and_the_images_of_the_pipeline(family, guidance, tmp_path):
    name, pipeline, teacher = family
    images, sigmas, seen = watched(name, pipeline, guidance, 3)
    noise = torch.randn((2, *teacher.shape), generator=torch.Generator().manual_seed(5))
    assert len(seen) == 3 and teacher.denoiser.schedule == Flow() and torch.equal(seen[0][0], noise)
    for model in (teacher, again(teacher, tmp_path)):
        denoiser, cond = model.guided(guidance), model.condition(torch.tensor([1, 2]))
        with torch.no_grad():
            for sigma, (x, output) in zip(sigmas, seen, strict=False):
                assert torch.allclose(denoiser(x, sigma, **cond), x - sigma * output, atol=1e-5)
            x0 = ddim(denoiser, noise, sigmas.double(), **cond)
        assert torch.allclose((model.decode(x0) / 2 + 0.5).clamp(0, 1), images, atol=1e-4)
    assert images.std() > 0.01 and ((images > 0) & (images < 1)).float().mean() > 0.1
