"""Kill runs at random moments of every phase, continue them, and compare them with undisturbed runs to the bit.

    python tests/kill_and_resume.py --times 25 --seed 0

Prints one line per disturbed run, and exits with 1 if any of them ends in other weights, cells, report or metrics lines. A moment is a
random file operation of a phase, and a delay of up to 50 ms after it. With two processes one of them or both are killed. Processes are
forked from a server that has imported everything, and exported pipelines are not sampled again: a disturbed run takes seconds.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path

from processes import free_port

from recipes import latents

TRAINING = ["--preset", "smoke", "--threads", "1", "--batch-size", "8"]
MEASURED = ["--images", "60", "--chunk", "60"]
RECIPES = {
    "progressive": [*TRAINING, *MEASURED, "--sweep-steps", "1", "--start-steps", "4", "--images-per-stage", "64"],
    "consistency": [
        *TRAINING,
        *MEASURED,
        "--sweep-steps",
        "1",
        "--method",
        "ect",
        "--steps",
        "1",
        "2",
        "--training-images",
        "128",
    ],
    "teacher": [*TRAINING, "--training-images", "128"],
    "evaluate": [*MEASURED, "--threads", "1", "--steps", "1", "2", "--samplers", "ddim", "heun", "--baseline-steps", "0"],
    "latents": ["--threads", "1", "--shard-images", "10", "--model", "{made}/ldm", "--data", "{made}/images.npz"],
}
PHASES = {  # the start of a file's path within the run, by the phase that writes it
    "start": ("config.json", ".lock", "reference", ".config", ".reference"),
    "training": ("metrics",),
    "checkpoint": ("resume", ".resume"),
    "stage end": ("student", ".student", "cost", ".cost", "teacher", ".teacher", "latents-", ".latents-", "index", ".index"),
    "sweep": ("cells",),
    "report": ("report", ".report", "fid_", ".fid_", "samples", ".samples", "labels", ".labels"),
    "export": ("pipeline", ".pipeline"),
}
MACHINE = {
    "seconds_per_image",
    "wall_seconds",
    "peak_memory_gb",
    "break_even_images",
    "training_seconds",
    "decode_seconds_per_image",
    "seconds_interval",
    "seconds_rounds",
    "timing",
    "break_even_interval",
    "sha256",  # of a cell's row, which holds them
}
LEAVE_WITHIN = 30.0  # seconds in which the others leave after a process is killed


@dataclass(frozen=True)
class Moment:
    """The ``number``-th file operation of ``phase``, and ``delay`` seconds; ``victims`` are the ranks that are killed."""

    phase: str
    number: int
    delay: float
    victims: tuple[int, ...]


def phase_of(path: str, folder: Path) -> str | None:
    """Return the phase that a path within a run belongs to; None for any other path."""
    for top in (folder, latents.unfinished(folder)):
        if path == str(top) or path.startswith(f"{top}/"):
            parts = [part for part in path[len(str(top)) :].split("/") if part not in ("", "stages", "resume")]
            names = [*parts[:1], *parts[-1:]]
            return next((phase for phase, begins in PHASES.items() for name in names if name.startswith(begins)), "start")
    return None


def work(recipe: str, argv: list[str], rank: int, world: int, port: int, others: list[int], moment: Moment | None) -> None:
    """Run a recipe as process ``rank``. The main process counts its file operations, and kills the victims at the moment."""
    folder, counts = Path(argv[-1]), dict.fromkeys(PHASES, 0)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if world == 1:
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            del os.environ[name]

    def kill() -> None:
        for victim in sorted(moment.victims, reverse=True):  # type: ignore[union-attr]
            with suppress(ProcessLookupError):
                os.kill(os.getpid() if victim == 0 else others[victim - 1], signal.SIGKILL)

    def count(event: str, arguments: tuple) -> None:
        if event.startswith(("open", "os.", "shutil.")) and arguments and isinstance(arguments[0], (str, os.PathLike)):
            if (phase := phase_of(os.fspath(arguments[0]), folder)) is None:
                return
            counts[phase] += 1
            if moment is not None and (phase, counts[phase]) == (moment.phase, moment.number):
                threading.Timer(moment.delay, kill).start() if moment.delay else kill()

    if rank == 0:
        sys.addaudithook(count)
    importlib.import_module("teachers.export.deliver").verify = lambda *arguments: 0.0  # type: ignore[attr-defined]
    with open(f"{folder}.log", "a") as log, redirect_stdout(log), redirect_stderr(log):
        try:
            importlib.import_module(f"recipes.{recipe}").main(argv)
        finally:
            log.flush()
    if rank == 0 and moment is None:
        Path(f"{folder}.counts").write_text(json.dumps(counts))


class Runner:
    """Start recipes in forked processes."""

    def __init__(self, folder: Path):
        tests = Path(__file__).parent
        paths = [str(tests.parent), str(tests), os.environ.get("PYTHONPATH", "")]
        os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "PYTHONPATH": os.pathsep.join(paths)}
        self.folder, self.fork = folder, multiprocessing.get_context("forkserver")
        slow = ["pipelines", "matplotlib.pyplot", "sklearn.datasets", "torch_fidelity"]  # to import
        self.fork.set_forkserver_preload(["kill_and_resume", *slow, *(f"recipes.{name}" for name in RECIPES)])

    def run(self, recipe: str, out: Path, world: int, moment: Moment | None = None) -> bool:
        """Run a recipe into ``out`` until its end or the moment. Return whether it was killed. Raises RuntimeError if it fails."""
        out.parent.mkdir(exist_ok=True)
        argv, port, others = [part.format(made=self.folder) for part in RECIPES[recipe]], free_port(), []
        processes = []
        for rank in [*range(1, world), 0]:
            process = self.fork.Process(
                target=work, args=(recipe, [*argv, "--output-dir", str(out)], rank, world, port, others, moment)
            )
            process.start()
            processes.append(process)
            others = [p.pid for p in processes]
        first, began = None, time.monotonic()
        while any(process.is_alive() for process in processes):
            if first is None and any(process.exitcode == -signal.SIGKILL for process in processes):
                first = time.monotonic()
            if (first is not None and time.monotonic() - first > LEAVE_WITHIN) or time.monotonic() - began > 500:
                for process in processes:
                    process.kill()
                raise RuntimeError(f"a process did not leave within {LEAVE_WITHIN:.0f} s")
            time.sleep(0.01)
        codes = [process.exitcode for process in processes]
        killed, log = -signal.SIGKILL in codes, Path(f"{out}.log").read_text()
        if "Traceback" in log or (not killed and any(codes)):
            raise RuntimeError(f"exit codes {codes}\n{log[-3000:]}")
        return killed


def contents(folder: Path) -> dict[str, object]:
    """Return what has to be equal in two runs: the bytes of files, and of others all but the figures of the machine."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.suffix == ".jsonl":
            found[name] = [(line["phase"], line["step"]) for line in map(json.loads, path.read_text().splitlines())]
        elif name == "config.json":
            found[name] = json.loads(path.read_text()) | {"output_dir": None}
        elif name == "report.json":
            report = json.loads(path.read_text())
            found[name] = [without_machine(row) for row in report["rows"]], report["protocol"]
        elif path.name == "timings.json":
            found[name] = json.loads(path.read_text()).keys()
        elif path.parent.name == "cells" and path.suffix == ".json":
            found[name] = without_machine(json.loads(path.read_text()))
        elif (path.suffix in (".safetensors", ".json") and path.name != "cost.json") or path.name in (
            "samples.png",
            "labels.png",
        ):
            found[name] = path.read_bytes()
        else:
            found[name] = path.is_dir()
    return found


def without_machine(row: dict) -> dict:
    return {key: value for key, value in row.items() if key not in MACHINE}


def moments(counts: dict[str, int], world: int, draw: random.Random) -> list[Moment]:
    """Draw one to three moments in different phases, in the order of the phases."""
    phases = [phase for phase, count in counts.items() if count]
    chosen = sorted(draw.sample(phases, min(len(phases), draw.randint(1, 3))), key=phases.index)
    victims = [(0,)] if world == 1 else [(0,), (1,), (0, 1)]
    return [
        Moment(phase, draw.randint(1, counts[phase]), draw.choice([0.0, draw.uniform(0, 0.05)]), draw.choice(victims))
        for phase in chosen
    ]


def disturbed(runner: Runner, number: int, recipe: str, world: int, draw: random.Random) -> tuple[str, str]:
    """Disturb and finish one run. Return where it was killed, and what differs from the undisturbed run: nothing if it is right."""
    whole = runner.folder / f"whole-{world}" / recipe
    if not whole.exists():
        runner.run(recipe, whole, world)
    out, where = runner.folder / f"disturbed-{number}" / recipe, []
    try:
        for moment in [*moments(json.loads(Path(f"{whole}.counts").read_text()), world, draw), None]:
            if recipe == "latents" and out.exists():
                break  # it is finished, and started again it would say so and refuse
            if runner.run(recipe, out, world, moment):
                assert moment is not None
                of = "" if world == 1 else f" (process {' and '.join(map(str, moment.victims))})"
                where.append(f"{moment.phase} {moment.number}{of}")
    except RuntimeError as error:
        return ", ".join(where), str(error)
    ours, theirs = contents(out), contents(whole)
    different = [name for name in sorted(ours.keys() | theirs.keys()) if ours.get(name) != theirs.get(name)]
    different += [path.name for path in out.parent.glob(".*")]  # nothing is left beside it
    if not different:
        shutil.rmtree(out.parent)
    return ", ".join(where), ", ".join(different)


def make_images(folder: Path) -> None:
    """Write the latent model and the images of the recipe latents."""
    import numpy as np
    from pipelines import ldm, vae

    ldm(folder, vae()).save_pretrained(folder / "ldm")
    np.savez(folder / "images.npz", images=np.random.default_rng(0).integers(0, 255, (64, 16, 16, 3), dtype=np.uint8))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=RECIPES)
    chosen = parser.parse_args(argv)
    draw, right = random.Random(chosen.seed), 0
    cases = [(name, 1 + (i + turn) % 2) for turn in range(2) for i, name in enumerate(chosen.recipes)]
    with tempfile.TemporaryDirectory() as folder:
        make_images(Path(folder))
        runner = Runner(Path(folder))
        for number in range(chosen.times):
            recipe, world = cases[number % len(cases)]
            began = time.monotonic()
            where, wrong = disturbed(runner, number, recipe, world, draw)
            right += not wrong
            seconds = f"{time.monotonic() - began:4.0f} s"
            print(
                f"{number + 1:3}  {recipe:12} {world} process{'es' if world > 1 else '  '} {seconds}  killed at: {where or '-'}",
                flush=True,
            )
            print(f"     DIFFERENT: {wrong}\n" if wrong else "", end="", flush=True)
    print(f"{right} of {chosen.times}")
    return 0 if right == chosen.times else 1


if __name__ == "__main__":
    raise SystemExit(main())
