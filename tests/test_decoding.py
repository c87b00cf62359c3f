"""The autoencoder of a latent model: how it decodes, and where it is while a student is trained."""

import pytest
import torch
from conftest import refuses
from pipelines import ldm, vae, vq

import teachers
from recipes import evaluate
from recipes.common.checks import decoded_by


@pytest.fixture
def model(tmp_path):
    ldm(tmp_path, vae(scaling_factor=0.7)).save_pretrained(tmp_path / "ldm")
    return teachers.load(str(tmp_path / "ldm"))


def sizes_of_decoder_calls(model, latents):
    """The shapes of what the decoder itself is called with, and the images."""
    calls = []
    hook = model.codec.network.decoder.register_forward_pre_hook(lambda module, inputs: calls.append(tuple(inputs[0].shape)))
    images = model.decode(latents)
    hook.remove()
    return calls, images


def test_sliced_decoding_takes_one_image_after_the_other_and_gives_the_same_images(model):
    latents = torch.randn(3, 4, 8, 8)
    calls, plain = sizes_of_decoder_calls(model, latents)
    assert calls == [(3, 4, 8, 8)]
    calls, sliced = sizes_of_decoder_calls(decoded_by(model, "sliced"), latents)
    assert calls == 3 * [(1, 4, 8, 8)] and torch.allclose(sliced, plain, atol=1e-5)
    assert sizes_of_decoder_calls(model, latents)[0] == [(3, 4, 8, 8)]  # both have the same autoencoder


def test_tiled_decoding_takes_tiles_of_large_images_which_are_near_the_whole(model):
    latents = torch.randn(1, 4, 32, 32)
    calls, tiled = sizes_of_decoder_calls(decoded_by(model, "tiled"), latents)
    whole = model.decode(latents)
    assert len(calls) > 4 and max(shape[-1] for shape in calls) < 32 and tiled.shape == whole.shape
    assert (tiled - whole).abs().mean() < 0.5 * whole.std()


def test_a_decoding_that_a_model_does_not_support_ends_in_one_line(tmp_path, teacher, refused):
    ldm(tmp_path, vq()).save_pretrained(tmp_path / "vq")
    refuses("an autoencoder of class VQModel accepts plain alone", decoded_by, teachers.load(str(tmp_path / "vq")), "tiled")
    assert decoded_by(teacher, "plain") is teacher
    line = refused(evaluate.main, "--decode sliced --output-dir", tmp_path / "none")
    assert "--decode sliced: this model works on pixels; accepted is plain" in line and not (tmp_path / "none").exists()


def test_an_autoencoder_moves_when_it_decodes_and_not_with_its_model(model):
    network = model.codec.network
    model.to(torch.device("meta"))
    assert next(network.parameters()).device.type == "cpu" and next(model.denoiser.net.parameters()).device.type == "meta"
    model.codec.to(torch.device("meta"))
    assert next(network.parameters()).device.type == "meta"
