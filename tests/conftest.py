"""Shared by all tests: few threads, the embedded models once, and recipes launched as a user launches them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
os.environ["HF_HUB_OFFLINE"] = "1"  # the tests never use the network
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def teacher():
    import teachers

    return teachers.load("digits")


def launch(recipe: str, *arguments: object, processes: int = 0, threads: int = 1, **kwargs) -> subprocess.CompletedProcess:
    """Runs recipes/<recipe>.py: with python, or with torchrun on several CPU processes. Output is captured as text."""
    head = [sys.executable]
    if processes:
        head += ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", str(free_port())]
    command = [*head, str(ROOT / "recipes" / f"{recipe}.py"), *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment, **kwargs)


def succeed(*arguments: object, **kwargs) -> subprocess.CompletedProcess:
    done = launch(*arguments, **kwargs)  # type: ignore[arg-type]
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def free_port() -> int:
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
