"""The tiny text-to-image pipelines: captions, tokens, the merged text tokens, the autoencoder's loss, and the command that trains them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from conftest import here

import teachers
from distill.rng import Rng
from recipes import text_teacher
from recipes.data import sets
from teachers import autoencoder, tiny_text
from teachers.digits import captions, digits

SMALL = "--preset smoke --autoencoder-images 1024 --training-images 1024 --images 40 --steps 2"


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """An untrained autoencoder, and the tokenizer of the captions."""
    return tiny_text.autoencoder(0), tiny_text.tokenizer(captions.prompts(), tmp_path_factory.mktemp("words"))


def test_every_image_has_a_caption_of_its_digit():
    _, labels = digits()
    numbers, lines = captions.captioned(labels), captions.prompts()
    assert [captions.class_of(n) for n in numbers] == labels.tolist() and len(set(lines)) == 80
    assert set(numbers) == set(range(80)) and numbers[:50] == captions.captioned(labels[:50])
    for n, label in zip(numbers, labels.tolist(), strict=True):
        assert captions.WORDS[label] in lines[n].split() or str(label) in lines[n].split()
    assert "a handwritten seven" in lines and "a photo of an 8" in lines


@pytest.mark.slow
def test_words_of_the_captions_are_one_token_and_others_are_bytes(parts):
    words = parts[1]
    assert words.tokenize("a handwritten seven") == ["a</w>", "handwritten</w>", "seven</w>"]
    assert words.tokenize("zebra") == ["z", "e", "b", "r", "a</w>"] or len(words.tokenize("zebra")) > 1
    assert words("zebra ü").input_ids.count(words.unk_token_id) == words("").input_ids.count(words.unk_token_id)
    assert all(len(words(line).input_ids) <= tiny_text.LENGTH for line in captions.prompts())


@pytest.mark.slow
def test_random_encoders_separate_all_captions(parts):
    _, words = parts
    for projected in (False, True):
        encoder = tiny_text.text_encoder(words, 0, projected)
        lines = ["", *captions.prompts()]
        tokens = words(lines, padding="max_length", max_length=tiny_text.LENGTH, return_tensors="pt").input_ids
        out = encoder(tokens)
        rows = (out.text_embeds if projected else out.last_hidden_state).flatten(1)
        distance = torch.cdist(rows, rows) + 1e9 * torch.eye(len(rows))
        assert distance.min() > 0.1 * rows.norm(dim=1).mean()


@pytest.mark.slow
def test_equal_tokens_count_as_one_with_their_number(parts):
    """The transformer with 256 tokens of 0 in its text gives the output of the merged one."""
    net = tiny_text.network_of(tiny_text.stable_diffusion_3(*parts, 0, (16, 32)))
    torch.manual_seed(1)
    for p in net.parameters():
        p.data += 0.05 * torch.randn_like(p)
    x, t, words, pooled = (
        torch.randn(3, 4, 4, 4),
        torch.tensor([10.0, 500.0, 990.0]),
        torch.randn(3, 12, 64),
        torch.randn(3, 64),
    )
    text = torch.cat([words, torch.zeros(3, 256, 64)], 1)
    plain = net(x, timestep=t, encoder_hidden_states=text, pooled_projections=pooled, return_dict=False)[0]
    assert torch.allclose(tiny_text.Merged(net, 256)(x, t, text, pooled), plain, atol=2e-6)
    alone = net(x, timestep=t, encoder_hidden_states=text[:, :13], pooled_projections=pooled, return_dict=False)[0]
    assert not torch.allclose(alone, plain, atol=1e-4)


@pytest.mark.slow
def test_the_autoencoders_loss_is_reconstruction_and_kl(parts):
    vae, x = parts[0], torch.randn(3, 1, 8, 8)
    loss = autoencoder.Autoencoder(tiny_text.LATENTS, kl=0.1)(
        autoencoder.as_student(vae), x, rng=Rng.seeded(0, torch.device("cpu"), 3), progress=0.0
    )
    mean, logvar = vae.quant_conv(vae.encoder(x)).chunk(2, 1)
    noise = Rng.seeded(0, torch.device("cpu"), 3).normal(torch.empty(3, 64)).view_as(mean)
    made = vae.decode(mean + (logvar / 2).exp() * noise).sample
    kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).flatten(1).sum(1)
    assert torch.allclose(loss, (made - x).square().flatten(1).mean(1) + 0.1 * kl, rtol=1e-4)


@pytest.mark.slow
def test_the_latents_of_the_data_have_unit_deviation(parts):
    vae, x = tiny_text.autoencoder(3), torch.rand(300, 1, 8, 8) * 2 - 1
    autoencoder.set_scale(vae, x)
    latents = vae.encode(x).latent_dist.mean * vae.config.scaling_factor
    assert float(latents.detach().std()) == pytest.approx(1, abs=1e-4)


@pytest.mark.slow
def test_the_command_writes_pipelines_that_plain_diffusers_and_we_load(tmp_path, monkeypatch):
    from diffusers import DiffusionPipeline, StableDiffusion3Pipeline, StableDiffusionPipeline

    folder = tmp_path / "run"
    here(text_teacher.main, SMALL, "--output-dir", folder)
    without = {"text_encoder_3": None, "tokenizer_3": None}
    for family, options, kind in (("unet", {}, StableDiffusionPipeline), ("flow", without, StableDiffusion3Pipeline)):
        pipeline = DiffusionPipeline.from_pretrained(folder / family, **options)
        pipeline.set_progress_bar_config(disable=True)
        assert type(pipeline) is kind and not pipeline.scheduler.config.get("_name_or_path")
        drawn = pipeline("a handwritten seven", num_inference_steps=2, generator=torch.manual_seed(0), output_type="np").images
        assert drawn.shape == (1, 8, 8, 1) and np.isfinite(drawn).all()
        model = teachers.load(f"{folder / family},prompts={folder / 'prompts.txt'}")
        assert model.classes == model.null == 80 and model.image_shape == (1, 8, 8)
        assert (folder / f"{family}.png").is_file()
    data = sets.load(str(folder / "digits.npz"))
    assert data.captioned(captions.prompts()).labels.tolist() == captions.captioned(digits()[1])
    quality = json.loads((folder / "quality.json").read_text())
    assert quality.keys() == {"unet", "flow"} and 0 <= quality["flow"][0]["agreement"] <= 1
    for name in ("learn", "measure"):  # nothing is trained or measured again
        monkeypatch.setattr(text_teacher, name, None)
    here(text_teacher.main, SMALL, "--output-dir", folder)
    assert json.loads((folder / "quality.json").read_text()) == quality


@pytest.mark.slow
def test_a_killed_command_continues_to_the_same_bits(tmp_path, monkeypatch, capsys):
    small = f"{SMALL} --families flow --output-dir"
    here(text_teacher.main, small, tmp_path / "whole")
    for phase, after in (("autoencoder", 5), ("flow", 4)):
        calls = iter(range(100))
        monkeypatch.setattr(text_teacher, "stop_requested", lambda calls=calls, after=after: next(calls) == after)
        with pytest.raises(SystemExit):
            here(text_teacher.main, small, tmp_path / "killed")
        assert f"stopped at {phase}" in capsys.readouterr().err
    monkeypatch.setattr(text_teacher, "stop_requested", lambda: False)
    here(text_teacher.main, small, tmp_path / "killed")
    for part in ("autoencoder", "flow/vae", "flow/transformer"):
        one, two = ((tmp_path / run / part / "diffusion_pytorch_model.safetensors").read_bytes() for run in ("whole", "killed"))
        assert one == two
