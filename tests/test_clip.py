"""CLIP features and scores against transformers' own, and CMMD against the closed form of Gaussian data."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import here, refuses, rows, words
from pipelines import PROMPTS, WIDTH, clip, sd

import teachers
from eval.cells import pictures
from eval.clip import SCALE, SIGMA, Clip, clip_scores, cmmd
from eval.features import Extractor
from eval.generate import images, initial_noise
from recipes import evaluate
from teachers.encoder import with_prompts

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny CLIP with random weights, as transformers writes it."""
    path = tmp_path_factory.mktemp("clip")
    text, tokenizer = clip(path)
    vision = transformers.CLIPVisionConfig(
        hidden_size=WIDTH, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    torch.manual_seed(0)
    config = transformers.CLIPConfig(text_config=text.config.to_dict(), vision_config=vision.to_dict(), projection_dim=6)
    transformers.CLIPModel(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_features_are_those_that_transformers_compares(folder):
    ours = Clip.load(folder)
    images = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    captions = ["a seven", "two", "a photo of a nine"]
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    pixels = processor(list(images.permute(0, 2, 3, 1).numpy()), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(ours.pixels(images), pixels, atol=1e-5, rtol=0)
    tokens = ours.tokenizer(captions, padding=True, return_tensors="pt")
    with torch.no_grad():
        theirs = ours.model(**tokens, pixel_values=pixels)
        cosines = (theirs.logits_per_image / ours.model.logit_scale.exp()).diagonal()
        mine = clip_scores(ours(images), ours.texts(captions))
    torch.testing.assert_close(mine, 100 * cosines.clamp(min=0), atol=1e-3, rtol=0)


def test_the_shorter_side_is_resized_and_the_middle_is_taken(folder):
    ours = Clip.load(folder)
    wide = torch.zeros(1, 3, 32, 64, dtype=torch.uint8)
    wide[..., 16:48] = 255
    white = (1 - np.array(transformers.image_utils.OPENAI_CLIP_MEAN)) / np.array(transformers.image_utils.OPENAI_CLIP_STD)
    middle = ours.pixels(wide)[0, :, 8, 8]
    assert ours.pixels(wide).shape == (1, 3, 16, 16)
    torch.testing.assert_close(middle, torch.tensor(white).float(), atol=1e-5, rtol=0)


def test_cmmd_is_the_closed_form_of_two_gaussians():
    """E k(x, y) = (s^2 / (s^2 + a^2 + b^2))^(D/2) exp(-|m - n|^2 / (2 (s^2 + a^2 + b^2))), with s of the kernel."""
    rng = torch.Generator().manual_seed(0)
    d, a, b, shift = 4, 6.0, 9.0, 5.0
    x = a * torch.randn(4_000, d, generator=rng)
    y = b * torch.randn(4_000, d, generator=rng) + shift

    def expected(v, gap):
        total = SIGMA**2 + v
        return (SIGMA**2 / total) ** (d / 2) * math.exp(-d * gap**2 / (2 * total))

    exact = SCALE * (expected(2 * a * a, 0) + expected(2 * b * b, 0) - 2 * expected(a * a + b * b, shift))
    assert cmmd(x, y) == pytest.approx(exact, rel=0.03)
    assert cmmd(x, x) == pytest.approx(0, abs=1e-9)


def test_it_is_a_feature_extractor_by_name(folder, tmp_path):
    extractor = Extractor.create(f"clip:{folder}").fits((3, 16, 16))
    features = extractor(torch.zeros(2, 1, 8, 8, dtype=torch.uint8)).fid
    assert features.shape == (2, 6) and torch.allclose(features.norm(dim=1), torch.ones(2))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip"}))
    refuses("no CLIP of transformers", Extractor.create, f"clip:{tmp_path}")
    refuses("no CLIP of transformers", Extractor.create, "clip:openai/clip-vit-base-patch32")


@pytest.mark.slow
def test_a_report_of_clip_features_has_cmmd_and_the_score_of_each_image_with_its_prompt(folder, tmp_path):
    sd(tmp_path / "words").save_pretrained(tmp_path / "sd")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    real = torch.randint(0, 256, (24, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    np.savez(tmp_path / "real.npz", images=real.permute(0, 2, 3, 1).numpy())
    options = "--images 40 --chunk 20 --steps 1 --samplers ddim --baseline-steps 0"
    files_and_folders = (
        "--captions",
        tmp_path / "prompts.txt",
        "--data",
        tmp_path / "real.npz",
        "--output-dir",
        tmp_path / "run",
    )
    here(evaluate.main, *words("--model", tmp_path / "sd", options, "--features", f"clip:{folder}"), *files_and_folders)
    (row,) = rows(tmp_path / "run").values()
    clip = Clip.load(folder)
    shown = pictures(tmp_path / "run" / "cells" / "teacher_ddim_1.safetensors")  # the first ones
    labels = initial_noise(range(40), (1,), len(PROMPTS), 0).labels.tolist()
    model = with_prompts(teachers.load(str(tmp_path / "sd")), PROMPTS)
    more = [
        batch.pixels
        for batch in images(
            model,
            model.sampling.on_best_grid(model.denoiser.schedule, 1),
            1,
            [range(20), range(20, 40)],
            0,
            torch.device("cpu"),
        )
    ]
    made = clip(torch.cat(more))
    assert (more[0][: len(shown)].float() - shown).abs().max() <= 1  # a run keeps its conditions in half precision
    assert row["cmmd"] == pytest.approx(cmmd(made, clip(real)), rel=1e-2)
    texts = clip.texts([PROMPTS[label] for label in labels])
    right, wrong = clip_scores(made, texts).mean().item(), clip_scores(made, texts.roll(1, 0)).mean().item()
    assert abs(row["clip_score"] - right) < 0.1 * abs(right - wrong)
