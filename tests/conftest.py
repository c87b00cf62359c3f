"""Shared by all tests: few threads, the embedded models once, and recipes run in this process or as a user launches them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent
os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}  # the tests never use the network


@pytest.fixture(autouse=True)
def _alike():
    torch.manual_seed(0)
    torch.set_num_threads(1)  # recipes change it


@pytest.fixture(scope="session")
def teacher():
    import teachers

    return teachers.load("digits")


@pytest.fixture(scope="session")
def two_times(teacher):
    """The teacher as a two-time network whose output depends on the end of the jump."""
    from teachers.students import with_two_times

    model = with_two_times(teacher)
    torch.nn.init.normal_(model.denoiser.net.unet.time_proj.length_linear.weight, std=0.02)
    return model


@pytest.fixture(scope="session")
def new(tmp_path_factory):
    """The file of a tiny network without training. Distilling it needs --force."""
    import teachers
    from teachers.students import untrained

    path = tmp_path_factory.mktemp("new") / "new.safetensors"
    teachers.save(path, untrained((1, 8, 8), 10, (8, 16), 1, 0))
    return path


@pytest.fixture(scope="session")
def ladder(new, tmp_path_factory):
    """The directory of a run with students of 2 steps and of 1. They are that network, changed a little instead of trained."""
    import teachers
    from distill.sampling import Sampling

    folder, student = tmp_path_factory.mktemp("ladder"), teachers.load(str(new))
    record = {"method": "progressive", "of": "digits", "data": "digits"}
    for steps, path in ((2, "stages/2"), (1, "stages/1"), (1, "")):
        student.denoiser.net.unet.conv_out.bias.data += 0.05 * bool(path)  # the last one is the stage of 1 step
        teachers.save(folder / path / "student.safetensors", replace(student, sampling=Sampling(steps=(steps,)), record=record))
    return folder


@pytest.fixture
def stock_here(monkeypatch):
    """Run the stock pipelines of exports in this process. Importing diffusers in one of their own takes seconds; `small` does it."""
    from teachers.export import deliver

    elsewhere = deliver.subprocess.run

    def run(command: list[str], **kwargs: Any) -> Any:
        if command[0] != sys.executable:
            return elsewhere(command, **kwargs)
        monkeypatch.setattr(sys, "argv", command[2:])
        return exec(deliver.STOCK.partition("assert ")[0], {})

    monkeypatch.setattr(deliver.subprocess, "run", run)


def words(*arguments: object) -> list[str]:
    """The words of texts, and paths as they are: a command line."""
    return [word for a in arguments for word in (a.split() if isinstance(a, str) else [str(a)])]


def here(main: Callable, *arguments: object) -> None:
    """The recipe in this process, on one thread: seconds less than a launch, where nothing is claimed about launching."""
    main([*words(*arguments), "--threads", "1"])


@pytest.fixture
def refused(capsys):
    """Return a function that runs a recipe, which must end with exit code 2 and one line on standard error, and returns it."""

    def run(main: Callable, *arguments: object) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main(words(*arguments))
        line = capsys.readouterr().err
        assert stop.value.code == 2 and line.count("\n") == 1, line
        return line

    return run


def refuses(message: str, call: Callable, *arguments: Any, **options: Any) -> str:
    """The call must raise ValueError in one line with this text, in which " ... " stands for anything."""
    with pytest.raises(ValueError) as error:
        call(*arguments, **options)
    line = str(error.value)
    assert all(part in line for part in message.split(" ... ")) and "\n" not in line, line
    return line


def succeed(*command: object) -> str:
    """Run a Python command, which must succeed, and return its standard output."""
    done = subprocess.run([sys.executable, *words(*command)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def rows(folder: Path) -> dict[str, dict]:
    return {row["name"]: row for row in json.loads((folder / "report.json").read_text())["rows"]}


@dataclass(frozen=True)
class Function:
    """A denoiser that is any function of x_t and t."""

    schedule: Any
    of: Callable

    def __call__(self, x_t, t, to=None, **cond):
        return self.of(x_t, t)
