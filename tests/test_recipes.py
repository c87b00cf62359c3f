"""The recipes as a user launches them: one process and two, killed and resumed, and given bad input."""

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT, succeed

import teachers
from distill import files
from distill.denoiser import Denoiser
from distill.schedule import VE, Flow
from fewstep.__main__ import commands
from recipes import benchmark, classifier, compare, consistency, evaluate, export, progressive, sample, search, variance
from recipes import teacher as teacher_recipe
from recipes.common.methods import METHODS
from teachers.export.deliver import verify
from teachers.networks.adapters import wrap
from teachers.students import on_table, untrained

pytestmark = pytest.mark.slow

SMALL = "--threads 1 --preset smoke --start-steps 4 --images-per-stage 512 --images 80 --chunk 80 --sweep-steps 1".split()  # noqa: SIM905
WRITTEN = {
    "config.json", "metrics.jsonl", "student.safetensors", "report.json", "report.csv", "report.md", "report.html",
    "fid_vs_nfe.png", "fid_vs_seconds.png", "samples.png", "labels.png", "pipeline", "stages", "cells", "reference.safetensors",
}  # fmt: skip
COLUMNS = {"fid", "fid_interval", "fid_infinity", "kid", "isc", "precision", "recall", "nfe", "seconds_per_image", "agreement"}


def here(main, *arguments):
    """The recipe in this process, on one thread: seconds less than a launch, where nothing is claimed about launching."""
    main([*map(str, arguments), "--threads", "1"])


def rows(folder):
    return {row["name"]: row for row in json.loads((folder / "report.json").read_text())["rows"]}


def weights(path):
    return files.load(path)[0]


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """The smoke preset under ``accelerate launch``, as the README has it."""
    folder = tmp_path_factory.mktemp("smoke") / "run"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", str(ROOT / "recipes/progressive.py")]
    done = subprocess.run(
        [*command, "--preset", "smoke", "--output-dir", str(folder)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A ladder of two stages, in one process with one thread."""
    folder = tmp_path_factory.mktemp("small") / "run"
    succeed("progressive", *SMALL, "--output-dir", folder, threads=1)
    return folder


def test_the_smoke_preset_writes_everything(smoke):
    folder, out = smoke
    assert {p.name for p in folder.iterdir()} == WRITTEN
    assert sorted(p.name for p in (folder / "stages").iterdir()) == ["1", "2", "4"]
    for row in rows(folder).values():
        assert row.keys() >= COLUMNS
    assert {"student@4 ddim 4", "student@1 ddim 1", "teacher ddim 8", "teacher unipc 2"} <= rows(folder).keys()
    assert "8 -> 4 -> 2 -> 1 steps" in out and "GB in each of 1 process" in out and "about" in out
    phases = [json.loads(line)["phase"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert set(phases) == {"4", "2", "1"}


def test_the_pipeline_gives_the_same_pixels_in_a_process_with_diffusers_alone(smoke):
    folder, out = smoke
    assert "same pixels through diffusers alone" in out
    student = teachers.load(str(folder))
    assert verify(student, folder / "pipeline", [1]) < 1e-4
    broken = folder.parent / "broken"
    shutil.copytree(folder / "pipeline", broken)
    config = broken / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace('"trailing"', '"leading"'))
    with pytest.raises(RuntimeError, match="differs from our sampler"):
        verify(student, broken, [1])


def test_a_student_describes_itself(small):
    _, description = files.load(small / "student.safetensors")
    assert description["sampler"] == {"name": "ddim", "grid": "uniform", "steps": [1]}
    assert description["prediction"] == "v" and description["time"] == "index" and description["schedule"]["kind"] == "table"
    assert description["record"]["method"] == "progressive" and description["network"]["family"] == "unet2d"


def test_two_processes_train_the_same_model_and_measure_the_same_teacher(small, tmp_path):
    succeed("progressive", *SMALL, "--output-dir", tmp_path / "two", processes=2, threads=1)
    one, two = weights(small / "student.safetensors"), weights(tmp_path / "two" / "student.safetensors")
    assert max((one[k] - two[k]).abs().max() for k in one) < 1e-4
    assert rows(small).keys() == rows(tmp_path / "two").keys()
    for name, row in rows(small).items():
        other = rows(tmp_path / "two")[name]
        for column in ("fid", "kid", "isc", "precision", "recall", "nfe", "fid_infinity"):
            exact = row["role"] == "teacher"
            assert other[column] == pytest.approx(row[column], rel=1e-6 if exact else 0.05, abs=1e-9 if exact else 0.02), (
                name,
                column,
            )


# figures of the machine, not of the images
MACHINE = {"seconds_per_image", "wall_seconds", "peak_memory_gb", "break_even_images", "training_seconds"}

KILL_WHEN = {
    "before the first checkpoint": lambda f: (f / "metrics.jsonl").exists(),
    "in the middle of a stage": lambda f: list((f / "stages/2").glob("resume-*")),
    "between stages": lambda f: (f / "stages/2/student.safetensors").exists(),
    "in the middle of the sweep": lambda f: len(list((f / "cells").glob("*.json"))) >= 2,
}


def test_a_run_killed_in_every_phase_ends_with_the_same_bits(small, tmp_path):
    folder = tmp_path / "killed"
    command = [sys.executable, str(ROOT / "recipes/progressive.py"), *SMALL, "--output-dir", str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for moment, reached in KILL_WHEN.items():
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
        deadline = time.monotonic() + 120
        while not reached(folder) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, f"the run was over before it was killed {moment}"
    finished = {p.name: p.stat().st_mtime_ns for p in (folder / "cells").glob("*.json")}
    succeed("progressive", *SMALL, "--output-dir", folder, threads=1)
    assert (folder / "student.safetensors").read_bytes() == (small / "student.safetensors").read_bytes()
    assert all((folder / "cells" / name).stat().st_mtime_ns == when for name, when in finished.items())
    for name, row in rows(small).items():
        assert rows(folder)[name]["fid"] == row["fid"]
    steps = [(e["phase"], e["step"]) for e in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())]
    assert len(steps) == len(set(steps))  # no line is written twice
    assert not list(folder.rglob("*.part")) and not list(folder.rglob("resume-*"))


def test_what_a_run_killed_while_writing_left_behind_is_removed_when_it_continues(small, tmp_path):
    folder = tmp_path / "left"
    shutil.copytree(small, folder)
    before = {str(p.relative_to(folder)) for p in folder.rglob("*")}
    for left in (
        "stages/2/resume-000000006.safetensors",
        "stages/2/.resume-000000007.safetensors.1.part",
        ".config.json.1.part",
    ):
        shutil.copy(folder / "student.safetensors", folder / left)
    shutil.copytree(folder / "pipeline", folder / ".pipeline.ab.part")
    succeed("progressive", *SMALL, "--output-dir", folder, threads=1)
    assert {str(p.relative_to(folder)) for p in folder.rglob("*")} == before


def test_a_finished_run_is_reported_again_without_work(small, capsys):
    before = (small / "student.safetensors").stat().st_mtime_ns, (small / "stages/1/student.safetensors").stat().st_mtime_ns
    progressive.main([*SMALL, "--output-dir", str(small)])
    assert (small / "stages/1/student.safetensors").stat().st_mtime_ns == before[1]
    assert "report:" in capsys.readouterr().out


@pytest.mark.parametrize("processes", [2, 3])
def test_fid_is_independent_of_world_size(small, tmp_path, processes):
    arguments = ("--model", "digits", small, "--images", 110, "--chunk", 16, "--steps", 1, 2, "--samplers", "ddim", "heun")
    arguments += ("--baseline-steps", 3)
    here(evaluate.main, *arguments, "--output-dir", tmp_path / "one")
    succeed("evaluate", *arguments, "--output-dir", tmp_path / "many", processes=processes, threads=1)
    one, many = rows(tmp_path / "one"), rows(tmp_path / "many")
    assert one.keys() == many.keys() and len(one) == 6
    for name, row in one.items():
        different = [c for c in row if row[c] != many[name][c] and c not in MACHINE]
        assert not different, (name, different)


def test_samples_are_the_images_that_were_measured(small, tmp_path):
    """FID of the folder that sample.py writes, by torch-fidelity itself, is the FID of the report."""
    import torch_fidelity
    from PIL import Image

    import eval.fidelity  # noqa: F401  (registers the extractor)
    from teachers.digits import digits

    few = ("--images", 110, "--chunk", 55, "--steps", 1, "--baseline-steps", 0)
    here(evaluate.main, "--model", "digits", small, *few, "--output-dir", tmp_path / "e")
    sample.main(["--model", str(small), "--images", "110", "--output", str(tmp_path / "images")])
    (tmp_path / "real").mkdir()
    for i, image in enumerate(digits()[0]):
        Image.fromarray(image[0].numpy()).save(tmp_path / "real" / f"{i:06d}.png")
    theirs = torch_fidelity.calculate_metrics(
        input1=str(tmp_path / "images"), input2=str(tmp_path / "real"), cuda=False, feature_extractor="digits", fid=True, isc=True,
        verbose=False, cache=False, save_cpu_ram=True, batch_size=256,
    )  # fmt: skip
    row = rows(tmp_path / "e")["student@1 ddim 1"]
    assert row["fid"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-6)
    assert row["isc"] == pytest.approx(theirs["inception_score_mean"], rel=1e-6)


def test_the_report_of_a_run_fits_its_schema(smoke):
    from jsonschema import validate

    validate(json.loads((smoke[0] / "report.json").read_text()), json.loads((ROOT / "eval/report.schema.json").read_text()))
    student = rows(smoke[0])["student@1 ddim 1"]
    assert student["training_seconds"] > 0 and 0 < student["drift"] < 2 and sum(student["labels_seen"]) == 200


def test_fid_alone_needs_no_features_and_gives_the_same_number(small, tmp_path):
    arguments = ("--model", "digits", small, "--images", 150, "--chunk", 64, "--steps", 1, "--baseline-steps", 0)
    here(evaluate.main, *arguments, "--output-dir", tmp_path / "all")
    succeed("evaluate", *arguments, "--metrics", "fid", "--output-dir", tmp_path / "fid", processes=3, threads=1)
    for name, row in rows(tmp_path / "all").items():
        other = rows(tmp_path / "fid")[name]
        assert other["fid"] == pytest.approx(row["fid"], rel=1e-6) and "kid" not in other
        assert other["fid_interval"] == pytest.approx(row["fid_interval"], rel=1e-5)


def test_verify_searched_grids_and_a_stored_reference(small, tmp_path, capsys):
    arguments = ("--model", "digits", small, "--images", 150, "--steps", 1, 3, "--samplers", "ddim", "ipndm")
    arguments += ("--baseline-steps", 0)
    here(evaluate.main, *arguments, "--search-grid", "--verify", "--output-dir", tmp_path / "e")
    assert "torch_fidelity.calculate_metrics says fid" in capsys.readouterr().out
    found = rows(tmp_path / "e")
    assert found["teacher ipndm searched 3"]["times"][0] == 1 and len(found["teacher ipndm searched 3"]["times"]) == 4
    reference = tmp_path / "e" / "reference.safetensors"
    here(evaluate.main, *arguments, "--reference", reference, "--output-dir", tmp_path / "r")
    assert rows(tmp_path / "r")["teacher ddim 3"]["fid"] == found["teacher ddim 3"]["fid"]


def test_finished_runs_are_compared_on_one_page(small, tmp_path, capsys):
    few = ("--steps", 1, "--baseline-steps", 0, "--chunk", 60)
    for name in ("a", "b"):
        model = ("digits",) if name == "a" else (small,)
        here(evaluate.main, "--model", *model, *few, "--images", 60, "--output-dir", tmp_path / name)
    here(compare.main, "--runs", tmp_path / "a", tmp_path / "b", "--output-dir", tmp_path / "c")
    assert rows(tmp_path / "c").keys() == {"teacher ddim 1", "student@1 ddim 1"}
    assert rows(tmp_path / "c")["student@1 ddim 1"]["ratio"] > 0 and (tmp_path / "c" / "report.html").is_file()
    here(evaluate.main, *few, "--images", 50, "--output-dir", tmp_path / "d")
    capsys.readouterr()
    message = bad(compare.main, ["--runs", tmp_path / "a", tmp_path / "d", "--output-dir", tmp_path / "x"], capsys)
    assert "cannot be compared: images is 60 and 50" in message and not (tmp_path / "x").exists()


def test_a_full_disk_is_one_line_and_the_finished_cells_are_kept(small, tmp_path, monkeypatch, capsys):
    import errno

    arguments = ["--model", "digits", str(small), "--images", "60", "--chunk", "60", "--steps", "1", "--baseline-steps", "0"]
    arguments += ["--output-dir", str(tmp_path / "e")]
    real_fsync, written = os.fsync, []

    def fsync(descriptor):
        written.append(descriptor)
        if len(written) > 4:  # config.json, the reference, and the two files of the first cell
            raise OSError(errno.ENOSPC, "No space left on device")
        real_fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(SystemExit) as exit_:
        evaluate.main(arguments)
    monkeypatch.undo()
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert exit_.value.code == 2 and "No space left on device" in line and "what was finished is kept" in line
    kept = sorted(p.name for p in (tmp_path / "e" / "cells").iterdir())
    assert kept == ["teacher_ddim_1.json", "teacher_ddim_1.safetensors"]
    evaluate.main(arguments)
    assert rows(tmp_path / "e").keys() == {"teacher ddim 1", "student@1 ddim 1"}


def test_searched_step_times_are_written_into_the_student_and_its_pipelines(small, tmp_path):
    arguments = (
        "--model",
        small / "stages/2",
        "--steps",
        2,
        3,
        "--nodes",
        8,
        "--proxy-images",
        64,
        "--images",
        100,
        "--chunk",
        64,
    )
    here(search.main, *arguments, "--output-dir", tmp_path / "s")
    _, description = files.load(tmp_path / "s" / "student.safetensors")
    times = description["sampler"]["times"]
    assert description["sampler"]["steps"] == [2, 3] and [len(t) for t in times.values()] == [3, 4]
    assert all(t[0] == 1 and t[-1] == 0 for t in times.values())
    fid = {name: row["fid"] for name, row in rows(tmp_path / "s").items()}
    assert {"student@2 ddim 2", "student@2 ddim searched 2", "student@3 ddim searched 3"} <= fid.keys()
    assert (tmp_path / "s" / "pipeline-3" / "model_index.json").is_file()
    sample.main(["--model", str(tmp_path / "s"), "--steps", "3", "--images", "4", "--output", str(tmp_path / "s.png")])
    here(evaluate.main, "--model", tmp_path / "s", "--steps", 3, "--images", 100, "--chunk", 64, "--output-dir", tmp_path / "e")
    (again,) = rows(tmp_path / "e").values()
    assert again["fid"] == min(fid["student@3 ddim 3"], fid["student@3 ddim searched 3"])


@pytest.mark.parametrize("schedule, prediction", [(Flow(), "flow"), (VE(0.02, 2.0), "score")], ids=["flow", "ve"])
def test_a_teacher_without_a_stock_pipeline_has_a_student_on_a_table_with_one(tmp_path, schedule, prediction, capsys):
    model = untrained((1, 8, 8), 10, (8, 16), 1, 0)
    net, network = model.parametric.net, model.network
    if prediction == "score":
        net, network = wrap(net, network, {"kind": "unit"})
    time = "level" if prediction == "score" else "thousand_time"
    teachers.save(
        tmp_path / "t.safetensors", replace(model, network=network, denoiser=Denoiser(net, schedule, prediction, time))
    )
    common = [
        "--teacher",
        str(tmp_path / "t.safetensors"),
        "--force",
        "--threads",
        "1",
        "--images",
        "60",
        "--chunk",
        "60",
        "--sweep-steps",
        "1",
    ]
    runs = (
        (progressive.main, ["--start-steps", "4", "--images-per-stage", "128", "--student", "table"], "a"),
        (consistency.main, ["--method", "cd", "--training-images", "128", "--steps", "1", "--student", "table"], "b"),
        (consistency.main, ["--method", "cd", "--training-images", "128", "--steps", "1"], "c"),
    )
    for recipe, arguments, name in runs:
        recipe(["--preset", "smoke", *common, *arguments, "--output-dir", str(tmp_path / name)])
        said = capsys.readouterr().out
        assert ("gives the same pixels" in said) == (name != "c")
    assert "no diffusers pipeline: " in said
    with torch.no_grad():
        taught, began = teachers.load(str(tmp_path / "t.safetensors")), on_table(teachers.load(str(tmp_path / "t.safetensors")))
        x, t = torch.randn(3, 1, 8, 8), torch.full((3,), 7.0)
        inner = getattr(taught.denoiser.net, "net", taught.denoiser.net)
        assert torch.equal(began.denoiser.net(x, t, torch.arange(3)), inner(x, t, torch.arange(3)))


TINY = (
    "--preset",
    "smoke",
    "--chunk",
    "60",
    "--training-images",
    "256",
    "--images",
    "60",
    "--sweep-steps",
    "1",
    "--threads",
    "1",
)


@pytest.mark.parametrize(
    "arguments",
    [
        ("cd",), ("cd", "--order", "1", "--averaged-target", "--distance", "pseudo_huber"), ("ct", "--from-scratch"),
        ("ict", "--from-scratch"), ("ect",), ("ect", "--target-mix", "auto"), ("ect", "--from-scratch", "--target", "posterior-mean"),
        ("scd",), ("sct", "--jvp", "exact"), ("meanflow",), ("meanflow", "--from-scratch", "--sampler", "jump"),
        ("cd", "--student", "new", "--sampler", "ddim"),
        ("denoise", "--student", "new", "--regularize", "martingale=0.1", "fokker-planck=0.001"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_every_consistency_method_writes_what_progressive_writes(tmp_path, arguments, monkeypatch):
    monkeypatch.setattr("teachers.export.deliver.verify", lambda *a: 0.0)  # tested with the pipelines themselves
    consistency.main(["--method", *arguments, *TINY, "--output-dir", str(tmp_path / "r")])
    method = arguments[0]
    sampler = "ddim" if "ddim" in arguments else METHODS[method].sampler
    baked = set() if sampler == "ddim" else {"pipeline-2"}
    assert {p.name for p in (tmp_path / "r").iterdir()} == WRITTEN | baked
    found = rows(tmp_path / "r")
    assert {f"{method} {sampler} 1", f"{method} {sampler} 2"} <= found.keys()
    assert ("teacher ddim 1" in found) != ("--from-scratch" in arguments)


def test_a_consistency_run_killed_in_the_middle_ends_with_the_same_bits(tmp_path):
    arguments = ("--method", "ect", *TINY, "--training-images", "2048")
    consistency.main([*arguments, "--output-dir", str(tmp_path / "whole")])
    folder = tmp_path / "killed"
    command = [sys.executable, str(ROOT / "recipes/consistency.py"), *arguments, "--output-dir", str(folder)]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    while not list(folder.glob("stages/ect/resume-*")) and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    consistency.main([*arguments, "--output-dir", str(folder)])
    assert (folder / "student.safetensors").read_bytes() == (tmp_path / "whole" / "student.safetensors").read_bytes()


def test_the_variance_report_is_written(tmp_path):
    variance.main(["--preset", "smoke", "--threads", "1", "--training-images", "512", "--output-dir", str(tmp_path / "v")])
    out = json.loads((tmp_path / "v" / "variance.json").read_text())
    assert out["targets"].keys() == {"data", "teacher", "mix", "posterior mean"} and len(out["logsnr"]) == 3
    noisy, clean = 0, 2  # log-SNR -8 and 8: the data sample varies most where little is left of it
    assert out["targets"]["data"]["error"][noisy] > 10 * out["targets"]["data"]["error"][clean]
    assert out["targets"]["teacher"]["error"][noisy] < out["targets"]["data"]["error"][noisy] / 10
    assert (tmp_path / "v" / "variance.html").read_text().count("<tr>") == 4 and (
        tmp_path / "v" / "variance.png"
    ).stat().st_size > 10_000


def test_a_network_that_returns_nan_fails_its_cells_and_leaves_the_others(small, tmp_path):
    path = tmp_path / "nan" / "student.safetensors"
    tensors, description = files.load(small / "student.safetensors")
    tensors["unet.conv_out.bias"] = torch.full_like(tensors["unet.conv_out.bias"], float("nan"))
    files.save(path, tensors, {k: v for k, v in description.items() if k != "format"})
    few = ("--images", 60, "--chunk", 60, "--steps", 1, "--baseline-steps", 0)
    here(evaluate.main, "--model", "digits", path, *few, "--output-dir", tmp_path / "e")
    out = rows(tmp_path / "e")
    assert out["student@1 ddim 1"]["error"].startswith("image 0 of cell") and out["teacher ddim 1"]["fid"] > 0
    assert "is not finite" in (tmp_path / "e" / "report.html").read_text()


def test_the_teacher_recipe_makes_a_model_every_recipe_takes(tmp_path):
    folder = tmp_path / "teacher"
    arguments = ["--preset", "smoke", "--images", "1024", "--output-dir", str(folder)]  # the flag's older name
    teacher_recipe.main(arguments)
    assert {"teacher.safetensors", "samples.png", "metrics.jsonl", "config.json"} <= {p.name for p in folder.iterdir()}
    few = ["--steps", "2", "--images", "4", "--output", str(tmp_path / "grid.png")]
    sample.main(["--model", str(folder / "teacher.safetensors"), *few])
    assert (tmp_path / "grid.png").stat().st_size > 100


def test_export_writes_a_student_that_loads_again_and_a_verified_pipeline(small, tmp_path, capsys):
    export.main(["--model", str(small / "stages" / "2"), "--output-dir", str(tmp_path / "x")])
    assert "pipeline: same pixels through diffusers alone" in capsys.readouterr().out
    assert (tmp_path / "x/student.safetensors").read_bytes() == (small / "stages/2/student.safetensors").read_bytes()


def bad(main, arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        main([str(a) for a in arguments])
    out = capsys.readouterr()
    assert exit_.value.code == 2
    assert out.err.count("\n") == 1, out.err
    return out.err


@pytest.mark.parametrize(
    "main, arguments, message",
    [
        (progressive.main, ["--techer", "digits"], "unrecognized arguments: --techer digits: nearest are --teacher"),
        (progressive.main, ["--steps", "4"], "nearest are --end-steps, --sweep-steps, --start-steps"),
        (progressive.main, ["--help", "distance"], "accepted are --help, --help all, --help teacher, --help data"),
        (progressive.main, ["--log-with", "wandb"], "the package wandb is not installed: pip install wandb"),
        (evaluate.main, ["--compare", "a", "b"], "--compare is a command of its own now: python recipes/compare.py --runs"),
        (teacher_recipe.main, ["--probe", "digits"], "a command of its own now: python recipes/probe.py --model"),
        (compare.main, [], "the following arguments are required: --runs"),
        (progressive.main, ["--teacher", "digts"], "unknown model 'digts': accepted are digits"),
        (progressive.main, ["--teacher", "nowhere/x.safetensors"], "there is no such file"),
        (progressive.main, ["--teacher", "oracle:digits"], "an oracle has no network"),
        (progressive.main, ["--data", "nowhere.npz"], "unknown data 'nowhere.npz', no such file or folder"),
        (progressive.main, ["--start-steps", "64", "--end-steps", "3"], "accepted are [32, 16, 8, 4, 2, 1]"),
        (progressive.main, ["--start-steps", "7"], "none: start is odd"),
        (progressive.main, ["--start-steps", "many"], "invalid int value: 'many'"),
        (progressive.main, ["--weight", "sqrt"], "choose from"),
        (progressive.main, ["--batch-size", "100", "--microbatch", "7"], "choose a multiple of 15"),
        (progressive.main, ["--features", "incption"], "unknown features"),
        (progressive.main, ["--preset", "fast"], "choose from"),
        (evaluate.main, ["--samplers", "dpm"], "unknown sampler 'dpm': accepted are ddim"),
        (evaluate.main, ["--steps", "0"], "--steps are 1 or more"),
        (evaluate.main, ["--images", "3"], "--images 40 or more"),
        (evaluate.main, ["--steps", "2000"], "2000 steps on a grid of 1,024: accepted are 1 to 1024"),
        (evaluate.main, ["--verify", "--metrics", "fid"], "--verify needs"),
        (compare.main, ["--runs", "nowhere"], "nowhere: there is no finished report"),
        (search.main, ["--steps", "99"], "accepted are at most as many steps as nodes"),
        (consistency.main, ["--method", "cd", "--from-scratch"], "--method cd distils a teacher and --from-scratch has none"),
        (
            consistency.main,
            ["--method", "ect", "--from-scratch", "--target-mix", "0.5"],
            "needs a teacher and --from-scratch has none",
        ),
        (consistency.main, ["--target-mix", "1.5"], "--target-mix 1.5: accepted are auto and numbers from 0 to 1"),
        (consistency.main, ["--target-mix", "most"], "accepted are auto and numbers"),
        (consistency.main, ["--distance", "lpips"], "--distance lpips is defined for 3 channels, these images have 1"),
        (
            consistency.main,
            ["--method", "scd", "--weight", "one"],
            "--weight means nothing to --method scd: accepted with cd, ct",
        ),
        (
            consistency.main,
            ["--method", "denoise", "--jvp", "exact"],
            "--jvp means nothing to --method denoise: accepted with scd",
        ),
        (consistency.main, ["--target", "posterior-mean", "--target-mix", "1"], "choose it or --target-mix"),
        (consistency.main, ["--method", "ict", "--from-scratch", "--student", "table"], "--from-scratch has none: choose new"),
        (consistency.main, ["--sampler", "consistency:2"], "unknown sampler 'consistency:2': accepted are ddim"),
        (consistency.main, ["--sampler", "jump"], "'jump' needs a two-time network"),
        (evaluate.main, ["--samplers", "jump"], "'jump' needs a two-time network"),
        (consistency.main, ["--regularize", "fokker=1"], "accepted is name=weight with a name of martingale, fokker-planck"),
        (consistency.main, ["--teacher", "oracle:digits"], "an oracle has no network"),
        (sample.main, ["--labels", "11"], "this model has 10 classes"),
        (sample.main, ["--model", "oracle:gaussian"], "are no pictures"),
        (export.main, ["--model", "oracle:gaussian"], "an oracle has no network"),
    ],
)
def test_bad_input_is_one_line_exit_code_2_and_nothing_written(main, arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in bad(main, arguments, capsys)
    assert list(tmp_path.iterdir()) == []


def test_files_that_are_no_models_are_refused_by_what_they_are(small, tmp_path, capsys):
    torch.save({"w": torch.zeros(3)}, tmp_path / "model.pt")
    assert "pickle" in bad(progressive.main, ["--teacher", tmp_path / "model.pt"], capsys)
    (tmp_path / "cut.safetensors").write_bytes((small / "student.safetensors").read_bytes()[:1000])
    assert "not a whole safetensors file" in bad(progressive.main, ["--teacher", tmp_path / "cut.safetensors"], capsys)


class OneSize(torch.nn.Module):
    """Features of 16 x 16 images only."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(3 * 256, 8)

    def forward(self, x):
        return self.linear(x.flatten(1).float())


def test_an_extractor_or_reference_that_does_not_fit_leaves_nothing_behind(small, tmp_path, capsys, monkeypatch):
    """So that the corrected command finds no run of another configuration in its way."""
    monkeypatch.syspath_prepend(str(ROOT / "tests"))
    out = tmp_path / "e"
    line = bad(evaluate.main, ["--features", "test_recipes:OneSize", "--output-dir", str(out)], capsys)
    assert "cannot take images of shape (1, 8, 8)" in line and not out.exists()
    np.savez(tmp_path / "r.npz", mu=np.zeros(4), sigma=np.eye(4))
    line = bad(evaluate.main, ["--reference", str(tmp_path / "r.npz"), "--output-dir", str(out)], capsys)
    assert "has features 'inception-v3-compat', here it is 'digits'" in line and not out.exists()


def test_a_network_without_a_tangent_or_from_other_noise_levels_is_refused_before_anything_is_written(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.syspath_prepend(str(ROOT / "tests"))
    arguments = ["--preset", "smoke", "--force", "--output-dir", str(tmp_path / "r")]
    spec = "test_consistency:NoRule,prediction=v,shape=1x8x8,schedule="
    line = bad(consistency.main, ["--method", "sct", "--jvp", "exact", "--teacher", spec + "cosine", *arguments], capsys)
    assert "no exact tangent" in line and "use --jvp finite" in line
    line = bad(consistency.main, ["--student", spec + "edm", "--teacher", spec + "ve", *arguments], capsys)
    assert "begins at sigma/alpha 0.002 (t_min), the teacher's at 0.02" in line
    assert not list(tmp_path.iterdir())


def test_data_of_another_shape_are_refused(tmp_path, capsys):
    import numpy as np

    np.savez(tmp_path / "colour.npz", images=np.zeros((10, 8, 8, 3), np.uint8), labels=np.zeros(10, np.int64))
    assert "(1, 8, 8), colour holds (3, 8, 8)" in bad(progressive.main, ["--data", tmp_path / "colour.npz"], capsys)
    np.savez(tmp_path / "bare.npz", images=np.zeros((10, 8, 8, 1), np.uint8))
    assert "bare has no labels" in bad(progressive.main, ["--data", tmp_path / "bare.npz"], capsys)
    np.savez(tmp_path / "float.npz", images=np.zeros((10, 8, 8, 1)))
    assert "images are float64" in bad(progressive.main, ["--data", tmp_path / "float.npz"], capsys)


def test_an_output_directory_with_another_run_is_left_alone(small, tmp_path, capsys):
    before = {p: p.stat().st_mtime_ns for p in small.rglob("*")}
    message = bad(progressive.main, [*SMALL, "--seed", "1", "--output-dir", small], capsys)
    assert "holds another run (seed is 0 there and 1 here)" in message
    assert "holds this very run already" in bad(progressive.main, [*SMALL, "--no-resume", "--output-dir", small], capsys)
    assert {p: p.stat().st_mtime_ns for p in small.rglob("*")} == before
    (tmp_path / "thesis.txt").touch()
    assert "is not empty and holds no run" in bad(progressive.main, [*SMALL, "--output-dir", tmp_path], capsys)


def test_a_student_is_refused_at_steps_it_was_not_made_for(small, tmp_path, capsys):
    message = bad(
        evaluate.main, ["--model", small / "student.safetensors", "--steps", "4", "--output-dir", tmp_path / "e"], capsys
    )
    assert "was distilled for 1 steps; --steps names 4" in message
    assert "made for 1 steps, not 3" in bad(
        sample.main, ["--model", small, "--steps", "3", "--output", tmp_path / "a.png"], capsys
    )


def test_sample_finds_the_stage_of_a_step_count_in_a_run(small, tmp_path, capsys):
    sample.main(["--model", str(small), "--steps", "2", "--images", "4", "--output", str(tmp_path / "run.png")])
    sample.main(["--model", str(small / "stages/2"), "--images", "4", "--output", str(tmp_path / "stage.png")])
    assert (tmp_path / "run.png").read_bytes() == (tmp_path / "stage.png").read_bytes()
    assert "4 images, ddim with 2 steps" in capsys.readouterr().out


def test_every_recipe_has_a_smoke_preset(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    classifier.main(["--preset", "smoke", "--output-dir", "c"])
    sample.main(["--preset", "smoke", "--steps", "1", "--output", "s.png"])
    benchmark.main(["--preset", "smoke", "--output-dir", "b"])
    assert {"c/digits.safetensors", "s.png", "b/benchmark.json"} <= {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")}
    assert json.loads((tmp_path / "b/benchmark.json").read_text()).keys() == {
        "extraction", "generation", "loading", "decoding", "starting",
    }  # fmt: skip
    for name in commands():
        assert "smoke" in importlib.import_module(f"recipes.{name}").PRESETS, name


def test_sample_overwrites_nothing(tmp_path, capsys):
    (tmp_path / "a.png").touch()
    assert "exists: name another" in bad(sample.main, ["--output", tmp_path / "a.png"], capsys)


def test_an_eps_teacher_is_turned_to_v_before_its_ladder(tmp_path):
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    unet = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "ddpm")
    few = ["--start-steps", "2", "--images", "40", "--output-dir", str(tmp_path / "run")]
    progressive.main([*SMALL, "--force", "--teacher", str(tmp_path / "ddpm"), *few])
    _, description = files.load(tmp_path / "run" / "student.safetensors")
    assert description["prediction"] == "v" and (tmp_path / "run/stages/v/student.safetensors").exists()
    assert (tmp_path / "run" / "pipeline" / "model_index.json").exists()


def test_guidance_is_baked_into_the_student_and_tensorboard_is_written(tmp_path):
    progressive.main(
        [*SMALL, "--guidance", "2", "--start-steps", "2", "--log-with", "tensorboard", "--output-dir", str(tmp_path / "r")]
    )
    row = rows(tmp_path / "r")
    assert row["teacher ddim 2"]["nfe"] == 4 and row["student@1 ddim 1"]["nfe"] == 1
    assert list((tmp_path / "r" / "trackers").rglob("events.out.*"))
    assert files.load(tmp_path / "r" / "student.safetensors")[1]["record"]["guidance"] == 2
