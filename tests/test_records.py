"""Every class of network with a record has the E[x0 | x_t], steps and images of its own pipeline."""

from dataclasses import replace

import diffusers
import pytest
import torch
from conftest import refuses
from flow_pipelines import FLOWS, flux, flux2
from pipelines import PROMPTS, WIDTH, randomized, sd, vae, xl

import teachers
from distill.denoiser import Denoiser
from distill.samplers import ddim
from distill.sampling import Sampling
from distill.schedule import Flow
from teachers import diffusers_scheduler
from teachers.export import deliver
from teachers.networks import conditional
from teachers.networks.records import RECORDS
from teachers.probe import probe

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
SIDES = {"Lumina2": 64, "Sana": 32}
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


def own_times(pipeline, teacher, steps):
    """The grid of the pipeline's scheduler, from its configuration."""
    grid = RECORDS[type(pipeline.transformer).__name__].grid
    return diffusers_scheduler.times(teacher.record["scheduler"], steps, teacher.shape, grid)


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
    """The model from its own file, which holds no prompts."""
    teachers.save(tmp_path / "model.safetensors", model)
    return teachers.load(str(tmp_path / "model.safetensors")).with_conditions(model.embeddings)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_eulers_method_gives_the_steps_and_the_images_of_the_pipeline(family, guidance, tmp_path):
    name, pipeline, teacher = family
    images, sigmas, seen = watched(name, pipeline, guidance, 3)
    noise = torch.randn((2, *teacher.shape), generator=torch.Generator().manual_seed(5))
    assert len(seen) == 3 and teacher.denoiser.schedule == Flow() and torch.equal(seen[0][0], noise)
    assert torch.allclose(own_times(pipeline, teacher, 3), sigmas.double(), atol=1e-6)
    for model in (teacher, again(teacher, tmp_path)):
        denoiser, cond = model.guided(guidance), model.condition(torch.tensor([1, 2]))
        with torch.no_grad():
            for sigma, (x, output) in zip(sigmas, seen, strict=False):
                assert torch.allclose(denoiser(x, sigma, **cond), x - sigma * output, atol=1e-5)
            x0 = ddim(denoiser, noise, sigmas.double(), **cond)
        assert torch.allclose((model.decode(x0) / 2 + 0.5).clamp(0, 1), images, atol=1e-4)
    assert images.std() > 0.01 and ((images > 0) & (images < 1)).float().mean() > 0.1


def test_the_autoencoder_is_inverted_by_its_encoder_as_its_own_decoder_is(family):
    _, pipeline, teacher = family
    images = torch.rand(2, 3, *teacher.image_shape[1:]) * 2 - 1
    vae, frames = pipeline.vae, teacher.codec.source["class"] == "AutoencoderKLQwenImage"
    out = vae.encode(images.unsqueeze(2) if frames else images)
    expected = vae.decode(out.latent if hasattr(out, "latent") else out.latent_dist.mean).sample.reshape(images.shape)
    latents = teacher.codec.encode(images)
    assert latents.shape[1:] == teacher.shape and torch.allclose(teacher.decode(latents), expected, atol=1e-4)


def test_sdxl_with_a_mean_and_deviation_per_channel_gives_the_images_of_its_pipeline(tmp_path):
    statistics = {"latents_mean": [0.3, -0.2, 0.1, 0.5], "latents_std": [0.7, 1.5, 2.0, 0.9], "scaling_factor": 0.5}
    made = xl(tmp_path / "parts")
    made.vae = vae(**statistics)
    made.save_pretrained(tmp_path / "pipeline")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    teacher = teachers.load(f"{tmp_path / 'pipeline'},prompts={tmp_path / 'prompts.txt'}")
    noise = torch.randn(2, *teacher.shape)
    options = {"num_inference_steps": 1, "guidance_scale": 1.0, "output_type": "pt", "height": 16, "width": 16}
    expected = made(PROMPTS[:2], latents=noise, **options).images
    with torch.no_grad():
        x0 = teacher.denoiser(noise, torch.tensor(1.0), **teacher.condition(torch.tensor([0, 1])))
    assert torch.allclose((teacher.decode(x0) / 2 + 0.5).clamp(0, 1), expected, atol=1e-4)


def saved(made, folder):
    """The spec of a pipeline with its prompts."""
    made.save_pretrained(folder / "pipeline")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    return f"{folder / 'pipeline'},prompts={folder / 'prompts.txt'}"


def test_an_embedded_guidance_scale_is_an_option_of_the_spec_and_is_kept_in_the_file(tmp_path):
    made = flux(tmp_path / "parts", guidance=True)
    spec = saved(made, tmp_path) + ",size=16"
    x, t = torch.randn(2, 4, 8, 8), torch.tensor(0.6)
    for number, expected in (("", 3.5), (",guidance=7", 7.0)):
        teacher = teachers.load(spec + number)
        cond = teacher.condition(torch.tensor([0, 1]))
        ids = {"txt_ids": torch.zeros(512, 3), "img_ids": made._prepare_latent_image_ids(2, 4, 4, "cpu", torch.float32)}
        inputs = {"encoder_hidden_states": cond["text"], "pooled_projections": cond["pooled"], **ids}
        tokens = made._pack_latents(x, 2, 4, 8, 8)
        with torch.no_grad():
            v = made.transformer(tokens, timestep=t.repeat(2), guidance=torch.tensor([expected] * 2), **inputs).sample
            for model in (teacher, again(teacher, tmp_path)):
                x0 = x - t * made._unpack_latents(v, 16, 16, 2)
                assert torch.allclose(model.denoiser(x, t, **cond), x0, atol=1e-5)


def test_flux2_dev_takes_the_steps_of_its_pipeline(tmp_path):
    """The text encoder of this pipeline is left out: the embeddings are given."""
    klein = flux2(tmp_path)
    net = diffusers.Flux2Transformer2DModel.from_config(klein.transformer.config, guidance_embeds=True)
    pipeline = diffusers.Flux2Pipeline(klein.scheduler, klein.vae, None, None, randomized(net).eval())
    text, noise = torch.randn(2, 9, 3 * WIDTH), torch.randn(2, 16, 4, 4)
    options = {
        "prompt_embeds": text,
        "latents": noise,
        "height": 16,
        "width": 16,
        "guidance_scale": 6.0,
        "output_type": "latent",
    }
    expected = pipeline(num_inference_steps=3, **options).images.transpose(1, 2).unflatten(2, (4, 4))
    denoiser = Denoiser(conditional.wrap(net, 6.0)[0], Flow(), "flow", "thousand_time")
    with torch.no_grad():
        x0 = ddim(denoiser, noise, pipeline.scheduler.sigmas.double(), text=text)
    assert torch.allclose(x0, expected, atol=1e-5)


def test_an_option_that_the_network_cannot_have_is_refused_in_one_line(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    schnell, unet_spec = saved(flux(tmp_path / "parts"), one), saved(sd(tmp_path / "words"), two)
    assert teachers.load(f"{schnell},size=16x24").image_shape == (3, 16, 24)
    assert teachers.load(f"{schnell}").shape == (4, 128, 128)
    assert teachers.load(f"{unet_spec},size=24x32").image_shape == (3, 24, 32)
    for spec, message in (
        (f"{schnell},guidance=3", "guidance=3: a FluxTransformer2DModel without guidance_embeds has no such input"),
        (f"{schnell},guidance=strong", "guidance=strong: accepted is a number"),
        (f"{unet_spec},guidance=3", "guidance=3: a UNet2DConditionModel"),
        (f"{schnell},size=18", "size=18: accepted are HEIGHTxWIDTH in pixels, multiples of 4"),
        (f"{schnell},size=16x16x16", "size=16x16x16: accepted are HEIGHTxWIDTH"),
        (f"{schnell},size=-16", "size=-16: accepted are HEIGHTxWIDTH"),
    ):
        assert len(refuses(message, teachers.load, spec)) < 250


def test_the_size_of_a_spec_is_the_size_that_sdxl_is_conditioned_on(tmp_path):
    teacher = teachers.load(f"{saved(xl(tmp_path / 'parts'), tmp_path)},size=24x32")
    assert teacher.condition(torch.tensor([0]))["time_ids"].tolist() == [[24, 32, 0, 0, 24, 32]]
    assert again(teacher, tmp_path).describe() == teacher.describe()


def test_the_probe_reads_latents_with_statistics_per_channel(family):
    _, _, teacher = family
    images, labels = torch.rand(16, 3, *teacher.image_shape[1:]) * 2 - 1, torch.arange(16) % 3
    found = probe(teacher, images, labels, levels=2, samples=2)
    assert not found.ok and "no denoiser" in found.verdict  # random weights


def test_a_class_that_the_installed_diffusers_lacks_is_named_in_one_line(tmp_path, monkeypatch):
    spec = saved(flux(tmp_path / "parts"), tmp_path)
    for name in ("FluxTransformer2DModel", "FluxPipeline"):
        with monkeypatch.context() as patch:
            patch.setattr(diffusers, name, None)
            refuses(f"has no {name}: pip install --upgrade diffusers", teachers.load, spec)


@pytest.mark.slow
def test_a_student_is_exported_into_its_teachers_own_pipeline(family, tmp_path, stock_here):
    _, _, teacher = family
    student = replace(again(teacher, tmp_path), sampling=Sampling.parse("ddim", steps=(1, 3)))
    worst = deliver.export_pipelines(student, tmp_path / "out")
    assert set(worst) == {"pipeline", "pipeline-3"} and max(worst.values()) < 1e-4
