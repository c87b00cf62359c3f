"""Text-to-image models are measured and sampled on the prompts of --captions; the same seed gives the same prompt in every cell."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import here, rows, words
from PIL import Image
from pipelines import PROMPTS, sd

import teachers
from distill import files
from eval.generate import initial_noise
from recipes import evaluate, sample
from teachers.encoder import Encoder, with_prompts

OURS = "--images 40 --chunk 40 --features test_latent_runs:Pool --samplers ddim --baseline-steps 0"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A Stable Diffusion pipeline, prompts, real images, and the model as a file without prompts."""
    folder = tmp_path_factory.mktemp("made")
    sd(folder / "words").save_pretrained(folder / "sd")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    images = np.random.default_rng(0).integers(0, 255, (40, 16, 16, 3), dtype=np.uint8)
    np.savez(folder / "plain.npz", images=images)
    np.savez(folder / "captioned.npz", images=images, captions=[PROMPTS[i % 2] for i in range(40)])
    teachers.save(folder / "m.safetensors", teachers.load(f"{folder / 'sd'},prompts={folder / 'prompts.txt'}"))
    return folder


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


def test_the_images_of_a_grid_are_those_of_the_prompts_in_turn(made, tmp_path, refused):
    few = words("--steps 2 --images 6 --seed 5 --model", made / "m.safetensors", "--output", tmp_path / "images")
    sample.main([*few, "--captions", str(made / "prompts.txt")])
    model = with_prompts(teachers.load(str(made / "sd")), PROMPTS)
    noise = initial_noise(range(6), model.shape, model.classes, 5).noise
    cond = model.condition(torch.tensor([0, 1, 2, 0, 1, 2]))
    with torch.no_grad():
        x0 = model.sampling.run(model.denoiser, noise, model.times(2), torch.randn_like, **cond)
        expected = (model.decode(x0) / 2 + 0.5).clamp(0, 1) * 255
    for i, image in enumerate(expected.permute(0, 2, 3, 1)):
        found = torch.from_numpy(np.array(Image.open(tmp_path / "images" / f"{i:06d}.png"))).float()
        assert (found - image).abs().max() < 1.01
    line = refused(sample.main, "--model", made / "m.safetensors", "--output", tmp_path / "x.png")
    assert "is conditioned on text: --captions FILE is needed" in line


@pytest.mark.slow
def test_an_evaluation_draws_the_rows_of_its_captions_and_shows_them_by_prompt(made, tmp_path, refused):
    common = words("--model", made / "m.safetensors", "--data", made / "plain.npz", "--steps 1 2", OURS, "--output-dir")
    assert "accepted are --captions FILE, or --data with captions" in refused(evaluate.main, *common, tmp_path / "none")
    here(evaluate.main, *common, tmp_path / "run", "--captions", made / "prompts.txt")
    found = rows(tmp_path / "run")
    table = Encoder(str(made / "sd")).table(PROMPTS)
    assert {row["conditions_sha256"] for row in found.values()} == {table.sha256}
    assert Image.open(tmp_path / "run" / "prompts.png").height > 8 * 40
    kept = files.load(tmp_path / "run" / "cells" / "teacher_ddim_2.safetensors")[0]["images"]
    model = teachers.load(str(made / "m.safetensors")).with_conditions(table)
    drawn = initial_noise(range(4), model.shape, 3, 0)
    with torch.no_grad():
        sampling = model.sampling.on_best_grid(model.denoiser.schedule, 2)
        x0 = sampling.run(
            model.denoiser,
            drawn.noise,
            sampling.times_for(model.denoiser.schedule, 2),
            torch.randn_like,
            **model.condition(drawn.labels),
        )
    expected = (model.decode(x0) / 2 + 0.5).clamp(0, 1) * 255
    assert (kept[:4].float() - expected).abs().max() < 1.01
    here(
        evaluate.main,
        *words("--model", made / "sd", "--data", made / "captioned.npz", "--steps 1", OURS),
        "--output-dir",
        tmp_path / "own",
    )
    assert list(rows(tmp_path / "own")) == ["teacher ddim 1"] and len(list(tmp_path.glob("conditions-*"))) == 2
