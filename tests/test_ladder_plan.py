"""The ladder as a plan: stages skipped, doubled, run again or ended early, and what a run will take, said before it starts."""

import shutil
from collections import namedtuple
from dataclasses import replace

import pytest
import torch

from distill import files, grid
from distill.progressive import Progressive, steps_in_one
from distill.rng import Rng
from distill.samplers import ddim
from distill.schedule import Cosine, move
from recipes import consistency, progressive
from recipes.common import training
from recipes.common.measurement import Measurement
from recipes.common.plan import PAGE, disk_bytes
from recipes.data import sets
from teachers.oracle import Gaussian

ORACLE = Gaussian(Cosine(), torch.tensor([0.5, -0.25]), torch.tensor([0.5, 0.2]))
SMALL = "--threads 1 --preset smoke --images 40 --chunk 40 --sweep-steps 1 --start-steps 4 --images-per-stage 64 --batch-size 32".split()  # noqa: SIM905


def run(folder, *arguments):
    progressive.main([*SMALL, *map(str, arguments), "--output-dir", str(folder)])
    return folder


def exit_of(main, *arguments):
    with pytest.raises(SystemExit) as caught:
        main([*map(str, arguments)])
    return caught.value.code


def student(folder, stage, kind="student"):
    return files.load(folder / "stages" / str(stage) / f"{kind}.safetensors")


@pytest.fixture
def brief(monkeypatch):
    """Runs without report and export: seconds less, where nothing is claimed about them."""
    monkeypatch.setattr(training, "export_pipelines", lambda run, model: None)
    monkeypatch.setattr(Measurement, "report", lambda *_: {"verdict": ""})


@pytest.mark.parametrize("k", [2, 4, 8])
def test_a_stage_that_skips_others_learns_as_many_exact_solver_steps_as_it_replaces(k):
    times = grid.uniform(Cosine(), 16)
    for i in range(0, 16, k):
        path = list(times[i : i + k + 1])
        x = torch.randn(64, 2).double()
        landed = move(Cosine(), x, steps_in_one(ORACLE, x, path), path[0], path[-1])
        assert torch.allclose(landed, ddim(ORACLE, x, torch.stack(path)), atol=1e-9)


def test_only_the_grid_of_a_student_that_skips_is_trained_on_and_its_exact_student_has_no_loss():
    times, seen = grid.uniform(Cosine(), 8), []

    class Exact:
        schedule = Cosine()

        def __call__(self, x, t):
            seen.extend(t.tolist())
            i = (t[:, None] - times).abs().argmin(1)
            return steps_in_one(ORACLE, x, [times[i + j] for j in range(5)])

    method = Progressive(ORACLE, times, substeps=4)
    loss = method(Exact(), torch.randn(256, 2).double(), rng=Rng(torch.Generator().manual_seed(0), 256), progress=0.0)
    assert set(seen) == {1.0, 0.5} and loss.max() < 1e-12


def config(**settings):
    return progressive.Config(**settings)


def test_stages_are_left_out_by_name():
    assert progressive.ladder(config(start_steps=64, skip=(32, 4))) == [16, 8, 2, 1]
    assert progressive.ladder(config(start_steps=64, skip=(0,))) == [32, 16, 8, 4, 2, 1]
    loss = progressive.stage_loss(config(), ORACLE, 64, 16)
    assert (loss.substeps, len(loss.times)) == (4, 65)


def test_a_long_ladder_leaves_out_its_first_stage_by_default_and_a_short_one_none():
    assert progressive.ladder(config()) == [16, 8, 4, 2, 1]
    assert progressive.ladder(config(start_steps=32)) == [16, 8, 4, 2, 1]
    assert progressive.ladder(config(start_steps=128, end_steps=64)) == [64]


def test_the_budget_of_a_stage_follows_its_difficulty():
    images = {n: progressive.budget(config(images_per_stage=1000), n).images for n in (64, 32, 16, 8, 4, 2, 1)}
    assert images == {64: 1000, 32: 500, 16: 500, 8: 1000, 4: 1000, 2: 2000, 1: 2000}


@pytest.mark.parametrize(("settings", "line"), [
    ({"skip": (1,)}, "--skip 1: accepted are the stages before the last one, [32, 16, 8, 4, 2]"),
    ({"skip": (3,)}, "--skip 3: accepted"), ({"start_steps": 2, "skip": (1,)}, "none here"),
    ({"rerun": 64}, "--rerun 64: accepted are the stages of this ladder, [16, 8, 4, 2, 1]"),
    ({"skip": (4,), "rerun": 4}, "--rerun 4: accepted are the stages of this ladder, [32, 16, 8, 2, 1]"),
    ({"max_fid_ratio": 0.0}, "--max-fid-ratio 0.0: accepted are finite numbers, above 0"),
    ({"max_fid_ratio": float("nan")}, "--max-fid-ratio nan"),
])  # fmt: skip
def test_a_plan_that_does_not_fit_its_ladder_is_refused(settings, line):
    with pytest.raises(ValueError) as caught:
        progressive.ladder(config(**settings))
    assert line in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("main", [progressive.main, consistency.main])
def test_a_dry_run_says_time_memory_and_disk_and_writes_nothing(main, tmp_path, capsys):
    few = ("--threads", 1, "--preset", "smoke", "--images", 40, "--sweep-steps", 1)
    assert exit_of(main, *few, "--dry-run", "--output-dir", tmp_path / "r") == 0
    out = capsys.readouterr().out
    for word in ("training", "about", "sweep", "memory", "activations", "B in each of 1 process", "disk      about", "output"):
        assert word in out
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
def test_too_little_disk_is_said_before_anything_is_written(dry, tmp_path, capsys, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 10**6, 10**6))
    assert exit_of(progressive.main, *SMALL, *dry, "--output-dir", tmp_path / "r") == 2
    line = capsys.readouterr().err
    assert "the run needs about" in line and "of disk and 1 MB are free" in line and line.count("\n") == 1 and len(line) < 250
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_run_writes_no_more_than_its_plan_says_and_not_far_less(tmp_path, teacher, monkeypatch):
    """Everything but the room for checkpoints, which are gone at the end, and for the pages."""
    folder = run(tmp_path / "r")
    written = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    data, extractor = sets.load("digits"), training.Extractor.create("digits")
    said = disk_bytes(teacher, data, extractor, stages=2, cells=20, images=40, averaged=False)
    weights = sum(p.numel() * 4 for p in teacher.denoiser.net.parameters())
    assert written < said < written + PAGE + 3 * 3 * weights + 2.2 * weights


@pytest.mark.slow
def test_a_stage_that_costs_too_much_fid_is_doubled_once_and_then_the_ladder_ends(tmp_path, capsys, brief):
    folder = run(tmp_path / "r", "--max-fid-ratio", 1e-6)
    out = capsys.readouterr().out
    assert "stage 2: " in out and "allowed are 1e-06: once more with 256 images" in out and "the ladder ends here" in out
    assert student(folder, 2)[1]["record"]["trained_images"] == 256
    assert student(folder, 2, "first-try")[1]["record"]["trained_images"] == 128 and not (folder / "stages/1").exists()
    assert (folder / "student.safetensors").read_bytes() == (folder / "stages/2/student.safetensors").read_bytes()
    before = (folder / "stages/2/student.safetensors").read_bytes()
    (folder / "stages/2/student.safetensors").unlink()  # as if killed in the second try
    run(folder, "--max-fid-ratio", 1e-6)
    assert (folder / "stages/2/student.safetensors").read_bytes() == before
    assert "once more" not in capsys.readouterr().out


@pytest.mark.slow
def test_a_ladder_within_its_ratio_is_the_ladder_without_one_and_its_stages_are_run_again(tmp_path, capsys, brief):
    folder, plain = run(tmp_path / "r", "--max-fid-ratio", 1e9), run(tmp_path / "plain")
    capsys.readouterr()
    first = {n: student(folder, n)[0] for n in (2, 1)}
    for n in (2, 1):
        assert all(torch.equal(v, student(plain, n)[0][k]) for k, v in first[n].items())
    run(folder, "--max-fid-ratio", 1e9, "--rerun", 1)
    assert same(student(folder, 2)[0], first[2]) and not same(student(folder, 1)[0], first[1])
    assert same(student(folder, 1, "student-before-rerun-1")[0], first[1])
    second = student(folder, 1)[0]
    run(folder, "--max-fid-ratio", 1e9)  # goes on with what is there
    assert same(student(folder, 1)[0], second)
    run(folder, "--max-fid-ratio", 1e9, "--rerun", 2)
    third = {n: student(folder, n)[0] for n in (2, 1)}
    assert not same(third[2], first[2]) and not same(third[1], second)
    (folder / "stages/1/student.safetensors").unlink()  # as if killed in the last stage of the rerun
    run(folder, "--max-fid-ratio", 1e9, "--rerun", 2)
    assert same(student(folder, 2)[0], third[2]) and same(student(folder, 1)[0], third[1])


def same(one, other):
    return all(torch.equal(value, other[key]) for key, value in one.items())


@pytest.mark.slow
def test_a_ladder_with_a_stage_left_out_has_no_such_student(tmp_path, capsys, brief):
    folder = run(tmp_path / "r", "--skip", 2)
    assert "4 -> 1 steps" in capsys.readouterr().out
    assert [p.name for p in (folder / "stages").iterdir()] == ["1"] and student(folder, 1)[1]["sampler"]["steps"] == [1]
    assert replace(config(), skip=(2,)).skip == (2,)
