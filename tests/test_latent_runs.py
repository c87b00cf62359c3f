"""From images to a stock pipeline, by way of latents: every recipe of a latent or text model, on tiny networks."""

import filecmp
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pipelines import PROMPTS, ldm, sd, vae

import teachers
from recipes import consistency, evaluate, export, latents, teacher, variance
from recipes import data as datasets
from recipes.matching import check_match

HERE = Path(__file__).parent
SHORT = [
    "--preset",
    "smoke",
    "--training-images",
    "64",
    "--batch-size",
    "32",
    "--images",
    "64",
    "--sweep-steps",
    "1",
    "--force",
]
OURS = ["--features", "test_latent_runs:Pool", "--threads", "1"]


class Pool(torch.nn.Module):
    """The mean colours of four quarters."""

    def forward(self, images):
        return torch.nn.functional.adaptive_avg_pool2d(images.float() / 255, 2).flatten(1)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two pipelines, their prompts, images with and without captions, latents of both, and a stored reference."""
    folder = tmp_path_factory.mktemp("made")
    ldm(folder, vae()).save_pretrained(folder / "ldm")
    sd(folder / "words").save_pretrained(folder / "sd")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    images = np.random.default_rng(0).integers(0, 255, (96, 16, 16, 3), dtype=np.uint8)
    np.savez(folder / "plain.npz", images=images)
    np.savez(folder / "told.npz", images=images, captions=[PROMPTS[i % 3] for i in range(96)])
    for model, of in ((folder / "ldm", "plain"), (spec(folder), "told")):
        arguments = ["--model", str(model), "--data", str(folder / f"{of}.npz"), "--shard-images", "40", "--threads", "1"]
        latents.main([*arguments, "--output-dir", str(folder / of)])
    measured = ["--images", "64", "--steps", "1", "--samplers", "ddim", "--output-dir", str(folder / "measured"), *OURS]
    evaluate.main(["--model", str(folder / "ldm"), "--data", str(folder / "plain.npz"), *measured])
    return folder


def spec(folder):
    return f"{folder / 'sd'},prompts={folder / 'prompts.txt'}"


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE))


def test_two_processes_make_the_latents_of_one(made, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "recipes/latents.py"]
    command += ["--model", str(made / "ldm"), "--data", str(made / "plain.npz"), "--shard-images", "40"]
    command += ["--output-dir", str(tmp_path / "two"), "--threads", "1"]
    subprocess.run(command, check=True, cwd=HERE.parent, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True)
    files = sorted(p.name for p in (made / "plain").iterdir())
    assert len(files) == 4 and filecmp.cmpfiles(made / "plain", tmp_path / "two", files, shallow=False) == (files, [], [])


def test_each_process_encodes_only_its_own_shards(made):
    config = latents.Config(shard_images=40)
    data, model = datasets.load(str(made / "plain.npz")), teachers.load(str(made / "ldm"))
    for rank, numbers in ((0, [0, 2]), (1, [1])):
        state = SimpleNamespace(num_processes=2, process_index=rank, device=torch.device("cpu"))
        assert [number for number, _ in latents.encoded(model, data, config, state)] == numbers


def test_captions_are_the_labels_of_a_teacher_that_is_told_prompts(made):
    model = teachers.load(spec(made))
    for name in ("told.npz", "told"):
        found = check_match(model, datasets.load(str(made / name)))
        assert found.labels.tolist() == [i % 3 for i in range(96)] and found.classes == 3
    with pytest.raises(ValueError, match=r"the caption 'a cat' is none of the teacher's 1 prompts: a line of prompts=FILE"):
        datasets.load(str(made / "told")).captioned(["a dog"])


def test_a_text_teacher_is_distilled_on_captions_and_its_export_stands_on_its_own(made, tmp_path, capsys):
    shutil.copytree(made / "sd", tmp_path / "sd")
    run = ["--teacher", f"{tmp_path / 'sd'},prompts={made / 'prompts.txt'}", "--data", str(made / "told"), *SHORT, *OURS]
    run += ["--reference", str(made / "measured" / "reference.safetensors"), "--output-dir", str(tmp_path / "run")]
    consistency.main([*run, "--method", "cd", "--steps", "1", "2"])
    assert "gives the same pixels through diffusers alone" in capsys.readouterr().out
    export.main(["--model", str(tmp_path / "run"), "--output-dir", str(tmp_path / "out")])
    call = (
        "pipeline(prompt=['a cat', 'two dogs on a boat', 'blue', 'a cat'], guidance_scale=1.0, eta=0.5, num_inference_steps=1)"
    )
    assert call in (tmp_path / "out" / "README.md").read_text()
    model = teachers.load(str(tmp_path / "run"))
    before = model.decode(torch.ones(1, 4, 8, 8))
    (tmp_path / "out").rename(tmp_path / "elsewhere")
    shutil.rmtree(tmp_path / "sd")
    again = teachers.load(str(tmp_path / "elsewhere"))
    assert again.fingerprint == model.fingerprint and torch.equal(again.decode(torch.ones(1, 4, 8, 8)), before)


def test_new_networks_are_trained_on_latents_and_leave_in_the_pipeline_of_the_autoencoder(made, tmp_path):
    common = [*SHORT, *OURS, "--data", str(made / "plain"), "--channels", "8", "16", "--steps", "1", "--sampler", "ddim"]
    common += ["--reference", str(made / "measured" / "reference.safetensors")]
    consistency.main(
        ["--method", "ect", "--student", "new", "--teacher", str(made / "ldm"), "--output-dir", str(tmp_path / "a"), *common]
    )
    consistency.main(["--method", "ict", "--from-scratch", "--output-dir", str(tmp_path / "b"), *common])
    assert all((tmp_path / run / "pipeline" / "vqvae").is_dir() for run in "ab")
    teacher.main(["--preset", "smoke", "--data", str(made / "plain"), "--images", "64", "--channels", "8", "16",
                  "--output-dir", str(tmp_path / "t"), "--threads", "1"])  # fmt: skip
    assert (tmp_path / "t" / "samples.png").is_file() and teachers.load(str(tmp_path / "t" / "teacher.safetensors")).codec


def test_what_a_text_teacher_cannot_do_is_said_in_one_line(made, capsys, tmp_path):
    told = ["--teacher", spec(made), "--data", str(made / "told"), "--output-dir", str(tmp_path / "none")]
    for recipe, arguments, message in (
        (variance.main, [], "are told labels or nothing, and this teacher a text"),
        (consistency.main, ["--target", "posterior-mean", *OURS], "goes by labels"),
        (teacher.main, ["--label-dropout", "0"], "a new network here is told labels or nothing, and this teacher a text"),
        (
            consistency.main,
            ["--student", "new", *OURS],
            "the student takes 3 labels and the teacher 3 prompts (text): they must be the same",
        ),
    ):
        reference = [] if recipe is not consistency.main else ["--reference", str(made / "measured" / "reference.safetensors")]
        with pytest.raises(SystemExit) as stop:
            recipe([*told, *arguments, *reference])
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert stop.value.code == 2 and message in line and not (tmp_path / "none").exists()
