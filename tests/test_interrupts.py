"""What ends a run before its time: signals, lost processes, lost launchers, and another run in the same folder."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from accelerate import Accelerator
from conftest import ROOT
from processes import free_port
from test_train import batches, run, student, weights

from distill import files
from distill.regression import Regression
from distill.resume import Resumable, Stopped
from distill.train import BatchSplit, Optimization, train
from recipes import evaluate, teacher
from recipes.common.run import Run

AGAIN = "run the same command again to go on"
TINY = ["--preset", "smoke", "--threads", "1", "--batch-size", "8", "--training-images", "256"]  # saves every second step


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An undisturbed run of one process."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    teacher.main([*TINY, "--output-dir", str(folder)])
    return folder


def lines_of(folder):
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_stop_saves_the_step_and_the_run_continues_to_the_same_bits(tmp_path):
    o = Optimization(images=10 * 64, batch_size=64, lr=0.01, ema_halflife_images=200)
    whole, _ = run(o)
    resumable, states = Resumable(tmp_path), []
    with pytest.raises(Stopped):
        for state in train(
            Regression(), student(), batches(BatchSplit(64)), Accelerator(cpu=True), o, seed=0, phase="p", resumable=resumable,
            stop=lambda: len(states) == 3,
        ):  # fmt: skip
            states.append(state)
    again, states = run(o, resumable=resumable)
    assert torch.equal(weights(whole), weights(again)) and states[0].step == 4


def test_a_checkpoint_is_written_after_its_step_has_been_logged(tmp_path):
    """Otherwise a run that is killed between the two would never log that step."""
    seen = {}
    o = Optimization(images=6 * 64, batch_size=64)
    states = train(
        Regression(), student(), batches(BatchSplit(64)), Accelerator(cpu=True), o, seed=0, phase="p", resumable=Resumable(tmp_path),
        save_every_images=2 * 64,
    )  # fmt: skip
    for state in states:
        seen[state.step] = sorted(int(path.stem.removeprefix("resume-")) for path in tmp_path.glob("resume-*"))
    assert seen == {1: [], 2: [], 3: [2], 4: [2], 5: [2, 4], 6: [2, 4]}


@pytest.mark.slow
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_during_training_saves_the_step_and_says_how_to_go_on(whole, tmp_path, monkeypatch, capsys, number, code):
    log, folder = Run.log, tmp_path / "stopped"

    def log_and_signal(self, phase, values, step):
        log(self, phase, values, step)
        if step == 5:
            signal.raise_signal(number)

    monkeypatch.setattr(Run, "log", log_and_signal)
    with pytest.raises(SystemExit) as stop:
        teacher.main([*TINY, "--output-dir", str(folder)])
    monkeypatch.undo()
    errors = [line for line in capsys.readouterr().err.splitlines() if "stopped" in line]
    assert stop.value.code == code and errors == [f"stopped at teacher, 40 images: {AGAIN}"]
    assert sorted(path.name for path in (folder / "resume").iterdir()) == [
        "resume-000000004.safetensors",
        "resume-000000005.safetensors",
    ]
    teacher.main([*TINY, "--output-dir", str(folder)])
    assert (folder / "teacher.safetensors").read_bytes() == (whole / "teacher.safetensors").read_bytes()
    assert [line["step"] for line in lines_of(folder)] == list(range(1, 33))


@pytest.mark.slow
def test_a_signal_during_the_sweep_keeps_the_finished_cells(tmp_path, monkeypatch, capsys):
    few = [
        "--images",
        "60",
        "--chunk",
        "60",
        "--steps",
        "1",
        "2",
        "--samplers",
        "ddim",
        "--baseline-steps",
        "0",
        "--threads",
        "1",
    ]
    write = files.write_json

    def write_and_signal(path, data):
        write(path, data)
        if path.parent.name == "cells":
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(files, "write_json", write_and_signal)
    with pytest.raises(SystemExit) as stop:
        evaluate.main([*few, "--output-dir", str(tmp_path / "e")])
    monkeypatch.undo()
    assert stop.value.code == 143 and f"stopped: {AGAIN}" in capsys.readouterr().err.splitlines()
    (kept,) = (tmp_path / "e" / "cells").glob("teacher*.json")
    when = kept.stat().st_mtime_ns
    evaluate.main([*few, "--output-dir", str(tmp_path / "e")])
    assert kept.stat().st_mtime_ns == when and len(list((tmp_path / "e" / "cells").glob("teacher*.json"))) == 2


HOLD = """
import fcntl, sys, time
file = open(sys.argv[1], "a")
print("open", flush=True)
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(60)
"""


def test_a_second_run_in_a_folder_is_refused_until_the_first_is_dead(tmp_path):
    folder, config = tmp_path / "r", teacher.Config(output_dir=str(tmp_path / "r"), threads=1)
    folder.mkdir()
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(folder / ".lock")], stdout=subprocess.PIPE)
    assert other.stdout.readline() + other.stdout.readline() == b"open\nheld\n"
    with pytest.raises(ValueError, match=r"another process is writing to .*: wait for its end, or choose another --output-dir"):
        Run.open(config)
    assert [path.name for path in folder.iterdir()] == [".lock"]
    other.kill()
    other.wait()
    opened = Run.open(config)
    late = subprocess.Popen([sys.executable, "-c", HOLD, str(folder / ".lock")], stdout=subprocess.PIPE)
    assert late.stdout.readline() == b"open\n"
    Run.open(config)  # the process that holds the lock may open its run again, such as after an error in a notebook
    assert (folder / ".lock").exists()
    opened.close()
    assert late.stdout.readline() == b"held\n"
    late.kill()
    late.wait()
    assert [path.name for path in folder.iterdir()] == ["config.json"]


def test_what_a_run_killed_before_its_config_left_is_no_other_run(tmp_path):
    for name in (".lock", ".config.json.77.part"):
        (tmp_path / name).touch()
    Run.open(teacher.Config(output_dir=str(tmp_path), threads=1)).close()
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").touch()
    with pytest.raises(ValueError, match="is not empty and holds no run of this recipe"):
        Run.open(teacher.Config(output_dir=str(tmp_path / "other"), threads=1))
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["notes.txt"]


STUCK = """
import ctypes, threading
from recipes.common import interrupts
interrupts.GRACE = 0.5
with interrupts.interruptible():
    threading.Timer(0.5, lambda: print("ready", flush=True)).start()
    c, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
    c.pthread_mutex_lock(mutex), c.pthread_mutex_lock(mutex)
"""
ORPHAN = """
import subprocess, sys
subprocess.run([sys.executable, "-c", '''
import time
from recipes.common.interrupts import interruptible
with interruptible():
    print("ready", flush=True)
    time.sleep(60)
'''])
"""


def started(script, **environment):
    """A script that has printed "ready"."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.slow
def test_a_process_that_waits_in_a_collective_call_for_ever_leaves_soon_after_a_signal():
    """A locked mutex is like it: the main thread never returns to Python."""
    process = started(STUCK, WORLD_SIZE="2", RANK="1")
    process.terminate()
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 143 and f"process 1 stopped 0 s after a signal, without saving its step: {AGAIN}" in errors


@pytest.mark.slow
def test_a_worker_whose_launcher_is_killed_stops_too():
    launcher = started(ORPHAN, TORCHELASTIC_RUN_ID="none")
    launcher.kill()
    _, errors = launcher.communicate(timeout=20)  # until the worker has closed the pipe too
    assert errors.strip() == f"stopped: {AGAIN}"


def torchrun(folder):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port())]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, str(ROOT / "recipes" / "teacher.py"), *TINY, "--output-dir", str(folder)],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip


def until_step(process, folder, step):
    deadline = time.monotonic() + 200
    while max((line["step"] for line in lines_of(folder)), default=0) < step:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


def children(process):
    out = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True).stdout
    return [int(pid) for pid in out.split()]


@pytest.mark.slow
def test_two_processes_are_killed_and_stopped_and_one_process_ends_their_run(whole, tmp_path):
    folder = tmp_path / "two"
    process = torchrun(folder)
    until_step(process, folder, 3)
    os.kill(children(process)[0], signal.SIGKILL)
    began = time.monotonic()
    _, errors = process.communicate(timeout=60)
    assert time.monotonic() - began < 30 and process.returncode
    assert f"stopped, because another process of this run has ended: {AGAIN}" in errors or f"stopped: {AGAIN}" in errors

    process = torchrun(folder)
    until_step(process, folder, 8)
    process.terminate()
    _, errors = process.communicate(timeout=60)
    (line,) = [line for line in errors.splitlines() if line.startswith("stopped")]
    assert line.startswith("stopped at teacher, ") and line.endswith(AGAIN)
    step = int(line.split()[3]) // 8
    assert (folder / "resume" / f"resume-{step:09d}.safetensors").exists()

    teacher.main([*TINY, "--output-dir", str(folder)])
    assert_close(folder, whole)


@pytest.mark.slow
def test_a_run_of_one_process_is_continued_by_two(whole, tmp_path, monkeypatch):
    log = Run.log
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(
            Run, "log", lambda self, phase, values, step: (log(self, phase, values, step), step < 9 or signal.raise_signal(15))
        )
        teacher.main([*TINY, "--output-dir", str(tmp_path / "two")])
    process = torchrun(tmp_path / "two")
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    assert_close(tmp_path / "two", whole)


def assert_close(folder, other):
    """The weights agree to rounding, and both wrote each line of metrics once."""
    ours, theirs = (files.load(path / "teacher.safetensors")[0] for path in (folder, other))
    assert all(torch.allclose(ours[name], theirs[name], rtol=0, atol=1e-5) for name in theirs)
    assert [line["step"] for line in lines_of(folder)] == [line["step"] for line in lines_of(other)]


@pytest.mark.slow
def test_killed_runs_end_with_the_same_bits():
    command = [sys.executable, str(ROOT / "tests" / "kill_and_resume.py"), "--times", "2", "--recipes", "latents", "teacher"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0 and done.stdout.endswith("2 of 2\n"), done.stdout + done.stderr
