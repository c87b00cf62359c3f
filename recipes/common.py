"""What recipes share: configuration from the command line, the output directory, logging, bars, and one-line errors."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import os
import platform
import sys
import time
import types
import typing
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
from accelerate import Accelerator, PartialState
from tqdm import tqdm

from distill import checkpoint
from distill.denoiser import Denoiser
from distill.rng import Rng
from distill.train import Method, State
from eval.generate import cores, synchronise

C = TypeVar("C")
NOT_OF_THE_RUN = (
    "output_dir",
    "log_with",
    "resume",
    "threads",
)  # may differ between a run and its continuation; so may Config.MAY_CHANGE


def flag(default: Any, help: str, **metadata: Any) -> Any:
    """A field of a recipe's configuration: its default, its help text, and perhaps ``choices``."""
    return dataclasses.field(default=default, metadata={"help": help, **metadata})


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        flags = " ".join(a.option_strings[0] for a in self._actions if a.option_strings[0] != "-h")
        accepted = f"; accepted are {flags}" if "unrecognized" in message else ""
        fail(message + accepted)


def parse(config: type[C], description: str, presets: dict[str, dict] | None = None, argv: list[str] | None = None) -> C:
    """A configuration from flags: field = flag = key of config.json. A preset changes defaults, flags override it."""
    parser = _Parser(description=description, allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    types_of = typing.get_type_hints(config)
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        kind = types_of[field.name]
        options: dict[str, Any] = {"help": field.metadata["help"], "default": field.default}
        if field.default is dataclasses.MISSING:
            options |= {"required": True}
            del options["default"]
        if isinstance(kind, types.UnionType):
            kind = next(k for k in typing.get_args(kind) if k is not type(None))
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(kind) is tuple:
            options |= {"type": typing.get_args(kind)[0], "nargs": "+"}
        else:
            options["type"] = kind
        if "choices" in field.metadata:
            options["choices"] = list(field.metadata["choices"])
        parser.add_argument("--" + field.name.replace("_", "-"), **options)
    chosen = parser.parse_args(argv)
    if presets:
        parser.set_defaults(**presets[chosen.preset])
        chosen = parser.parse_args(argv)
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in vars(chosen).items()}
    return config(**values)


def fail(message: str) -> NoReturn:
    """Ends the program: one line on standard error, by the main process, and exit code 2."""
    if os.environ.get("RANK", "0") == "0":
        print(f"error: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(2)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Around what a user can get wrong (loading, checking, claiming): ValueError and OSError become one line and exit code 2."""
    try:
        yield
    except (ValueError, OSError) as error:
        fail(str(error))


@contextmanager
def disk_errors() -> Iterator[None]:
    """Around long work whose parts are kept: where the disk is full or the folder gone, one line instead of a traceback."""
    try:
        yield
    except OSError as error:
        fail(f"{error}; what was finished is kept, start again to continue")


@dataclass
class Run:
    """A run's directory and its accelerator: metrics.jsonl, trackers, bars."""

    accelerator: Accelerator
    folder: Path

    @classmethod
    def open(cls, config: Any, mixed_precision: str = "no") -> Run:
        """Claims ``config.output_dir`` for this configuration. ValueError where it holds anything else."""
        folder = Path(config.output_dir)
        log_with = getattr(config, "log_with", None)
        _share_cores(config.threads)
        accelerator = Accelerator(
            cpu=not torch.cuda.is_available(),
            mixed_precision=mixed_precision,
            log_with=log_with,
            project_dir=str(folder / "trackers"),
        )
        if accelerator.is_main_process:
            _claim(folder, config)
        accelerator.wait_for_everyone()
        if log_with:
            flat = {k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in dataclasses.asdict(config).items()}
            accelerator.init_trackers("fewstep", config=flat)
        return cls(accelerator, folder)

    @property
    def main(self) -> bool:
        return self.accelerator.is_main_process

    def say(self, text: str = "") -> None:
        if self.main:
            tqdm.write(text)

    def log(self, phase: str, values: dict[str, float], step: int) -> None:
        """One line of metrics.jsonl and one entry of the trackers."""
        if self.main:
            with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps({"phase": phase, "step": step, **values}) + "\n")
            self.accelerator.log({f"{phase}/{k}": v for k, v in values.items()}, step=step)

    def seconds(self, phase: str, images: int) -> float:
        """Wall seconds that ``images`` of a finished phase took, without the time it may have lain interrupted."""
        lines = map(json.loads, (self.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
        rates = sorted(line["images_per_second"] for line in lines if line["phase"] == phase and line["images_per_second"] > 0)
        return images / rates[len(rates) // 2] if rates else 0.0

    def _forget_from(self, phase: str, step: int) -> None:
        """Drops what a killed run had logged of a phase past the point it continues from, and a torn last line."""
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
        checkpoint.write_text(path, "".join(line + "\n" for line in kept))

    def watch(self, states: Iterable[State], phase: str, images: int, title: str, lines: int = 50) -> Iterator[State]:
        """Passes training states on, with a bar, about ``lines`` lines of metrics, and the loss averaged between them."""
        bar = tqdm(total=images, desc=title, unit="img", unit_scale=True, disable=None if self.main else True, smoothing=0.05)
        losses: list[torch.Tensor] = []
        began, first, last = time.perf_counter(), None, float("nan")
        for state in states:
            if first is None:
                first = state
                self._forget_from(phase, state.step)
                bar.update(state.images - state.images // state.step)
            bar.update(state.images // state.step)
            losses.append(state.loss)
            every = max(1, images * state.step // (state.images * lines))
            if state.step % every == 0 or state.images >= images:
                loss = self.accelerator.reduce(torch.stack(losses).mean(), "mean").item()
                rate = (state.images - first.images) / max(1e-9, time.perf_counter() - began)
                values = {"images": state.images, "loss": loss, "grad_norm": float(state.grad_norm), "lr": state.lr}
                self.log(phase, values | {"images_per_second": rate}, state.step)
                bar.set_postfix(loss=f"{loss:.3g}", refresh=False)
                losses = []
                last = loss
            yield state
        bar.close()
        if first is not None:
            self.say(f"{title}: {images:,} images, loss {last:.3g}, {duration(time.perf_counter() - began)}")

    def close(self) -> None:
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()


def _claim(folder: Path, config: Any) -> None:
    mine = json.loads(json.dumps(dataclasses.asdict(config)))
    path = folder / "config.json"
    if path.exists():
        theirs = json.loads(path.read_text())
        free = (*NOT_OF_THE_RUN, *getattr(config, "MAY_CHANGE", ()))
        different = [k for k in mine.keys() | theirs.keys() if k not in free and mine.get(k) != theirs.get(k)]
        if different:
            shown = ", ".join(f"{k} is {theirs.get(k)!r} there and {mine.get(k)!r} here" for k in sorted(different)[:3])
            raise ValueError(f"{folder} holds another run ({shown}): choose another --output-dir")
        if not getattr(config, "resume", True):
            raise ValueError(f"{folder} holds this very run already: --resume continues it, or choose another --output-dir")
        checkpoint.clear_aside(folder)
    elif folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty and holds no run of this recipe: choose another --output-dir")
    checkpoint.write_json(path, mine)


def _share_cores(threads: int) -> None:
    """On CPUs every process takes its part of the cores; launchers' own defaults leave most of them idle."""
    if not torch.cuda.is_available():
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(threads or max(1, cores() // local))


def processes() -> int:
    """How many processes share this run; known before anything is written."""
    return PartialState(cpu=not torch.cuda.is_available()).num_processes


def versions() -> dict[str, str]:
    names = ("fewstep", "torch", "accelerate", "diffusers", "safetensors", "torch-fidelity", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def device_name(accelerator: Accelerator) -> str:
    if accelerator.device.type == "cuda":
        return torch.cuda.get_device_name(accelerator.device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads a process"


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def rehearse(method: Method, student: Denoiser, x0: torch.Tensor, cond: dict[str, torch.Tensor]) -> tuple[float, float]:
    """Seconds an image of a training step of ``method``, and of one network call, measured on a throw-away copy of the student."""
    student = dataclasses.replace(student, net=copy.deepcopy(student.net).to(x0.device).train())
    rng = Rng(torch.Generator(x0.device).manual_seed(0), len(x0))

    def training() -> None:
        method(student, x0, rng=rng, progress=0.0, **cond).mean().backward()

    def calling() -> None:
        with torch.inference_mode():
            student(x0, torch.tensor(student.schedule.t_max, device=x0.device), **cond)

    seconds = []
    for work in (training, calling):
        work()
        times = []
        for _ in range(3):
            began = synchronise(x0.device)
            work()
            times.append(synchronise(x0.device) - began)
        seconds.append(sorted(times)[1] / len(x0))
    return seconds[0], seconds[1]
