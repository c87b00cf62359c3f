"""Every consistency method through its recipe on a tiny teacher; teachers without a stock pipeline; the variance report."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import here, rows, words
from processes import killed
from test_progressive_runs import WRITTEN

import teachers
from distill.denoiser import Denoiser
from distill.schedule import VE, Flow
from recipes import consistency, progressive, variance
from recipes.common.methods import METHODS
from teachers.networks.adapters import wrap
from teachers.students import on_table, untrained

pytestmark = pytest.mark.slow

TINY = "--preset smoke --images 60 --chunk 60 --sweep-steps 1 --training-images 64 --batch-size 32 --channels 8 16 --threads 1"


@pytest.mark.parametrize(
    "arguments",
    [
        "cd", "cd --order 1 --averaged-target --distance pseudo_huber", "ct --from-scratch", "ict --from-scratch", "ect",
        "ect --target-mix auto", "ect --from-scratch --target posterior-mean", "scd", "sct --jvp exact", "meanflow",
        "meanflow --from-scratch --sampler jump", "cd --student new --sampler ddim",
        "denoise --student new --regularize martingale=0.1 fokker-planck=0.001",
    ],
)  # fmt: skip
def test_every_consistency_method_writes_what_progressive_writes(tmp_path, new, arguments, monkeypatch):
    monkeypatch.setattr("teachers.export.deliver.verify", lambda *a: 0.0)  # tested with the pipelines themselves
    here(consistency.main, "--method", arguments, TINY, "--force --teacher", new, "--output-dir", tmp_path)
    method = arguments.split()[0]
    sampler = "ddim" if "ddim" in arguments else METHODS[method].sampler
    assert {p.name for p in tmp_path.iterdir()} == WRITTEN | (set() if sampler == "ddim" else {"pipeline-2"})
    found = rows(tmp_path)
    assert {f"{method} {sampler} 1", f"{method} {sampler} 2"} <= found.keys()
    assert ("teacher ddim 1" in found) != ("--from-scratch" in arguments)


def test_a_consistency_run_killed_in_the_middle_ends_with_the_same_bits(tmp_path, new, stock_here):
    arguments = words("--method ect", TINY, "--training-images 512 --force --teacher", new, "--output-dir")
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    consistency.main([*arguments, str(whole)])
    killed(lambda: list(folder.glob("stages/ect/resume-*")), consistency.main, [*arguments, str(folder)])
    consistency.main([*arguments, str(folder)])
    assert (folder / "student.safetensors").read_bytes() == (whole / "student.safetensors").read_bytes()


@pytest.mark.parametrize("schedule, prediction", [(Flow(), "flow"), (VE(0.02, 2.0), "score")], ids=["flow", "ve"])
def test_a_teacher_without_a_stock_pipeline_has_a_student_on_a_table_with_one(
    tmp_path, schedule, prediction, capsys, stock_here
):
    model = untrained((1, 8, 8), 10, (8, 16), 1, 0)
    net, network, time = model.parametric.net, model.network, "thousand_time"
    if prediction == "score":
        (net, network), time = wrap(net, network, {"kind": "unit"}), "level"
    path = tmp_path / "t.safetensors"
    teachers.save(path, replace(model, network=network, denoiser=Denoiser(net, schedule, prediction, time)))
    few = "--preset smoke --force --images 60 --chunk 60 --sweep-steps 1 --batch-size 32"
    cd = "--method cd --training-images 64 --steps 1"
    for recipe, more, name in (
        (progressive.main, "--start-steps 4 --images-per-stage 64 --student table", "a"),
        (consistency.main, f"{cd} --student table", "b"),
        (consistency.main, cd, "c"),
    ):
        here(recipe, few, more, "--teacher", path, "--output-dir", tmp_path / name)
        said = capsys.readouterr().out
        assert ("gives the same pixels" in said) == (name != "c")
    assert "no diffusers pipeline: " in said
    taught, began = teachers.load(str(path)), on_table(teachers.load(str(path)))
    x, t = torch.randn(3, 1, 8, 8), torch.full((3,), 7.0)
    inner = getattr(taught.denoiser.net, "net", taught.denoiser.net)
    with torch.no_grad():
        assert torch.equal(began.denoiser.net(x, t, torch.arange(3)), inner(x, t, torch.arange(3)))


def test_the_variance_report_is_written(tmp_path):
    here(variance.main, "--preset smoke --training-images 512 --output-dir", tmp_path)
    out = json.loads((tmp_path / "variance.json").read_text())
    assert out["targets"].keys() == {"data", "teacher", "mix", "posterior mean"} and len(out["logsnr"]) == 3
    noisy, clean = 0, 2  # log-SNR -8 and 8: the data sample varies most where little is left of it
    assert out["targets"]["data"]["error"][noisy] > 10 * out["targets"]["data"]["error"][clean]
    assert out["targets"]["teacher"]["error"][noisy] < out["targets"]["data"]["error"][noisy] / 10
    assert (tmp_path / "variance.html").read_text().count("<tr") == 4
    assert (tmp_path / "variance.png").stat().st_size > 10_000
