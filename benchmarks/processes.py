"""Start-up, memory and scaling, each in processes of its own.

starting: seconds of `--help`, and from the start of a process to its first training step.
memory: growth of resident memory by a step, by what parameters, gradients, Adam, average, teacher and activations take.
scaling: seconds of a sweep in one process on one core by those of two processes on two cores (CPUs only).
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

from benchmarks.turns import Figure

ROOT = Path(__file__).parents[1]
FIRST_STEP = """
import os, sys
from recipes.common.run import Run
def first(self, states, *rest, **more):
    next(iter(states))
    os._exit(0)
Run.watch = first
from recipes import progressive
progressive.main(["--output-dir", sys.argv[1], "--threads", sys.argv[2]])
"""


def run(*command: str, threads: int = 1) -> tuple[float, float, str]:
    """Return wall seconds, CPU seconds and output of a Python command, which must succeed."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
    used, began = _children(), time.perf_counter()
    done = subprocess.run([sys.executable, *command], check=True, capture_output=True, text=True, env=environment, cwd=ROOT)
    return time.perf_counter() - began, _children() - used, done.stdout


def _children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def starting(repeats: int, clock: str, threads: int) -> Iterator[Figure]:
    """Yield the median seconds of `--help` and to the first training step of the digits ladder."""
    with tempfile.TemporaryDirectory() as folder:
        commands = {
            "progressive --help": (["recipes/progressive.py", "--help"], "<= 1"),
            "start to first training step": (["-c", FIRST_STEP, f"{folder}/run", str(threads)], "<= 6"),
        }
        for name, (command, wanted) in commands.items():
            taken = []
            for repeat in range(repeats):
                wall, cpu, _ = run(*(word.replace("/run", f"/run{repeat}") for word in command), threads=threads)
                taken.append(cpu if clock == "cpu" else wall)
            yield Figure(name, median(taken), "CPU s" if clock == "cpu" else "s", wanted)


def memory(network: str, method: str) -> Figure:
    """Return the growth of memory by three training steps, by what the step must hold."""
    found = json.loads(run("-m", "benchmarks.memory", network, method)[2].splitlines()[-1])
    name = f"{network} {method}: {found['peak'] / 1e6:.0f} MB by {found['needed'] / 1e6:.0f} MB of weights and activations"
    return Figure(name, found["peak"] / found["needed"], "of them")


def scaling(images: int, count: int = 2) -> Iterator[Figure]:
    """Yield how many times as fast a sweep and a training are in ``count`` processes, each on its own core."""
    for name, seconds in (("sweep", _sweep), ("training", _training)):
        pairs = [(seconds(images, 1), seconds(images, count)) for _ in range(3)]
        speed = median(one / many for one, many in pairs)
        yield Figure(f"{name} in {count} processes by one", speed, "times as fast", f">= {0.95 * count:.1f}")


def _sweep(images: int, count: int) -> float:
    words = f"recipes/evaluate.py --samplers ddim --steps 8 --baseline-steps 0 --images {images} --metrics fid"
    with tempfile.TemporaryDirectory() as folder:
        _pinned(count, *words.split(), "--output-dir", f"{folder}/run")
        return json.loads((Path(folder) / "run/report.json").read_text())["rows"][0]["wall_seconds"]


def _training(images: int, count: int) -> float:
    """Return the seconds per image of one stage of the digits ladder, without its first steps and its sweep."""
    words = f"recipes/progressive.py --start-steps 2 --images-per-stage {images // 2} --images 40 --sweep-steps 1"
    with tempfile.TemporaryDirectory() as folder:
        _pinned(count, *words.split(), "--output-dir", f"{folder}/run")
        lines = [json.loads(line) for line in (Path(folder) / "run/metrics.jsonl").read_text().splitlines()]
        return 1 / lines[-1]["images_per_second"]


def _pinned(count: int, *words: str) -> None:
    """Run a recipe in ``count`` processes of one thread, on as many cores."""
    launcher = f"-m torch.distributed.run --standalone --nproc_per_node {count}".split()
    cpus = ",".join(map(str, sorted(os.sched_getaffinity(0))[:count]))
    subprocess.run(
        ["taskset", "-c", cpus, sys.executable, *launcher, *words, "--threads", "1"], check=True, capture_output=True, cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
