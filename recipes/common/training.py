"""What every recipe that trains shares: `Experiment`, which opens a run, trains its stages, measures the students and closes the run."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import torch

import teachers
from distill.divergence import Diverged
from distill.files import write_json
from distill.guidance import OverRange
from distill.replay import SavedStep
from distill.resume import Resumable, whole
from distill.samplers import BASELINES
from distill.sampling import Sampling
from distill.source import Coupled
from distill.speed import NotCompiled, checkpoint_activations, compiled
from distill.train import BatchSplit, Method, Optimization, train
from eval.features import Extractor
from eval.reference import Generated
from eval.sweep import Cell
from recipes.common.announcement import plan_of
from recipes.common.checks import captions_for, check_denoiser, check_optimizer, check_source, check_steps, decoded_by
from recipes.common.cli import duration, fail, one_line_errors
from recipes.common.delivery import export_pipelines
from recipes.common.flags import DistillationFlags
from recipes.common.forecast import Forecast
from recipes.common.guidance import measured
from recipes.common.interrupts import finishing_steps, stop_requested
from recipes.common.measurement import Measurement, Real, baselines, measured_against, student_cells, training_seconds
from recipes.common.outline import placed
from recipes.common.plan import check_disk, disk_bytes, draws
from recipes.common.run import Run, finished_file, processes, settings_of
from recipes.data.sets import Data
from teachers import Teacher
from teachers.conditions import Conditions
from teachers.saved import Stored, load_student
from teachers.teacher import require_network

REFERENCE_STEPS = 64  # of the teacher's images, which stand for real ones where there are prompts alone


@dataclass
class Experiment:
    """A distillation from its checks to its report.

        with Experiment.open(config, teacher, student, data, title=..., record=...) as e:
            e.add_baselines(64)
            e.plan(method, [budget], steps=[4])
            student = e.stage("4", e.student, method, budget, Sampling(steps=(4,)))

    The end of the block writes the last student, measures all cells, writes the report and exports the pipelines. An error in the
    block ends the run; what is finished is kept, and the same command continues it.
    """

    config: DistillationFlags
    teacher: Teacher | None
    student: Teacher  # the model that training starts from
    data: Data
    title: str
    record: dict  # provenance, in the file of every student
    run: Run
    extractor: Extractor
    real: Real
    disk: int  # bytes that the run needs, about
    cells: list[Cell] = field(default_factory=list)
    students: dict[int, Stored] = field(default_factory=dict)  # by step count
    seconds: float = 0.0  # of training so far
    replay: SavedStep | None = None  # of --replay
    forecast: Forecast | None = None  # of the plan
    seeds: dict[str, int] = field(default_factory=dict)  # of stages that are trained again
    verdict: str = ""
    captions: Conditions | None = None  # of --captions

    @classmethod
    def open(
        cls,
        config: DistillationFlags,
        teacher: Teacher | None,
        student: Teacher,
        data: Data,
        *,
        title: str,
        record: dict,
        trial: Method | None = None,
        stages: int = 1,
        averaged: bool = False,
    ) -> Experiment:
        """Check everything that can be checked, then claim the output directory.

        ``student``: the model that training starts from. ``trial``: a method to try on two samples. ``stages``: how many students are
        trained; ``averaged``: with an average of the weights. Raises ValueError, before anything is written, where parts do not fit, the
        probe finds that the teacher is not a denoiser, or the disk is too full.
        """
        require_network(student)
        check_optimizer(config.optimizer)
        teacher, student = None if teacher is None else decoded_by(teacher, config.decode), decoded_by(student, config.decode)
        BatchSplit(config.batch_size, processes(), microbatch=config.microbatch)
        if config.checkpoint_activations:
            checkpoint_activations(student.parametric.net)  # the copies that are trained keep it
        replay = None if config.replay is None else SavedStep.load(config.replay)
        if teacher is not None:
            check_steps(teacher, config.sweep_steps)
            check_source(teacher, student)
        extractor = Extractor.create(config.features).fits(student.image_shape)
        captions = captions_for(student, config.captions, config)
        own = None
        if teacher is not None and data.imageless:
            own = Generated(
                on_captions(teacher, captions),
                REFERENCE_STEPS,
                max(measured(config, student).values()),
                config.images,
                config.seed,
            )
        real = measured_against(config.reference, data, extractor, own)
        warning = None if teacher is None else check_denoiser(teacher, data, config.seed, config.force)
        if trial is not None:
            try_method(trial, student, data)
        cells = (stages + len(BASELINES) * len(config.sweep_steps)) * len(measured(config, student))
        disk = disk_bytes(student, data, extractor, stages=stages, cells=cells, images=config.images, averaged=averaged)
        check_disk(Path(config.output_dir), disk)
        run = Run.open(config)
        if warning:
            run.say(f"warning: {warning}")
        for model in (student, teacher):
            if model is not None:
                model.to(run.device)
        record |= {"config": settings_of(config)}
        record |= {} if teacher is None or teacher.hollow else {"teacher_sha256": teacher.fingerprint}
        e = cls(config, teacher, student, data, title, record, run, extractor, real, disk, replay=replay, captions=captions)
        if not config.dry_run:
            e.measurement  # noqa: B018 (the features of the data, before anything is trained)
        return e

    @cached_property
    def measurement(self) -> Measurement:
        c = self.config
        how: dict[str, Any] = {"images": c.images, "chunk": c.chunk, "seed": c.seed, "classes": self.data.caption_classes}
        return Measurement.of(self.extractor, self.real, self.run, **how)

    def add_baselines(self, steps: int, samplers: Iterable[str] = BASELINES) -> None:
        """Add the cells of the teacher: training-free ``samplers``, and DDIM at ``steps``, which ratios are taken against."""
        assert self.teacher is not None
        teacher = on_captions(self.teacher, self.captions)
        for ending, guidance in measured(self.config, self.student).items():
            self.cells += baselines(teacher, f"teacher{ending}", self.config.sweep_steps, samplers, guidance)
            self.cells += baselines(teacher, f"teacher{ending}", (steps,), ("ddim",), guidance)

    def plan(
        self, method: Method, budgets: list[Optimization], steps: Sequence[int], more: int = 0, sampling: Sampling | None = None
    ) -> None:
        """Say what will be done, and the time, memory and disk it should take, measured on a few training steps and calls.

        ``steps``: of the students' cells. ``more``: those of the stages' teachers that ``method``, of the first stage, does not have.
        ``sampling``: of the students, if it is one for all. With --dry-run the program ends here.
        """
        lines, self.forecast = plan_of(self, method, budgets, steps, more, sampling or Sampling(steps=tuple(steps)))
        for line in lines:
            self.run.say(line)
        if self.config.dry_run:
            raise SystemExit(0)

    def split(self, budget: Optimization) -> BatchSplit:
        """Return how batches are split over processes and microbatches."""
        accelerator = self.run.accelerator
        return BatchSplit(budget.batch_size, accelerator.num_processes, accelerator.process_index, budget.microbatch)

    def stage(
        self,
        name: str,
        model: Teacher,
        method: Method,
        budget: Optimization,
        sampling: Sampling | None = None,
        label: str | None = None,
    ) -> Teacher:
        """Train a copy of ``model`` by ``method`` and return it from its file. A finished stage is read from there at once.

        ``sampling``: how the student is sampled and measured; None for a stage that only prepares the next one. ``label``: its name in
        the report. A model that takes the guidance scale is trained over its range, whatever the method.
        """
        file = self.file(name)
        if model.guidance is not None:
            method = OverRange(method, model.guidance)
        if model.source is not None:
            method = Coupled(method, model.source)
        if self.replay is not None and self.replay.step.phase == name:
            self._replay(method, model)
        if not file.exists():
            self._refuse_replay()
            with finishing_steps():
                self._train(name, model, method, budget, replace(model, sampling=sampling or Sampling()))
        if self.forecast is not None:
            self.forecast.done += budget.trained_images
        with finished_file():
            student = load_student(file, model).to(self.run.device)
        if self.run.main:
            Resumable(file.parent).clear()  # here, because a run can be killed between the student's file and this
        self.seconds = training_seconds(file) or self.seconds
        if sampling is not None:
            label = label or f"student@{name}"
            stored = Stored(file, on_captions(self.student, self.captions), student.fingerprint, student.denoiser.schedule)
            self.students |= dict.fromkeys(sampling.steps, stored)
            for ending, guidance in measured(self.config, student).items():
                named = f"{label}{ending}"
                cells = student_cells(student, named, training_seconds=self.seconds, guidance=guidance)
                self.cells = [cell for cell in self.cells if cell.label != named]  # of an earlier try
                self.cells += [replace(cell, model=stored) for cell in cells]
        return student

    def file(self, name: str, kind: str = "student") -> Path:
        """Return the path of a stage's student, or of one that was set aside as ``kind``."""
        return self.run.folder / "stages" / name / f"{kind}.safetensors"

    def set_aside(self, name: str, kind: str) -> None:
        """Keep a stage's finished student as ``kind``, so that the stage is trained again."""
        if self.run.main and self.file(name).exists():
            self.file(name).replace(self.file(name, kind))
        self.run.accelerator.wait_for_everyone()

    def fid_ratio(self, cell: Cell, before: Cell) -> float:
        """Return the FID of a cell by that of another one; infinity where the images are not finite. Both stay measured."""
        first, second = self.measurement.rows(self.run, [before, cell])
        return second.get("fid", math.inf) / first.get("fid", math.nan)

    def _refuse_replay(self) -> None:
        if self.replay is not None:
            fail(f"--replay {self.replay.path}: a step of stage {self.replay.step.phase}, which this run has not reached")

    def _replay(self, method: Method, model: Teacher) -> NoReturn:
        """Take the step of --replay again, print what each sample loses, and end the program."""
        assert self.replay is not None
        with one_line_errors():
            losses, levels = self.replay.replay(method, model.student())
        self.run.say(f"{self.replay.finding}\n\nsample  noise level  loss")
        for sample, (loss, level) in enumerate(zip(losses.tolist(), levels.tolist(), strict=True)):
            self.run.say(f"{sample:6d}  {level:11.4g}  {loss:.6g}")
        raise SystemExit(0)

    def _train(self, name: str, model: Teacher, method: Method, budget: Optimization, made: Teacher) -> None:
        run, folder = self.run, self.run.folder / "stages" / name
        for used in filter(None, (self.teacher, self.student, model)):
            if used.codec is not None:
                used.codec.to(torch.device("cpu"))  # where it is until it decodes again
        seed = self.seeds.get(name, self.config.seed)
        batches = self.data.batches(self.split(budget), seed, name, run.device, model.condition)
        trained = model.student()
        states = train(
            method, trained, batches, run.accelerator, budget, seed=seed, phase=name,
            resumable=Resumable(folder, run.say), save_every_images=max(1, budget.images // 8),
            rollbacks=self.config.rollbacks, stop=stop_requested,
        )  # fmt: skip
        left = None if self.forecast is None else self.forecast.left
        with divergence_errors(), compiled(trained, method) if self.config.compile else nullcontext():
            for state in run.watch(states, name, budget.trained_images, f"stage {name}", left=left):
                trained = state.ema
        weights = {k: whole(v) for k, v in run.accelerator.unwrap_model(trained.net).state_dict().items()}
        if run.main:
            write_json(folder / "cost.json", {"training_seconds": self.seconds + run.seconds(name, budget.trained_images)})
            del states, state, trained  # the saved copy takes the place of the trained network
            run.accelerator.free_memory()
            net = model.student().net
            net.load_state_dict(weights)
            record = self.record | {"trained_images": budget.trained_images}
            made = replace(made, denoiser=replace(model.parametric, net=net), record=record)
            teachers.save(folder / "student.safetensors", made)
        run.accelerator.free_memory()
        run.accelerator.wait_for_everyone()

    def __enter__(self) -> Experiment:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is not None:
            return
        self._refuse_replay()
        last = next(reversed(self.students.values()))
        if self.run.main:
            teachers.save(self.run.folder / "student.safetensors", last.load())
        facts = {"teacher": self.record["of"] or "none", "method": self.record["method"], "training": duration(self.seconds)}
        report = self.measurement.report(self.run, self.title, self.cells, facts)
        export_pipelines(self.run, last.load().to(self.run.device))
        self.verdict = report["verdict"]
        if self.forecast is not None and self.forecast.whole:
            self.run.say(self.forecast.outcome())
        self.run.say(f"\n{self.verdict}\nreport: {self.run.folder / 'report.html'}")
        self.run.close()


def on_captions(model: Teacher, captions: Conditions | None) -> Teacher:
    """Return the model with the conditions of --captions, where there are any."""
    return model if captions is None else model.with_conditions(captions)


@contextmanager
def divergence_errors() -> Iterator[None]:
    """Turn `Diverged` and `NotCompiled` into one line and exit code 2."""
    try:
        yield
    except (Diverged, NotCompiled) as error:
        fail(str(error))


def try_method(method: Method, model: Teacher, data: Data) -> None:
    """Evaluate the method once on two samples. Raises ValueError for what the network does not support, such as exact tangents."""
    batches = data.batches(BatchSplit(2), 0, "trial", torch.device("cpu"), model.condition)
    x0, cond = placed(model, *next(iter(batches(0))))
    method(model.student(), x0, rng=draws(x0), progress=0.5, **cond)
