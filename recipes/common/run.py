"""A run: its output directory, its accelerator, metrics.jsonl, trackers, and progress for people."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import numpy
import torch
from accelerate import Accelerator, PartialState
from accelerate.commands.config.config_args import default_config_file
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, broadcast_object_list
from PIL import Image
from tqdm import tqdm

from distill import files, reading, zero
from distill.resume import Stopped
from distill.speed import check_compiler
from distill.train import State
from eval.machine import cores, processor
from eval.progress import progress
from recipes.common.cli import duration
from recipes.common.locks import LOCK, lock, unlock

T = TypeVar("T")
# may differ between a run and its continuation; so may the fields named in Config.MAY_CHANGE
NOT_OF_THE_RUN = ("output_dir", "log_with", "resume", "threads")


@contextmanager
def finished_file() -> Iterator[None]:
    """Say of a finished file that cannot be read that the same command makes it again. It is never made again without a word."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{error}: delete it, so that it is made again") from None


def settings_of(config: Any) -> dict[str, Any]:
    """Return the configuration as JSON data, without what may differ between a run and its continuation."""
    free = (*NOT_OF_THE_RUN, *getattr(config, "MAY_CHANGE", ()))
    return {k: v for k, v in json.loads(json.dumps(dataclasses.asdict(config))).items() if k not in free}


@dataclass
class Run:
    """Hold the directory and the accelerator of a run."""

    accelerator: Accelerator
    folder: Path

    @classmethod
    def open(cls, config: Any, join: bool = False) -> Run:
        """Claim ``config.output_dir`` for this configuration. Raises ValueError where it holds anything else, and for fp16 on a CPU.

        ``join``: another process holds this very run, which is left to it.
        """
        folder, log_with = Path(config.output_dir), getattr(config, "log_with", None)
        if getattr(config, "mixed_precision", "no") == "fp16" and not torch.cuda.is_available():
            raise ValueError("--mixed-precision fp16 needs a GPU: accepted on a CPU are no and bf16")
        if getattr(config, "compile", False):
            check_compiler(torch.cuda.is_available())
        zero.check_launch(torch.cuda.is_available())
        log_with = None if getattr(config, "dry_run", False) else log_with
        _share_cores(config.threads)
        accelerator = Accelerator(
            cpu=not torch.cuda.is_available(),
            mixed_precision=getattr(config, "mixed_precision", "no"),
            log_with=log_with,
            project_dir=str(folder / "trackers"),
            kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],  # one copy of the gradients, not two
        )
        sharding = accelerator.distributed_type
        if getattr(config, "compile", False) and sharding in (DistributedType.FSDP, DistributedType.DEEPSPEED):
            raise ValueError(f"--compile does not reach through the hooks of {sharding.value}: use DDP, or leave --compile out")
        if zero.is_zero(accelerator):
            zero.check_settings(accelerator)
        agreed(lambda: _join(folder, config) if join else _claim(folder, config))
        if log_with:
            flat = {k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in dataclasses.asdict(config).items()}
            accelerator.init_trackers("fewstep", config=flat)
        run = cls(accelerator, folder)
        if "ACCELERATE_MIXED_PRECISION" in os.environ and not os.path.isfile(default_config_file):
            run.say("accelerate launch used its defaults; `accelerate config default` saves them and ends its warning")
        return run

    @property
    def main(self) -> bool:
        return self.accelerator.is_main_process

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    def from_main(self, compute: Callable[[], T]) -> T:
        """Return the result of ``compute``, which only the main process calls, on every process."""
        return broadcast_object_list([compute() if self.main else None])[0]

    def say(self, text: str = "") -> None:
        """Print a line, from the main process."""
        if self.main:
            tqdm.write(text)

    def log(self, phase: str, values: dict[str, float], step: int) -> None:
        """Write one line of metrics.jsonl and one entry of the trackers."""
        if self.main:
            with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps({"phase": phase, "step": step, **values}) + "\n")
            self.accelerator.log({f"{phase}/{k}": v for k, v in values.items()}, step=step)

    def show(self, pictures: Iterable[Path]) -> None:
        """Send PNG files to the trackers that take images."""
        for tracker in self.accelerator.trackers if self.main else ():
            if hasattr(tracker, "log_images"):
                form = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                for path in pictures:
                    tracker.log_images({path.stem: numpy.array(Image.open(path).convert("RGB"))[None]}, step=None, **form)

    def seconds(self, phase: str, images: int) -> float:
        """Return the wall seconds of ``images`` of a finished phase, without the time in which it was interrupted."""
        lines = map(json.loads, (self.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
        rates = sorted(line["images_per_second"] for line in lines if line["phase"] == phase and line["images_per_second"] > 0)
        return images / rates[len(rates) // 2] if rates else 0.0

    def _forget_from(self, phase: str, step: int) -> None:
        """Drop what a killed run logged of a phase after the step from which it continues, and a torn last line."""
        path = self.folder / "metrics.jsonl"
        if not self.main or not path.exists():
            return
        kept = []
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue
            if entry["phase"] != phase or entry["step"] < step:
                kept.append(line)
        files.write_text(path, "".join(line + "\n" for line in kept))

    def watch(
        self,
        states: Iterable[State],
        phase: str,
        images: int,
        title: str,
        lines: int = 50,
        left: Callable[[int, float], float] | None = None,
    ) -> Iterator[State]:
        """Pass training states on. Show progress, and log about ``lines`` lines of metrics with the mean loss between them.

        ``left``: (images, images per second) -> seconds to the end of the run, which are shown.
        """
        losses: list[torch.Tensor] = []
        began, first, last = time.perf_counter(), None, float("nan")
        options: dict[str, Any] = {"unit": "img", "unit_scale": True, "smoothing": 0.05}
        with progress(total=images, desc=title, show=self.main, **options) as bar:
            try:
                for state in states:
                    if state.rollback:
                        self.say(f"{title}: {state.rollback}")
                        bar.reset()
                        began, first, losses = time.perf_counter(), None, []
                    if first is None:
                        first = state
                        self._forget_from(phase, state.step)
                        bar.update(state.images - state.images // state.step)
                    bar.update(state.images // state.step)
                    losses.append(state.loss)
                    every = max(1, images * state.step // (state.images * lines))
                    if state.step % every == 0 or state.images >= images:
                        last = self.accelerator.reduce(torch.stack(losses).mean(), "mean").item()
                        rate = (state.images - first.images) / max(1e-9, time.perf_counter() - began)
                        values = {"images": state.images, "loss": last, "grad_norm": float(state.grad_norm), "lr": state.lr}
                        self.log(phase, values | {"images_per_second": rate}, state.step)
                        ends = {} if left is None else {"run": f"{duration(left(state.images, max(rate, 1e-9)))} left"}
                        bar.set_postfix(loss=f"{last:.3g}", **ends, refresh=False)
                        losses = []
                    yield state
            except Stopped:
                raise Stopped(f"{title}, {state.images:,} images") from None
        if first is not None:
            self.say(f"{title}: {images:,} images, loss {last:.3g}, {duration(time.perf_counter() - began)}")

    def close(self) -> None:
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
        unlock(self.folder)


def agreed(check: Callable[[], None]) -> None:
    """Call ``check`` in the main process. Raises its ValueError, or its OSError as ValueError, in all processes."""
    problem = None
    if PartialState().is_main_process:
        try:
            check()
        except (ValueError, OSError) as error:
            problem = str(error)
    (problem,) = broadcast_object_list([problem])
    if problem is not None:
        raise ValueError(problem)


def _claim(folder: Path, config: Any) -> None:
    """Write config.json, or compare it with the one that is there. Raises ValueError where the folder cannot be used."""
    _compare(folder, config)  # before anything is written
    if getattr(config, "dry_run", False):
        return
    lock(folder)
    _compare(folder, config)  # another run may have claimed it in the meantime
    files.clear_aside(folder)
    if getattr(config, "replay", None) is None:
        files.write_json(folder / "config.json", dataclasses.asdict(config))


def _join(folder: Path, config: Any) -> None:
    """Raise ValueError where the folder is not that of this very run."""
    if not (folder / "config.json").exists():
        raise ValueError(f"{folder} holds no run to join: start the same command without --join first")
    _compare(folder, config)


def _compare(folder: Path, config: Any) -> None:
    """Raise ValueError where the folder is another run's."""
    mine, path = json.loads(json.dumps(dataclasses.asdict(config))), folder / "config.json"
    if path.exists():
        theirs = _read_settings(path, config)
        different = [k for k in settings_of(config) if mine[k] != theirs[k]] + [
            k for k in theirs.keys() - mine.keys() if theirs[k]
        ]
        if different:
            shown = ", ".join(f"{k} is {theirs[k]!r} there and {mine.get(k)!r} here" for k in sorted(different)[:3])
            raise ValueError(f"{folder} holds another run ({shown}): choose another --output-dir")
        if not getattr(config, "resume", True):
            raise ValueError(f"{folder} holds this very run already: --resume continues it, or choose another --output-dir")
    elif folder.exists() and any(not _left_by_a_start(path) for path in folder.iterdir()):
        raise ValueError(f"{folder} is not empty and holds no run of this recipe: choose another --output-dir")


def _left_by_a_start(path: Path) -> bool:
    """Return whether a run that was killed before it wrote config.json left this file."""
    return path.name == LOCK or (path.name.startswith(".config.json.") and path.suffix == ".part")


def _read_settings(path: Path, config: Any) -> dict[str, Any]:
    """Return a config.json, perhaps of an older version: with fields under their new names, and defaults for those it lacks."""
    theirs = reading.read_json(path)
    for field in dataclasses.fields(config):
        if (old := field.metadata.get("was")) in theirs:
            theirs[field.name] = theirs.pop(old)
        if field.name not in theirs:
            theirs[field.name] = json.loads(json.dumps(None if field.default is dataclasses.MISSING else field.default))
    return theirs


def _share_cores(threads: int) -> None:
    """Give every process its part of the CPU cores. The launchers' own defaults leave most of them idle."""
    if not torch.cuda.is_available():
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(threads or max(1, cores() // local))


def processes() -> int:
    """Return the number of processes of this run. Available before anything is written."""
    zero.check_launch(torch.cuda.is_available())
    return PartialState(cpu=not torch.cuda.is_available()).num_processes


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that numbers depend on. One that is not installed, such as a clone, has none."""
    names = ("fewstep", "torch", "accelerate", "diffusers", "safetensors", "torch-fidelity", "numpy")
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def device_name(accelerator: Accelerator) -> str:
    """Return the name of the GPU, or that of the processor with the threads per process."""
    if accelerator.device.type == "cuda":
        return torch.cuda.get_device_name(accelerator.device)
    return f"{processor()}, {torch.get_num_threads()} threads per process"
