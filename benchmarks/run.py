"""Measure what this project costs above bare network passes, and beside its peers, as ratios taken in turn in one run.

    python -m benchmarks --output-dir runs/benchmarks                      everything, one thread, CPU time
    python -m benchmarks --what training --networks digits --compile       compiled steps by uncompiled passes
    python -m benchmarks --clock wall --threads 0                          on a quiet machine

Writes benchmarks.json and benchmarks.png. Every ratio is the median over its turns, with the ratio of the same work to itself.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from threadpoolctl import threadpool_limits

from benchmarks import evaluation, loading, peer_samplers, peer_training, processes, sampling, training
from benchmarks.networks import NETWORKS
from benchmarks.plot import plot
from benchmarks.turns import Row, clock_of
from distill import files
from eval.machine import cores, default_device
from recipes.common.accepted import THREADS, Checked
from recipes.common.cli import fail, flag, machine_flag, model_flag, one_line_errors, parse
from recipes.common.run import versions

WHAT = ("training", "sampling", "evaluation", "peers", "loading", "starting", "memory", "scaling")
SMOKE = {"what": ("training", "evaluation"), "networks": ("digits",), "methods": ("ect",), "turns": 1, "dimension": 64}
PRESETS: dict[str, dict] = {"default": {}, "smoke": SMOKE}


@dataclass(frozen=True)
class Config(Checked):
    preset: str = flag("default", "smoke is a trial of some seconds", choices=PRESETS)
    what: tuple[str, ...] = flag(WHAT, "what is measured", choices=WHAT)
    networks: tuple[str, ...] = model_flag(tuple(NETWORKS), "networks, with a batch for each", choices=NETWORKS)
    methods: tuple[str, ...] = flag(tuple(training.PASSES), "methods whose steps are measured", choices=training.PASSES)
    compile: bool = flag(False, "compile the networks of a training step; the bare passes stay as they are")
    turns: int = flag(11, "turns of each ratio", at_least=1, at_most=1000)
    images: int = flag(10_240, "images of loading and scaling", at_least=256, at_most=100_000)
    dimension: int = flag(evaluation.FEATURES, "features of the FID arithmetic", short=False, at_least=2, at_most=8192)
    clock: str = machine_flag(
        "cpu", "cpu: seconds of this process, for shared machines; wall, always on a GPU", choices=("cpu", "wall")
    )
    threads: int = machine_flag(1, "CPU threads; 0 takes all cores", **THREADS)
    output_dir: str = machine_flag("runs/benchmarks", "directory of the results, which are not overwritten", path="folder")


def rows(config: Config, device: torch.device) -> Iterator[Row]:
    """Yield all that is measured, in order."""
    clock = clock_of(config.clock if device.type == "cpu" else "wall", device)
    for name in config.networks:
        if "training" in config.what:
            yield from training.rows(name, NETWORKS[name](), config.methods, config.turns, clock, device, config.compile)
        if "sampling" in config.what:
            yield from sampling.rows(name, NETWORKS[name](), config.turns, clock, device)
        if "peers" in config.what:
            yield from peer_training.rows(name, NETWORKS[name](), config.turns, clock, device)
            yield from peer_samplers.rows(name, NETWORKS[name](), config.turns, clock, device)
        if "memory" in config.what:
            yield processes.memory(name, config.methods[0])
    if "evaluation" in config.what:
        yield from evaluation.rows("digits", NETWORKS["digits"](), config.turns, clock, device, config.dimension)
    if "loading" in config.what:
        yield from loading.rows(config.images)
    if "starting" in config.what:
        yield from processes.starting(min(5, config.turns), config.clock, config.threads or cores())
    if "scaling" in config.what and device.type == "cpu" and cores() > 1:
        yield from processes.scaling(config.images)


def about(config: Config, device: torch.device) -> dict[str, Any]:
    """Return what the figures depend on."""
    found = versions()
    for name in ("k-diffusion", "torchmetrics"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_model()
    clock = config.clock if device.type == "cpu" else "wall"
    return {"device": name, "cores": cores(), "threads": torch.get_num_threads(), "clock": clock, "versions": found}


def cpu_model() -> str:
    """Return the name of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def main(argv: list[str] | None = None) -> None:
    with one_line_errors():
        config = parse(Config, __doc__, PRESETS, argv)
        output = Path(config.output_dir) / "benchmarks.json"
        if output.exists():
            fail(f"{output} exists: name another --output-dir")
        device = default_device()
        torch.set_num_threads(config.threads or cores())
    result: dict[str, Any] = {"about": about(config, device), "rows": []}
    result["about"]["command"] = " ".join(["python -m benchmarks", *(sys.argv[1:] if argv is None else argv)])
    with threadpool_limits(config.threads or cores()):
        for row in rows(config, device):
            print(f"{row.name}: {row}", flush=True)
            result["rows"].append(asdict(row))
            files.write_json(output, result)  # a run that is stopped leaves what it has measured
    plot(result["rows"], output.with_suffix(".png"))
