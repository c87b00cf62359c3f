"""Pipelines that are easily read wrongly: they have the prediction of their own pipeline, or are refused in one line."""

import json
import shutil

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    EDMEulerScheduler,
    PixArtAlphaPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from pipelines import DDIM, PROMPTS, ldm, pixart, sd, sd3, text_unet, unet, vae, xl
from safetensors.torch import load_file, save_file

import teachers
from teachers.export import latent

ONE = {"guidance_scale": 1.0, "output_type": "latent"}


@pytest.fixture()
def prompts(tmp_path):
    """The option of a spec with a file of prompts."""
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    return f",prompts={tmp_path / 'prompts.txt'}"


def quiet(cls, folder, **options):
    pipeline = cls.from_pretrained(folder, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_a_pixart_of_1024_is_given_the_resolution_that_its_own_pipeline_gives(tmp_path, prompts):
    """Its autoencoder here halves images twice less than the published one: 256 pixels of 128 latents."""
    wide = {"attention_head_dim": 12, "cross_attention_dim": 24, "sample_size": 128, "patch_size": 16}
    pixart(tmp_path, PixArtAlphaPipeline, **wide).save_pretrained(tmp_path / "pipeline")
    pipeline, teacher = quiet(PixArtAlphaPipeline, tmp_path / "pipeline"), teachers.load(f"{tmp_path / 'pipeline'}{prompts}")
    noise, plain = torch.randn(2, 4, 128, 128), {"use_resolution_binning": False, "clean_caption": False}
    expected = pipeline(PROMPTS[:2], num_inference_steps=1, latents=noise, **plain, **ONE).images
    teachers.save(tmp_path / "m.safetensors", teacher)
    for model in (teacher, teachers.load(f"{tmp_path / 'm.safetensors'}{prompts}")):
        with torch.no_grad():
            found = model.denoiser(noise, torch.tensor(1.0), **model.condition(torch.tensor([0, 1])))
        assert float((found - expected).abs().max() / expected.std()) < 1e-4


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_an_sdxl_with_an_edm_scheduler_has_the_x0_of_each_step_of_its_pipeline(tmp_path, prompts, prediction):
    made = xl(tmp_path / "words")
    made.scheduler = EDMEulerScheduler(prediction_type=prediction, sigma_data=0.7)
    made.save_pretrained(tmp_path / "pipeline")
    pipeline, teacher = (
        quiet(StableDiffusionXLPipeline, tmp_path / "pipeline"),
        teachers.load(f"{tmp_path / 'pipeline'}{prompts}"),
    )
    theirs, step = [], pipeline.scheduler.step

    def watched(output, t, x, **options):
        sigma = pipeline.scheduler.sigmas[len(theirs)]
        out = step(output, t, x, **options | {"return_dict": True})
        theirs.append((x, sigma.double(), out.pred_original_sample))
        return (out.prev_sample,)

    pipeline.scheduler.step = watched
    pipeline(PROMPTS[:2], num_inference_steps=4, **ONE)
    assert len(theirs) == 4
    for x, sigma, expected in theirs:
        with torch.no_grad():
            found = teacher.denoiser(x, sigma, **teacher.condition(torch.tensor([0, 1])))
        assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("stated", ["null", "absent"])
def test_a_stable_diffusion_3_without_its_third_text_encoder_is_its_pipeline_without_it(tmp_path, prompts, stated):
    made, folder = sd3(tmp_path / "words"), tmp_path / "pipeline"
    made.save_pretrained(folder)
    shutil.rmtree(folder / "text_encoder_3")
    if stated == "null":
        shutil.rmtree(folder / "tokenizer_3")
        index = json.loads((folder / "model_index.json").read_text())
        (folder / "model_index.json").write_text(
            json.dumps(index | {"text_encoder_3": [None, None], "tokenizer_3": [None, None]})
        )
    pipeline = quiet(StableDiffusion3Pipeline, folder, text_encoder_3=None, tokenizer_3=None)
    teacher = teachers.load(f"{folder}{prompts}")
    noise = torch.randn(2, 4, 8, 8)
    for guidance in (1.0, 3.0):
        options = ONE | {"guidance_scale": guidance, "height": 16, "width": 16}
        expected = pipeline(PROMPTS[:2], num_inference_steps=1, latents=noise, **options).images
        with torch.no_grad():
            x0 = teacher.guided(guidance)(noise, torch.tensor(1.0), **teacher.condition(torch.tensor([0, 1])))
        assert torch.allclose(x0, expected, atol=1e-4)
    assert teacher.record["without"] == ["text_encoder_3", "tokenizer_3"]


def inpainting(folder):
    made = sd(folder / "words")
    parts = (made.vae, made.text_encoder, made.tokenizer, text_unet(in_channels=9), made.scheduler, None, None)
    return StableDiffusionPipeline(*parts, requires_safety_checker=False)


def test_a_network_that_takes_more_than_a_noisy_sample_is_refused_in_one_line(tmp_path, prompts):
    upscaling = DDPMPipeline(unet(in_channels=6), DDIMScheduler(**DDIM))
    for number, (made, option, message) in enumerate((
        (inpainting(tmp_path), prompts, "takes 9 channels and returns 4, its latents have 4; .* no inpainting"),
        (upscaling, "", "takes 6 channels and returns 3; .* no upscaling"),
    )):  # fmt: skip
        made.save_pretrained(tmp_path / str(number))
        with pytest.raises(ValueError, match=message) as error:
            teachers.load(f"{tmp_path / str(number)}{option}")
        assert "\n" not in str(error.value) and len(str(error.value).replace(str(tmp_path), "")) < 250


@pytest.fixture()
def folder(tmp_path):
    """A small pipeline of a latent model."""
    ldm(tmp_path, vae()).save_pretrained(tmp_path / "pipeline")
    return tmp_path / "pipeline"


@pytest.mark.parametrize("name", ["pytorch_lora_weights.safetensors", "unet/adapter_config.json", "unet/adapter_model.bin"])
def test_the_file_of_an_adapter_in_a_pipeline_is_refused_in_one_line(folder, name):
    (folder / name).write_bytes(b"{}")
    with pytest.raises(
        ValueError, match=f"{name} is an adapter, which would be ignored; accepted are weights with the adapter"
    ) as e:
        teachers.load(str(folder))
    assert "\n" not in str(e.value) and len(str(e.value).replace(str(folder), "")) < 250


def test_weights_of_an_adapter_that_is_not_fused_and_other_weights_that_do_not_fit_are_refused_in_one_line(folder):
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    name = "conv_in.weight"
    unfused = {k: v for k, v in weights.items() if k != name}
    unfused |= {"conv_in.base_layer.weight": weights[name], "conv_in.lora_A.default.weight": torch.zeros(2, 3, 3, 3)}
    missing = {k: v for k, v in weights.items() if k != name}
    for tensors, message in (
        (
            unfused,
            "2 weights of unet are left over, such as conv_in.base_layer.weight; accepted are weights with the adapter fused",
        ),
        (weights | {"another.weight": torch.zeros(1)}, "1 weights of unet are left over, such as another.weight$"),
        (missing, "1 weights of unet are missing, such as conv_in.weight$"),
    ):
        save_file(tensors, path, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=message) as error:
            teachers.load(str(folder))
        assert "\n" not in str(error.value)


def test_weights_that_a_pipeline_has_only_as_a_variant_are_found_in_all_of_its_components(tmp_path, prompts):
    """The students' file finds the autoencoder again. All of it is evaluated in float32."""
    made = sd(tmp_path / "words").to(torch.float16)
    made.save_pretrained(tmp_path / "pipeline", variant="fp16")
    rounded = made.to(torch.float32)
    rounded.save_pretrained(tmp_path / "plain")
    found, expected = (teachers.load(f"{tmp_path / name}{prompts}") for name in ("pipeline", "plain"))
    teachers.save(tmp_path / "m.safetensors", found)
    x, t = torch.randn(2, *found.shape), torch.tensor(0.5)
    for model in (found, teachers.load(f"{tmp_path / 'm.safetensors'}{prompts}")):
        outputs = [m.denoiser(x, t, **m.condition(torch.tensor([0, 1]))) for m in (model, expected)]
        assert torch.equal(*outputs) and torch.equal(model.decode(x), expected.decode(x))
        made = latent.stock(model, [1], None)  # the pipeline of an export
        assert made.text_encoder.dtype == torch.float32 and torch.equal(made.unet.conv_in.weight, rounded.unet.conv_in.weight)


def test_one_of_several_weights_is_chosen_by_its_variant(folder):
    made = quiet(type(ldm(folder, vae())), folder)
    for p in made.unet.parameters():
        p.data.mul_(2)
    made.save_pretrained(folder, variant="ema")
    doubled, plain = (teachers.load(f"{folder}{option}").denoiser.net.unet for option in (",variant=ema", ""))
    assert torch.equal(doubled.conv_in.weight, 2 * plain.conv_in.weight)
    made.save_pretrained(folder, variant="fp16")
    for option, message in (
        (",variant=bf16", "unet has no weights of variant 'bf16'"),
        (",variant=", "unknown option 'variant='"),
    ):
        with pytest.raises(ValueError, match=message):
            teachers.load(f"{folder}{option}")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ValueError, match="unet has no plain weights; accepted is variant=ema or variant=fp16"):
        teachers.load(str(folder))
