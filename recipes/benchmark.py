"""What measuring costs beside the bare network and the bare extractor, as ratios taken in turn in one run.

    python recipes/benchmark.py --output-dir runs/benchmark

extraction: images a second of the sweep's extraction over those of the bare extractor on the same batches.
generation: seconds of a sampler's steps over those of as many bare network calls.
loading: training batches of a memory-mapped .npz of 32x32 colour images, a second of CPU time.
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

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image

import teachers
from distill import checkpoint
from distill.train import Shares
from eval.features import Extractor
from eval.generate import cores, generate, start, synchronise, to_uint8
from eval.reference import extract
from recipes import data as datasets
from recipes.common import fail, flag, one_line_errors, parse

PRESETS: dict[str, dict] = {"default": {}, "smoke": {"repeats": 2, "batch_size": 64, "images": 512, "processes": 1}}


@dataclass(frozen=True)
class Config:
    preset: str = flag("default", "default, or smoke (less than a minute, figures of no worth)", choices=PRESETS)
    model: str = flag("digits", "the network: " + teachers.ACCEPTED)
    features: str = flag("digits", "the extractor")
    steps: int = flag(8, "steps of the sampler that is timed")
    batch_size: int = flag(256, "images at once")
    images: int = flag(10_240, "images of the sweep on one and on two processes")
    repeats: int = flag(15, "turns; the median counts")
    processes: int = flag(2, "processes of the last figure, each on a core of its own; 1 leaves it out")
    output_dir: str = flag("runs/benchmark", "where benchmark.json goes; an existing file is not overwritten")


def ratio(
    one: Callable[[], object], two: Callable[[], object], repeats: int, device: torch.device
) -> tuple[float, float, float]:
    """Median seconds of both, taken in turn after a warm-up, and the median of the ratios one / two of each turn."""
    seconds: list[tuple[float, float]] = []
    for turn in range(repeats + 1):
        pair = []
        for work in (one, two):
            began = synchronise(device)
            work()
            pair.append(synchronise(device) - began)
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
    begin = start(range(config.batch_size), model.shape, model.classes, 0)
    times = model.times(config.steps)
    noise = begin.noise.to(device)
    cond = model.condition(None if begin.labels is None else begin.labels.to(device))
    net_time = times[0].float().to(device)

    def bare() -> None:
        with torch.inference_mode():
            for _ in range(config.steps):
                model.denoiser(noise, net_time, **cond)

    def sampled() -> None:
        to_uint8(generate(model.denoiser, "ddim", times, begin, model.condition, device))

    a, b, r = ratio(sampled, bare, config.repeats, device)
    return {"seconds": a, "bare_seconds": b, "ratio": r, "wanted": "<= 1.03"}


def loading(config: Config) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        shape = (config.images, 32, 32, 3)
        np.savez(f"{folder}/set.npz", images=np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))
        batches = datasets.load(f"{folder}/set.npz").batches(Shares(128), 0, "benchmark", torch.device("cpu"))(0)
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

        a, b, r = ratio(alone, lambda: datasets.load(f"{folder},size=32"), 3, torch.device("cpu"))
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
    """Wall seconds of one cell in ``processes`` processes of one thread, each pinned to a core of its own."""
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
        config = parse(Config, __doc__.splitlines()[0], PRESETS, argv)
        output = Path(config.output_dir) / "benchmark.json"
        if output.exists():
            fail(f"{output} exists: name another --output-dir")
        if not 1 <= config.processes <= cores():
            raise ValueError(f"--processes {config.processes}: accepted are 1 to the {cores()} cores of this machine")
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if device.type == "cpu":
            torch.set_num_threads(cores())
    out = {"extraction": extraction(config, device), "generation": generation(config, device)}
    out |= {"loading": loading(config), "decoding": decoding(config), "starting": starting(config)}
    if device.type == "cpu" and config.processes > 1:
        out["processes"] = processes(config)
    for name, figures in out.items():
        print(name.ljust(12), "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in figures.items()))
    checkpoint.write_json(output, out)


if __name__ == "__main__":
    main()
