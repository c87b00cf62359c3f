"""What recipes that train a student share: the plan they print, one stage of training, and the delivery of the last student."""

from __future__ import annotations

from dataclasses import replace
from subprocess import CalledProcessError

import torch

import teachers
from distill.checkpoint import Resumable, whole, write_json
from distill.rng import Rng
from distill.train import Batches, Method, Optimization, Shares, train
from eval.generate import peak_memory_gb
from recipes.common import Run, duration, rehearse
from recipes.data import Data
from recipes.measure import training_seconds
from teachers import Teacher, export


def plan(
    run: Run,
    title: str,
    model: Teacher,
    method: Method,
    data: Data,
    stages: list[Optimization],
    sweep_calls: int,
    sweep_images: int,
) -> None:
    """Says what will be done, how long it should take and how much memory, from a rehearsal of a few steps.

    ``sweep_calls``: network evaluations an image of all cells together.
    """
    world, some = run.accelerator.num_processes, stages[0]
    shares = Shares(some.batch_size, world, run.accelerator.process_index, some.microbatch)
    batches = conditioned(data.batches(shares, 0, "rehearsal", run.accelerator.device, model.classes is not None), model)
    x0, cond = next(iter(batches(0)))
    training, call = rehearse(method, model.student(), x0, cond)
    images = sum(o.images for o in stages)
    weights = sum(p.numel() for p in model.parametric.net.parameters())
    run.say(title)
    run.say(f"  network   {weights / 1e6:.2f} M weights")
    run.say(f"  data      {data.name}: {len(data.images):,} images of {'x'.join(map(str, data.shape))}")
    run.say(
        f"  training  {images:,} images in {len(stages)} stage(s), batch {some.batch_size}: about {duration(images * training / world)}"
    )
    run.say(f"  sweep     {sweep_images:,} images a cell: about {duration(1.15 * sweep_calls * sweep_images * call / world)}")
    run.say(f"  memory    about {1.2 * peak_memory_gb(run.accelerator.device):.1f} GB a process, {world} of them")
    run.say(f"  output    {run.folder}\n")


def stage(
    run: Run,
    name: str,
    model: Teacher,
    method: Method,
    data: Data,
    optimization: Optimization,
    *,
    sampler: dict,
    record: dict,
    seed: int,
    spent: float = 0.0,
) -> tuple[Teacher, float]:
    """Trains a copy of ``model`` by ``method`` and returns it, from its file, where a finished stage is found at once, with the
    seconds of training it took from the first stage on, ``spent`` before this one."""
    folder = run.folder / "stages" / name
    file = folder / "student.safetensors"
    if not file.exists():
        accelerator = run.accelerator
        shares = Shares(optimization.batch_size, accelerator.num_processes, accelerator.process_index, optimization.microbatch)
        student = model.student()
        trained = student
        states = train(
            method,
            student,
            conditioned(data.batches(shares, seed, name, accelerator.device, model.classes is not None), model),
            accelerator,
            optimization,
            seed=seed,
            phase=name,
            resumable=Resumable(folder),
            save_every_images=max(1, optimization.images // 8),
        )
        for state in run.watch(states, name, optimization.images, f"stage {name}"):
            trained = state.ema
        weights = {k: whole(v) for k, v in accelerator.unwrap_model(trained.net).state_dict().items()}
        if run.main:
            write_json(folder / "cost.json", {"training_seconds": spent + run.seconds(name, optimization.images)})
            net = model.student().net
            net.load_state_dict(weights)
            kept = {key: model.record[key] for key in ("prompts",) if key in model.record}
            teachers.save(file, replace(model, denoiser=replace(trained, net=net), sampler=sampler, record=kept | record))
        accelerator.free_memory()
        accelerator.wait_for_everyone()
    if run.main:
        Resumable(folder).clear()  # here, since a run can be killed between the student's file and this
    return teachers.load_file(file).to(run.accelerator.device), training_seconds(file) or spent


def trial(method: Method, model: Teacher, data: Data) -> None:
    """The method once on two images, so that what this network cannot do is said before anything is written. ValueError, e.g. from a
    tangent that an operator of the network has no rule for."""
    batches = conditioned(data.batches(Shares(2), 0, "trial", torch.device("cpu"), model.classes is not None), model)
    x0, cond = next(iter(batches(0)))
    method(model.student(), x0, rng=Rng(torch.Generator().manual_seed(0), 2), progress=0.5, **cond)


def conditioned(batches: Batches, model: Teacher) -> Batches:
    """The batches with what the model's network is told in place of their labels: of a text model, the rows of its prompts."""
    if model.table is None:
        return batches
    return lambda step: ((x0, model.condition(cond.get("labels"))) for x0, cond in batches(step))


def deliver(run: Run, model: Teacher) -> None:
    """The diffusers pipeline of the last student, compared with our sampler; a reason where no stock class carries it."""
    if not run.main:
        return
    try:
        for name, worst in export.deliver(model, run.folder).items():
            run.say(f"{name}/ gives the same pixels through diffusers alone (largest difference {worst:.1g})")
    except (ValueError, RuntimeError, OSError, CalledProcessError) as error:  # the student itself is saved
        run.say(f"no diffusers pipeline: {error}")
