"""What a user can get wrong ends in one line, with exit code 2 and nothing written."""

import numpy as np
import pytest
import torch
from conftest import ROOT, words

from recipes import compare, consistency, evaluate, export, progressive, sample, search
from recipes import teacher as teacher_recipe

pytestmark = pytest.mark.slow

BAD = {
    progressive: {
        "--techer digits": "unrecognized arguments: --techer digits: nearest are --teacher",
        "--steps 4": "nearest are --end-steps, --sweep-steps, --start-steps",
        "--help distance": "accepted are --help, --help all, --help teacher, --help data",
        "--log-with wandb": "the package wandb is not installed: pip install wandb",
        "--teacher digts": "unknown model 'digts': accepted are digits",
        "--teacher nowhere/x.safetensors": "there is no such file",
        "--teacher oracle:digits": "an oracle has no network",
        "--teacher oracle:delphi": "unknown oracle",
        "--teacher .": "no diffusers pipeline",
        "--data nowhere.npz": "unknown data 'nowhere.npz', no such file or folder",
        "--start-steps 64 --end-steps 3": "accepted are [32, 16, 8, 4, 2, 1]",
        "--start-steps 7": "none: start is odd",
        "--start-steps many": "invalid int value: 'many'",
        "--weight sqrt": "choose from",
        "--batch-size 100 --microbatch 7": "choose a multiple of 15",
        "--features incption": "unknown features",
        "--preset fast": "choose from",
    },
    consistency: {
        "--method cd --from-scratch": "--method cd distils a teacher and --from-scratch has none",
        "--method ect --from-scratch --target-mix 0.5": "needs a teacher and --from-scratch has none",
        "--target-mix 1.5": "--target-mix 1.5: accepted are auto and numbers from 0 to 1",
        "--target-mix most": "accepted are auto and numbers",
        "--distance lpips": "--distance lpips is defined for 3 channels, these images have 1",
        "--method scd --weight one": "--weight means nothing to --method scd: accepted with cd, ct",
        "--start-part 0.5": "--start-part and --start-lr describe a first training: give --start denoise or cmt too",
        "--start-lr 1e-3": "--start-part and --start-lr describe a first training: give --start denoise or cmt too",
        "--method denoise --jvp exact": "--jvp means nothing to --method denoise: accepted with scd",
        "--target posterior-mean --target-mix 1": "choose it or --target-mix",
        "--method ict --from-scratch --student table": "--from-scratch has none: choose new",
        "--sampler consistency:2": "unknown sampler 'consistency:2': accepted are ddim",
        "--sampler jump": "'jump' needs a two-time network",
        "--regularize fokker=1": "accepted is name=weight with a name of martingale, fokker-planck",
        "--teacher oracle:digits": "an oracle has no network",
    },
    evaluate: {
        "--compare a b": "--compare is a command of its own now: python recipes/compare.py --runs",
        "--samplers dpm": "unknown sampler 'dpm': accepted are ddim",
        "--steps 0": "--steps 0: accepted are whole numbers, at least 1",
        "--images 3": "--images 3: accepted are whole numbers, at least 40",
        "--steps 2000": "2000 steps on a grid of 1,024: accepted are 1 to 1024",
        "--verify --metrics fid": "--verify needs",
        "--samplers jump": "'jump' needs a two-time network",
    },
    teacher_recipe: {
        "--probe digits": "a command of its own now: python recipes/probe.py --model",
        "--prediction eps": "divides by alpha",
    },
    compare: {"": "the following arguments are required: --runs", "--runs nowhere": "nowhere: there is no finished report"},
    search: {"--steps 99": "accepted are at most as many steps as nodes"},
    sample: {"--labels 11": "this model has 10 classes", "--model oracle:gaussian": "are no pictures"},
    export: {"--model oracle:gaussian": "an oracle has no network"},
}


@pytest.mark.parametrize("recipe", BAD, ids=lambda recipe: recipe.__name__)
def test_bad_input_is_one_line_exit_code_2_and_nothing_written(recipe, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for arguments, message in BAD[recipe].items():
        assert message in refused(recipe.main, arguments), arguments
        assert list(tmp_path.iterdir()) == [], arguments


def test_files_that_are_no_models_are_refused_by_what_they_are(ladder, tmp_path, refused):
    torch.save({"w": torch.zeros(3)}, tmp_path / "model.pt")
    assert "pickle" in refused(progressive.main, "--teacher", tmp_path / "model.pt")
    (tmp_path / "cut.safetensors").write_bytes((ladder / "student.safetensors").read_bytes()[:1000])
    assert "not a whole safetensors file" in refused(progressive.main, "--teacher", tmp_path / "cut.safetensors")


class OneSize(torch.nn.Module):
    """Features of 16 x 16 images only."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(3 * 256, 8)

    def forward(self, x):
        return self.linear(x.flatten(1).float())


def test_an_extractor_or_reference_that_does_not_fit_leaves_nothing_behind(tmp_path, refused, monkeypatch):
    """So that the corrected command finds no run of another configuration in its way."""
    monkeypatch.syspath_prepend(str(ROOT / "tests"))
    out = tmp_path / "e"
    line = refused(evaluate.main, "--features test_bad_input:OneSize --output-dir", out)
    assert "cannot take images of shape (1, 8, 8)" in line and not out.exists()
    np.savez(tmp_path / "r.npz", mu=np.zeros(4), sigma=np.eye(4))
    line = refused(evaluate.main, "--reference", tmp_path / "r.npz", "--output-dir", out)
    assert "has features 'inception-v3-compat', here it is 'digits'" in line and not out.exists()


def test_a_network_without_a_tangent_or_from_other_noise_levels_is_refused_before_anything_is_written(
    tmp_path, refused, monkeypatch
):
    monkeypatch.syspath_prepend(str(ROOT / "tests"))
    out = words("--preset smoke --force --output-dir", tmp_path / "r")
    spec = "test_consistency:NoRule,prediction=v,shape=1x8x8,schedule="
    line = refused(consistency.main, f"--method sct --jvp exact --teacher {spec}cosine", *out)
    assert "no exact tangent" in line and "use --jvp finite" in line
    line = refused(consistency.main, f"--student {spec}edm --teacher {spec}ve", *out)
    assert "begins at sigma/alpha 0.002 (t_min), the teacher's at 0.02" in line
    assert not list(tmp_path.iterdir())


def test_data_of_another_shape_are_refused(tmp_path, refused):
    def npz(name, images, **more):
        np.savez(tmp_path / f"{name}.npz", images=images, **more)
        return refused(progressive.main, "--data", tmp_path / f"{name}.npz")

    labels, grey = {"labels": np.zeros(10, np.int64)}, np.zeros((10, 8, 8, 1))
    assert "(1, 8, 8), colour holds (3, 8, 8)" in npz("colour", np.zeros((10, 8, 8, 3), np.uint8), **labels)
    assert "bare has no labels" in npz("bare", grey.astype(np.uint8))
    assert "images are float64" in npz("float", grey)
