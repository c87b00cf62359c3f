"""The ladder as a user launches it: by accelerate and by torchrun, killed and continued, and what it leaves behind."""

import json
import shutil

import pytest
from conftest import ROOT, here, rows, succeed, words
from diffusers import DDPMPipeline, DDPMScheduler
from jsonschema import validate
from pipelines import unet
from processes import killed

import teachers
from distill import files
from recipes import progressive
from teachers.export.deliver import verify

pytestmark = pytest.mark.slow

WRITTEN = set(
    words(
        "config.json metrics.jsonl student.safetensors report.json report.csv report.md report.html fid_vs_nfe.png",
        "fid_vs_seconds.png samples.png labels.png pipeline stages cells reference.safetensors",
    )
)
COLUMNS = set(words("fid fid_interval fid_infinity kid isc precision recall nfe seconds_per_image agreement"))
MACHINE = set(words("seconds_per_image wall_seconds peak_memory_gb break_even_images training_seconds"))  # not of the images
MACHINE |= set(words("seconds_interval seconds_rounds timing break_even_interval"))
SMALL = words(
    "--threads 1 --preset smoke --start-steps 4 --images-per-stage 256 --batch-size 64 --images 80 --chunk 80 --sweep-steps 1"
)
SCRIPT = ROOT / "recipes/progressive.py"


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """The directory and output of a smoke run with a ladder of two stages, under ``accelerate launch`` as the README has it."""
    folder = tmp_path_factory.mktemp("small") / "run"
    return folder, succeed("-m accelerate.commands.launch --num_processes 1", SCRIPT, *SMALL, "--output-dir", folder)


@pytest.fixture
def small(launched):
    return launched[0]


def test_a_run_writes_a_report_that_fits_its_schema_students_that_describe_themselves_and_a_pipeline(launched):
    folder, out = launched
    assert {p.name for p in folder.iterdir()} == WRITTEN and {p.name for p in (folder / "stages").iterdir()} == {"1", "2"}
    validate(json.loads((folder / "report.json").read_text()), json.loads((ROOT / "eval/report.schema.json").read_text()))
    found = rows(folder)
    assert found.keys() == {"student@2 ddim 2", "student@1 ddim 1", "teacher ddim 1", "teacher ddim 4"}
    assert all(row.keys() >= COLUMNS for row in found.values())
    student = found["student@1 ddim 1"]
    assert student["training_seconds"] > 0 and 0 < student["drift"] < 2 and sum(student["labels_seen"]) == 80
    assert "4 -> 2 -> 1 steps" in out and "in each of 1 process" in out and "about" in out
    assert {json.loads(line)["phase"] for line in (folder / "metrics.jsonl").read_text().splitlines()} == {"2", "1"}
    _, description = files.load(folder / "student.safetensors")
    assert description["sampler"] == {"name": "ddim", "grid": "uniform", "steps": [1]}
    assert description["prediction"] == "v" and description["time"] == "index" and description["schedule"]["kind"] == "table"
    assert description["record"]["method"] == "progressive" and description["network"]["family"] == "unet2d"


def test_the_pipeline_gives_the_same_pixels_in_a_process_with_diffusers_alone(launched):
    folder, out = launched
    assert "same pixels through diffusers alone" in out
    broken = folder.parent / "broken"
    shutil.copytree(folder / "pipeline", broken)
    config = broken / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace('"trailing"', '"leading"'))
    with pytest.raises(RuntimeError, match="differs from our sampler"):
        verify(teachers.load(str(folder)), broken, [1])


def test_two_processes_train_the_same_model_and_measure_the_same_teacher_to_the_last_digit(small, tmp_path):
    succeed("-m torch.distributed.run --standalone --nproc_per_node 2", SCRIPT, *SMALL, "--output-dir", tmp_path / "two")
    one, two = (files.load(folder / "student.safetensors")[0] for folder in (small, tmp_path / "two"))
    assert max((one[k] - two[k]).abs().max() for k in one) < 1e-4
    assert rows(small).keys() == rows(tmp_path / "two").keys()
    for name, row in rows(small).items():
        other = rows(tmp_path / "two")[name]
        if row["role"] == "teacher":
            assert [c for c in row if row[c] != other[c] and c not in MACHINE] == [], name
        for column in words("fid kid isc precision recall nfe fid_infinity"):
            assert other[column] == pytest.approx(row[column], rel=0.05, abs=0.02), (name, column)


KILL_WHEN = {
    "before the first checkpoint": lambda f: (f / "metrics.jsonl").exists(),
    "in the middle of a stage": lambda f: list((f / "stages/2").glob("resume-*")),
    "between stages": lambda f: (f / "stages/2/student.safetensors").exists(),
    "in the middle of the sweep": lambda f: len(list((f / "cells").glob("*.json"))) >= 2,
}


def test_a_run_killed_in_every_phase_ends_with_the_same_bits(small, tmp_path):
    folder = tmp_path / "killed"
    for reached in KILL_WHEN.values():
        killed(lambda: reached(folder), progressive.main, words(*SMALL, "--output-dir", folder))  # noqa: B023
    finished = {p.name: p.stat().st_mtime_ns for p in (folder / "cells").glob("*.json")}
    here(progressive.main, *SMALL, "--output-dir", folder)
    assert (folder / "student.safetensors").read_bytes() == (small / "student.safetensors").read_bytes()
    assert all((folder / "cells" / name).stat().st_mtime_ns == when for name, when in finished.items())
    assert {name: row["fid"] for name, row in rows(folder).items()} == {name: row["fid"] for name, row in rows(small).items()}
    steps = [(e["phase"], e["step"]) for e in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())]
    assert len(steps) == len(set(steps))  # no line is written twice
    assert not list(folder.rglob("*.part")) and not list(folder.rglob("resume-*"))


def test_a_finished_run_is_reported_again_without_work_and_what_killed_processes_left_is_removed(small, tmp_path, capsys):
    folder = tmp_path / "left"
    shutil.copytree(small, folder)
    before = {p.relative_to(folder): p.stat().st_mtime_ns for p in folder.rglob("*")}
    for left in words(
        "stages/2/resume-000000006.safetensors stages/2/.resume-7.safetensors.1.part .config.json.1.part stages/2/.tmpESS1DP"
    ):
        shutil.copy(folder / "student.safetensors", folder / left)
    shutil.copytree(folder / "pipeline", folder / ".pipeline.ab.part")
    here(progressive.main, *SMALL, "--output-dir", folder)
    assert "report:" in capsys.readouterr().out
    after = {p.relative_to(folder): p.stat().st_mtime_ns for p in folder.rglob("*")}
    assert after.keys() == before.keys()
    assert all(after[p] == when for p, when in before.items() if p.parts[0] in ("stages", "cells") and p.suffix)


def test_an_output_directory_with_another_run_is_left_alone(small, tmp_path, refused):
    before = {p: p.stat().st_mtime_ns for p in small.rglob("*")}
    line = refused(progressive.main, *SMALL, "--seed 1 --output-dir", small)
    assert "holds another run (seed is 0 there and 1 here)" in line
    assert "holds this very run already" in refused(progressive.main, *SMALL, "--no-resume --output-dir", small)
    assert {p: p.stat().st_mtime_ns for p in small.rglob("*")} == before
    (tmp_path / "thesis.txt").touch()
    assert "is not empty and holds no run" in refused(progressive.main, *SMALL, "--output-dir", tmp_path)


def test_an_eps_teacher_is_turned_to_v_before_its_ladder(tmp_path, stock_here):
    net = unet(in_channels=1, out_channels=1, block_out_channels=(8, 16))
    DDPMPipeline(net, DDPMScheduler()).save_pretrained(tmp_path / "ddpm")
    run = tmp_path / "run"
    here(progressive.main, *SMALL, "--start-steps 2 --images 40 --force --teacher", tmp_path / "ddpm", "--output-dir", run)
    assert files.load(run / "student.safetensors")[1]["prediction"] == "v" and (run / "stages/v/student.safetensors").exists()
    assert (run / "pipeline" / "model_index.json").exists()


def test_guidance_is_baked_into_the_student_and_tensorboard_is_written(tmp_path, stock_here):
    here(progressive.main, *SMALL, "--guidance 2 --start-steps 2 --log-with tensorboard --output-dir", tmp_path)
    row = rows(tmp_path)
    assert row["teacher ddim 2"]["nfe"] == 4 and row["student@1 ddim 1"]["nfe"] == 1
    assert list((tmp_path / "trackers").rglob("events.out.*"))
    assert files.load(tmp_path / "student.safetensors")[1]["record"]["guidance"] == 2
