"""Measure the overhead over the bare network and the bare extractor, as ratios measured in alternation in one run.

    python recipes/benchmark.py --output-dir runs/benchmark

extraction: images per second of the sweep's extraction, over those of the bare extractor on the same batches.
generation: seconds of a sampler's steps, over those of equally many bare network calls.
loading: training images per second of CPU time from a memory-mapped .npz of 32x32 colour images.
decoding: seconds of Pillow on one core for a folder of 256x256 JPEGs over those of --data FOLDER,size=32.
starting: seconds from the start of a process until the digits teacher can be sampled.
processes: seconds of a sweep in one process on one core over those of two processes on two cores (CPUs only).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import ClassVar

from recipes.common import flags
from recipes.common.accepted import BATCH, STEPS, Checked
from recipes.common.cli import fail, flag, flags_first, machine_flag, model_flag, one_line_errors, parse

PRESETS: dict[str, dict] = {"default": {}, "smoke": {"repeats": 2, "batch_size": 64, "images": 512, "processes": 1}}


@dataclass(frozen=True)
class Config(Checked):
    preset: str = flag("default", "smoke is a trial run of about a minute", choices=PRESETS)
    model: str = model_flag("digits", "the network (accepted: --help teacher)")
    features: str = model_flag("digits", "the feature extractor")
    steps: int = flag(8, "steps of the sampler that is timed", **STEPS)
    batch_size: int = flag(256, "images at once", **BATCH)
    images: int = flag(10_240, "images of the sweep on one and on two processes", at_least=40, at_most=100_000)
    repeats: int = flag(15, "repetitions; the median is reported", at_least=1, at_most=1000)
    processes: int = flag(2, "processes of the last figure, each on its own core; 1 leaves it out", at_least=1, at_most=1024)
    output_dir: str = machine_flag(
        "runs/benchmark", "directory of benchmark.json; an existing file is not overwritten", path="folder"
    )

    TOPICS: ClassVar = {"teacher": flags.TOPICS["teacher"]}


flags_first(__name__, Config, __doc__, PRESETS)

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image

import teachers
from distill import files
from distill.images import to_uint8
from distill.sampling import Sampling
from distill.train import BatchSplit
from eval.features import Extractor
from eval.generate import generate, initial_noise
from eval.machine import clock, cores, default_device
from eval.reference import extract
from recipes.common.checks import check_steps
from recipes.data import sets


def ratio(
    one: Callable[[], object], two: Callable[[], object], repeats: int, device: torch.device
) -> tuple[float, float, float]:
    """Return the median seconds of both, measured in alternation after a warm-up, and the median of the ratios one / two."""
    seconds: list[tuple[float, float]] = []
    for turn in range(repeats + 1):
        pair = []
        for work in (one, two):
            began = clock(device)
            work()
            pair.append(clock(device) - began)
        if turn:
            seconds.append((pair[0], pair[1]))
    a, b = zip(*seconds, strict=True)
    return median(a), median(b), median(x / y for x, y in seconds)


def extraction(config: Config, device: torch.device) -> dict:
    model, extractor = teachers.load(config.model), Extractor.create(config.features).to(device)
    images = torch.randint(0, 256, (16 * config.batch_size, *model.image_shape), dtype=torch.uint8)
    accelerator = Accelerator(cpu=device.type == "cpu")

    def bare() -> None:
        with torch.inference_mode():
            for part in images.split(config.batch_size):
                extractor.module(part.to(device).expand(-1, 3, -1, -1))

    a, b, r = ratio(bare, lambda: extract(images, extractor, config.batch_size, accelerator), config.repeats, device)
    return {"bare_images_per_second": len(images) / a, "images_per_second": len(images) / b, "ratio": r, "wanted": ">= 0.95"}


def generation(config: Config, device: torch.device) -> dict:
    model = teachers.load(config.model).to(device)
    begin = initial_noise(range(config.batch_size), model.shape, model.classes, 0)
    times = model.times(config.steps)
    noise, t = begin.noise.to(device), times[0].float().to(device)
    cond = model.condition(None if begin.labels is None else begin.labels.to(device))

    def bare() -> None:
        with torch.inference_mode():
            for _ in range(config.steps):
                model.denoiser(noise, t, **cond)

    def sampled() -> None:
        to_uint8(generate(model.denoiser, Sampling(), times, begin, model.condition, device))

    a, b, r = ratio(sampled, bare, config.repeats, device)
    return {"seconds": a, "bare_seconds": b, "ratio": r, "wanted": "<= 1.03"}


def loading(config: Config) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        shape = (config.images, 32, 32, 3)
        np.savez(f"{folder}/set.npz", images=np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))
        batches = sets.load(f"{folder}/set.npz").batches(
            BatchSplit(128), 0, "benchmark", torch.device("cpu"), lambda labels: {}
        )(0)
        stream = iter(batches)
        next(stream)
        count, began = max(8, config.images // 128), time.process_time()
        for _ in range(count):
            next(stream)
        return {"images_per_cpu_second": 128 * count / (time.process_time() - began), "wanted": ">= 5000"}


def decoding(config: Config) -> dict:
    count = min(config.images, 6_000)
    with tempfile.TemporaryDirectory() as folder:
        wave = np.add.outer(np.arange(256), np.arange(256))[..., None] * np.array([1, 2, 3])
        for i in range(count):
            Image.fromarray((127.5 + 127.5 * np.sin(wave / 40 + i)).astype(np.uint8)).save(f"{folder}/{i:06d}.jpg")

        def alone() -> None:
            for path in sorted(Path(folder).iterdir()):
                np.asarray(Image.open(path).convert("RGB").resize((32, 32), Image.Resampling.LANCZOS))

        a, b, r = ratio(alone, lambda: sets.load(f"{folder},size=32"), 3, torch.device("cpu"))
    return {"one_core": count / a, "images_per_second": count / b, "ratio": r, "wanted": f"about {cores()}, the cores"}


def starting(config: Config) -> dict:
    code, seconds = "import teachers; teachers.load('digits'); print('ready', flush=True); input()", []
    for _ in range(min(5, config.repeats)):
        began = time.perf_counter()
        with subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=Path(__file__).parents[1]
        ) as process:
            assert process.stdout is not None and process.stdout.readline() == b"ready\n"
            seconds.append(time.perf_counter() - began)
            process.kill()
    return {"seconds": median(seconds), "wanted": "<= 5"}


def sweep_seconds(config: Config, processes: int) -> float:
    """Return the wall seconds of one cell in ``processes`` processes of one thread, each on its own core."""
    with tempfile.TemporaryDirectory() as folder:
        script = str(Path(__file__).parent / "evaluate.py")
        arguments = ["--model", config.model, "--steps", str(config.steps), "--samplers", "ddim", "--baseline-steps", "0"]
        arguments += ["--images", str(config.images), "--chunk", str(config.batch_size), "--threads", "1", "--metrics", "fid"]
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), script]
        allowed = sorted(os.sched_getaffinity(0))[:processes]
        subprocess.run(
            ["taskset", "-c", ",".join(map(str, allowed)), *command, *arguments, "--output-dir", folder],
            check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        return json.loads((Path(folder) / "report.json").read_text())["rows"][0]["wall_seconds"]


def processes(config: Config) -> dict:
    pairs = [(sweep_seconds(config, 1), sweep_seconds(config, config.processes)) for _ in range(3)]
    one, many = (median(times) for times in zip(*pairs, strict=True))
    return {"one": one, "many": many, "ratio": median(a / b for a, b in pairs), "wanted": f">= {0.9 * config.processes:.1f}"}


def main(argv: list[str] | None = None) -> None:
    with one_line_errors():
        config = parse(Config, __doc__, PRESETS, argv)
        output = Path(config.output_dir) / "benchmark.json"
        if output.exists():
            fail(f"{output} exists: name another --output-dir")
        if not 1 <= config.processes <= cores():
            raise ValueError(f"--processes {config.processes}: accepted are 1 to the {cores()} cores of this machine")
        model = teachers.load(config.model)
        check_steps(model, (config.steps,))
        Extractor.create(config.features).fits(model.image_shape)
        device = default_device()
        if device.type == "cpu":
            torch.set_num_threads(cores())
    out = {"extraction": extraction(config, device), "generation": generation(config, device)}
    out |= {"loading": loading(config), "decoding": decoding(config), "starting": starting(config)}
    if device.type == "cpu" and config.processes > 1:
        out["processes"] = processes(config)
    for name, figures in out.items():
        print(name.ljust(12), "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in figures.items()))
    files.write_json(output, out)


if __name__ == "__main__":
    main()
