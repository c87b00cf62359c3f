"""Progressive distillation (Salimans & Ho 2022): a ladder of students, each doing two steps of the last in one.

    accelerate launch recipes/progressive.py                       digits, 64 -> 32 -> ... -> 1, then the sweep and the export
    accelerate launch recipes/progressive.py --preset full         the same with more images, at most an hour on two cores
    torchrun --nproc_per_node 2 recipes/progressive.py             two processes (the way to have several on CPUs)

Writes runs/progressive-<data>: stages/<steps>/student.safetensors, student.safetensors, report.html, pipeline/ and more.
What the presets reach stands in EXPERIMENTS.md.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import teachers
from distill.checkpoint import Resumable
from distill.denoise import Denoise
from distill.distance import DISTANCES, WEIGHTS
from distill.grid import uniform
from distill.progressive import Progressive
from distill.train import Method, Optimization, Shares, train
from eval.features import Extractor
from recipes import data as datasets
from recipes.common import Run, duration, flag, one_line_errors, parse, peak_memory_gb, processes, rehearse
from recipes.measure import OPPONENTS, Measurement, check_match, cost_in_calls, opponents, own_cells
from teachers import Teacher, export

PRESETS: dict[str, dict] = {
    "default": {},
    "full": {"images_per_stage": 240_000, "images": 10_000},
    "smoke": {"start_steps": 8, "images_per_stage": 1024, "images": 200, "sweep_steps": (1, 2)},
}


@dataclass(frozen=True)
class Config:
    preset: str = flag("default", "default, full, or smoke (everything in less than a minute)", choices=PRESETS)
    teacher: str = flag("digits", "what is distilled: " + teachers.ACCEPTED.replace("%", "%%"))
    data: str = flag("digits", "what it is distilled on: " + datasets.ACCEPTED)
    output_dir: str = flag("runs/progressive-digits", "a new directory, or one that holds the same run, which is continued")
    start_steps: int = flag(64, "steps of the teacher's DDIM sampler")
    end_steps: int = flag(1, "steps of the last student, start-steps divided by a power of two")
    images_per_stage: int = flag(32_000, "training images of a stage; the last two stages take twice as many")
    batch_size: int = flag(128, "images a step, over all processes")
    microbatch: int | None = flag(None, "most images at once in a process; more accumulate")
    lr: float = flag(1e-3, "learning rate at the start of a stage; it falls linearly to 0")
    warmup_images: int = flag(4_000, "images over which the learning rate rises first")
    weight: str = flag("truncated_snr", "weight of the x0 error", choices=WEIGHTS)
    distance: str = flag("l2", "distance of student and target", choices=DISTANCES)
    guidance: float = flag(1.0, "classifier-free guidance baked into the student; 1 is none")
    mixed_precision: str = flag("no", "autocast of the networks in training", choices=("no", "bf16", "fp16"))
    images: int = flag(2_000, "generated images a cell of the sweep")
    sweep_steps: tuple[int, ...] = flag((1, 2, 4, 8), "steps at which the teacher's samplers are measured beside it")
    features: str = flag("digits", "feature extractor of FID")
    chunk: int = flag(256, "images generated at once in the sweep")
    seed: int = flag(0, "seed of training and sweep")
    log_with: str | None = flag(None, "an Accelerate tracker", choices=("tensorboard", "wandb"))
    threads: int = flag(0, "CPU threads a process; 0 shares the cores out evenly")
    resume: bool = flag(True, "continue a run of the same configuration in the output directory")


def ladder(start: int, end: int) -> list[int]:
    """The students' step counts. ValueError where ``end`` is not ``start`` divided by a power of two."""
    steps = [start]
    while steps[-1] > max(1, end) and steps[-1] % 2 == 0:
        steps.append(steps[-1] // 2)
    if start < 2 or steps[-1] != end or len(steps) < 2:
        accepted = [start >> k for k in range(1, start.bit_length()) if start % (1 << k) == 0]
        raise ValueError(
            f"--end-steps {end} is not --start-steps {start} halved some times: accepted are {accepted or 'none: start is odd'}"
        )
    return steps[1:]


def main(argv: list[str] | None = None) -> None:
    with one_line_errors():
        config = parse(Config, __doc__.splitlines()[0], PRESETS, argv)
        steps = ladder(config.start_steps, config.end_steps)
        teacher, data = teachers.load(config.teacher), datasets.load(config.data)
        check_match(teacher, data)
        teacher.parametric  # an oracle has no network  # noqa: B018
        target = teacher.guided(config.guidance)
        Shares(config.batch_size, processes(), microbatch=config.microbatch)
        extractor = Extractor.create(config.features)
        run = Run.open(config, config.mixed_precision)
    device = run.accelerator.device
    measurement = Measurement.of(extractor, data, config.images, config.chunk, config.seed, device)
    cells = opponents(teacher.to(device), "teacher", config.sweep_steps, OPPONENTS, config.guidance)
    cells += opponents(teacher, "teacher", (config.start_steps,), ("ddim",), config.guidance)
    plan(config, run, steps, teacher, data, cost_in_calls(cells) + sum(steps))
    began = time.perf_counter()

    model = teacher
    if model.parametric.prediction in ("eps", "score"):
        model = stage(config, run, "v", as_v(model), Denoise(target), data, {})
        target = model.denoiser
    for n in steps:
        method = Progressive(target, uniform(target.schedule, 2 * n), config.weight, config.distance)
        model = stage(config, run, str(n), model, method, data, {"name": "ddim", "grid": "uniform", "steps": [n]})
        target = model.denoiser
        cells += own_cells(model, f"student@{n}")
    if run.main:
        teachers.save(run.folder / "student.safetensors", model)

    facts = {"teacher": config.teacher, "training": f"{duration(time.perf_counter() - began)} in this process"}
    report = measurement.report(run, f"Progressive distillation of {config.teacher}", cells, facts)
    if run.main:
        deliver(run, model)
    run.say(f"\n{report['verdict']}\nreport: {run.folder / 'report.html'}")
    run.close()


def images_of(config: Config, name: str) -> int:
    """Training images of a stage: the last two, to 2 steps and to 1, take twice as many."""
    return config.images_per_stage * (2 if name in ("1", "2") else 1)


def plan(config: Config, run: Run, steps: list[int], model: Teacher, data: datasets.Data, sweep_calls: int) -> None:
    """Says what will be done, how long it should take and how much memory, from a rehearsal of a few steps."""
    shares = Shares(config.batch_size, run.accelerator.num_processes, run.accelerator.process_index, config.microbatch)
    batches = data.batches(shares, config.seed, "rehearsal", run.accelerator.device, conditional=model.classes is not None)
    x0, cond = next(iter(batches(0)))
    method = Progressive(model.guided(config.guidance), uniform(model.denoiser.schedule, 2 * steps[0]), config.weight)
    training, call = rehearse(method, model.student(), x0, cond)
    images = sum(images_of(config, str(n)) for n in steps)
    world = run.accelerator.num_processes
    weights = sum(p.numel() for p in model.student().net.parameters())
    run.say(f"progressive distillation of {config.teacher}: {' -> '.join(map(str, [config.start_steps, *steps]))} steps")
    run.say(f"  network   {weights / 1e6:.2f} M weights, guidance {config.guidance:g}")
    run.say(f"  data      {data.name}: {len(data.images):,} images of {'x'.join(map(str, data.shape))}")
    run.say(
        f"  training  {images:,} images in {len(steps)} stages, batch {config.batch_size}: about {duration(images * training / world)}"
    )
    run.say(f"  sweep     {config.images:,} images a cell: about {duration(1.15 * sweep_calls * config.images * call / world)}")
    run.say(f"  memory    about {1.2 * peak_memory_gb(run.accelerator.device):.1f} GB a process, {world} of them")
    run.say(f"  output    {run.folder}\n")


def as_v(model: Teacher) -> Teacher:
    """The same weights read as a v prediction: near the data eps and v agree, and near pure noise eps has no student."""
    return replace(model, denoiser=replace(model.parametric, prediction="v"))


def deliver(run: Run, model: Teacher) -> None:
    """The diffusers pipeline of the last student, compared with our sampler; a reason where no stock class carries it."""
    try:
        export.check_exportable(model)
    except ValueError as error:
        run.say(f"no diffusers pipeline: {error}")
        return
    export.pipeline(model, run.folder / "pipeline")
    worst = export.verify(model, run.folder / "pipeline", model.sampler["steps"])
    run.say(f"pipeline/ gives the same pixels through diffusers alone (largest difference {worst:.1g})")


def stage(config: Config, run: Run, name: str, model: Teacher, method: Method, data: datasets.Data, sampler: dict) -> Teacher:
    """Trains a copy of ``model`` by ``method`` and returns it, from its file, where a finished stage is found at once."""
    folder = run.folder / "stages" / name
    file = folder / "student.safetensors"
    if not file.exists():
        images = images_of(config, name)
        optimization = Optimization(images, config.batch_size, config.microbatch, config.lr, warmup_images=config.warmup_images)
        shares = Shares(config.batch_size, run.accelerator.num_processes, run.accelerator.process_index, config.microbatch)
        student = model.student()
        states = train(
            method,
            student,
            data.batches(shares, config.seed, name, run.accelerator.device, conditional=model.classes is not None),
            run.accelerator,
            optimization,
            seed=config.seed,
            phase=name,
            resumable=Resumable(folder),
            save_every_images=max(1, images // 8),
        )
        for _ in run.watch(states, name, images, f"stage {name}"):
            pass
        if run.main:
            record = {"method": "progressive", "of": config.teacher, "data": data.name, "guidance": config.guidance}
            trained = replace(model, denoiser=student, sampler=sampler, record=record)
            teachers.save(file, trained)
            Resumable(folder).clear()
        run.accelerator.free_memory()
        run.accelerator.wait_for_everyone()
    return teachers.load_file(file).to(run.accelerator.device)


if __name__ == "__main__":
    main()
