"""From images to an exported pipeline through latents: all recipes of latent and text-to-image models, on tiny networks."""

import filecmp
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import here, refuses, words
from PIL import Image
from pipelines import PROMPTS, ldm, sd, vae
from processes import together

import teachers
from recipes import consistency, evaluate, export, latents, teacher, variance
from recipes.common.checks import check_match
from recipes.data import sets as datasets

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
SHORT = "--preset smoke --training-images 64 --batch-size 32 --images 64 --chunk 64 --sweep-steps 1 --force"
OURS = "--features test_latent_runs:Pool"


class Pool(torch.nn.Module):
    """Mean colours of the four quarters of an image."""

    def forward(self, images):
        return torch.nn.functional.adaptive_avg_pool2d(images.float() / 255, 2).flatten(1)


def measured(folder):
    """The reference that a run is measured against, as its images are latents."""
    return f"--reference {folder / 'measured' / 'reference.safetensors'}"


def text_model(folder):
    return f"{folder / 'sd'},prompts={folder / 'prompts.txt'}"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two pipelines, their prompts, images with and without captions, latents of both, and a stored reference."""
    folder = tmp_path_factory.mktemp("made")
    ldm(folder, vae()).save_pretrained(folder / "ldm")
    sd(folder / "words").save_pretrained(folder / "sd")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    images = np.random.default_rng(0).integers(0, 255, (96, 16, 16, 3), dtype=np.uint8)
    np.savez(folder / "plain.npz", images=images)
    np.savez(folder / "captioned.npz", images=images, captions=[PROMPTS[i % 3] for i in range(96)])
    for model, name in ((folder / "ldm", "plain"), (text_model(folder), "captioned")):
        here(latents.main, "--shard-images 40 --model", model, "--data", folder / f"{name}.npz", "--output-dir", folder / name)
    few = f"--images 64 --chunk 64 --steps 1 --samplers ddim {OURS} --output-dir"
    here(evaluate.main, few, folder / "measured", "--model", folder / "ldm", "--data", folder / "plain.npz")
    return folder


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE))


def test_two_processes_make_the_latents_of_one(made, tmp_path):
    common = words("--shard-images 40 --threads 1 --model", made / "ldm", "--data", made / "plain.npz")
    codes, out = together(2, latents.main, [*common, "--output-dir", str(tmp_path / "two")], log=tmp_path / "log")
    files = sorted(p.name for p in (made / "plain").iterdir())
    assert codes == {0} and len(files) == 4, out
    assert filecmp.cmpfiles(made / "plain", tmp_path / "two", files, shallow=False) == (files, [], [])


def test_a_failure_in_one_process_ends_all_of_them_in_one_line_and_leaves_nothing(made, tmp_path):
    data = tmp_path / "set"
    data.mkdir()
    for i in range(8):  # the last one, in the shard of the second process, is too small
        Image.fromarray(np.zeros((16 if i < 7 else 4, 16, 3), np.uint8)).save(data / f"{i}.png")
    common = words("--shard-images 4 --threads 1 --model", made / "ldm", "--data", f"{data},stream=2")
    codes, out = together(2, latents.main, [*common, "--output-dir", str(tmp_path / "l" / "out")], log=tmp_path / "log")
    errors = [line for line in out.splitlines() if line.startswith("error: ")]
    assert 0 not in codes and len(errors) == 1 and "7.png: 16x4 is smaller than 16x16" in errors[0], out
    assert not list((tmp_path / "l").iterdir())


def test_each_process_encodes_only_its_own_shards(made):
    config = latents.Config(model="ldm", shard_images=40)
    data, model = datasets.load(str(made / "plain.npz")), teachers.load(str(made / "ldm"))
    for rank, numbers in ((0, [0, 2]), (1, [1])):
        state = SimpleNamespace(num_processes=2, process_index=rank, device=torch.device("cpu"))
        assert [int(name[8:13]) for name, *_ in latents.encoded(model, data, config, state)] == numbers


def test_captions_are_the_labels_of_a_teacher_that_is_conditioned_on_prompts(made):
    model = teachers.load(text_model(made))
    for name in ("captioned.npz", "captioned"):
        found = check_match(model, datasets.load(str(made / name)))
        assert found.labels.tolist() == [i % 3 for i in range(96)] and found.classes == 3
    message = "the caption 'a cat' is none of the teacher's 1 prompts; accepted are the lines of"
    refuses(message, datasets.load(str(made / "captioned")).captioned, ["a dog"])


def test_a_text_teacher_is_distilled_on_captions_and_its_export_needs_no_other_folder(made, tmp_path, capsys, stock_here):
    shutil.copytree(made / "sd", tmp_path / "sd")
    run, out = tmp_path / "run", tmp_path / "out"
    teacher = ("--teacher", f"{tmp_path / 'sd'},prompts={made / 'prompts.txt'}", "--data", made / "captioned")
    here(consistency.main, *teacher, SHORT, OURS, measured(made), "--method cd --steps 1 2 --output-dir", run)
    assert "gives the same pixels through diffusers alone" in capsys.readouterr().out
    export.main(words("--model", run, "--output-dir", out))
    prompts = "['a cat', 'two dogs on a boat', 'a red house', 'mountains']"  # the run's own are not in its file
    call = f"pipeline(prompt={prompts}, guidance_scale=1.0, height=16, width=16, eta=0.5, num_inference_steps=1)"
    assert call in (out / "README.md").read_text()
    model = teachers.load(str(run))
    before = model.decode(torch.ones(1, 4, 8, 8))
    out.rename(tmp_path / "elsewhere")
    shutil.rmtree(tmp_path / "sd")
    again = teachers.load(str(tmp_path / "elsewhere"))
    assert again.fingerprint == model.fingerprint and torch.equal(again.decode(torch.ones(1, 4, 8, 8)), before)


def test_new_networks_are_trained_on_latents_and_exported_with_the_autoencoder(made, tmp_path, stock_here):
    new = ("--channels 8 16 --data", made / "plain")
    common = (*new, SHORT, OURS, measured(made), "--steps 1 --sampler ddim --output-dir")
    here(consistency.main, "--method ect --student new --teacher", made / "ldm", *common, tmp_path / "a")
    here(consistency.main, "--method ict --from-scratch", *common, tmp_path / "b")
    assert all((tmp_path / run / "pipeline" / "vqvae").is_dir() for run in "ab")
    here(teacher.main, "--preset smoke --images 64 --output-dir", tmp_path / "t", *new)
    assert (tmp_path / "t" / "samples.png").is_file() and teachers.load(str(tmp_path / "t" / "teacher.safetensors")).codec


def test_what_a_text_teacher_does_not_support_ends_in_one_line(made, capsys, tmp_path):
    arguments = words("--teacher", text_model(made), "--data", made / "captioned", "--output-dir", tmp_path / "none")
    for recipe, more, message in (
        (variance, "", "conditioned on labels or on nothing, and this teacher on text"),
        (consistency, "--target posterior-mean", "needs labels, and this model is conditioned on text"),
        (teacher, "--label-dropout 0", "conditioned on labels or on nothing, and this teacher on text"),
        (consistency, "--student new", "takes 3 labels and the teacher 3 prompts (text): they must be the same"),
    ):
        with pytest.raises(SystemExit) as stop:
            recipe.main([*arguments, *words(more, *((measured(made), OURS) if recipe is consistency else ()))])
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert stop.value.code == 2 and message in line and not (tmp_path / "none").exists()
