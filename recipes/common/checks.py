"""Whether a teacher, data and a sampler fit together. Everything here runs before a run starts."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

import teachers
from distill.denoiser import Denoiser
from distill.optimizers import check_installed
from distill.sampling import Sampling
from distill.schedule import Flow, Table
from recipes.common.encoding import Encoding, cached
from recipes.common.several_sizes import at_size, fits, shapes_text
from recipes.data.buckets import Buckets
from recipes.data.condition_shards import distinct
from recipes.data.latent_shards import codec_sha256
from recipes.data.sets import Data
from teachers import Teacher
from teachers.codec import Codec
from teachers.conditions import Conditions
from teachers.encoder import Encoder, online
from teachers.hollow import META, is_hollow
from teachers.probe import Probe, probe
from teachers.prompts import read_prompts

QUICK: dict[str, Any] = {"levels": 6, "samples": 16}  # the probe before a distillation
SHARDED = {"ACCELERATE_USE_FSDP": "FSDP2", "ACCELERATE_USE_DEEPSPEED": "DeepSpeed"}  # variables of `accelerate launch`
IMAGES = 1024  # of the data, for the probe
WARNED = 10_000  # prompts whose length is looked at where nothing is encoded before the run
CHECKED = 2**16  # samples that are read before a run; recipes/latents.py refuses others that are not finite


def check_match(teacher: Teacher, data: Data, training: bool = False) -> Data:
    """Return the data, with captions as labels for a teacher of prompts.

    Raises ValueError where the teacher cannot be measured on the data or, with ``training``, cannot be distilled on them.
    """
    if teacher.embeddings is not None and teacher.classes and data.captions is not None:
        data = data.captioned(list(teacher.embeddings.prompts))
    if data.latents is not None:
        _check_latents(teacher, data)
    elif data.imageless:
        data = data.shaped(teacher.shape)
    elif data.bits is not None:
        if teacher.codec != codec_of(data) or teacher.image_shape != data.shape:
            raise ValueError(
                f"{data.name} are bits of {data.shape}: accepted is a teacher that was trained on {data.bits} bits"
            )
    elif training and teacher.codec is not None:
        raise ValueError(f"the teacher works on latents, {data.name} holds images: recipes/latents.py makes latents of them")
    elif teacher.image_shape != data.shape:
        raise ValueError(
            f"the teacher makes images of shape {teacher.image_shape}, {data.name} holds {data.shape}: they must agree"
        )
    if teacher.classes and data.labels is None:
        raise ValueError(f"the teacher is conditional on {teacher.classes} classes, {data.name} has no labels")
    if teacher.classes and data.classes is not None and data.classes > teacher.classes:
        raise ValueError(f"{data.name} has {data.classes} classes, the teacher has {teacher.classes}")
    if training:
        check_finite_weights(teacher)
        check_finite_data(data)
    return data


def conditioned(teacher: Teacher, data: Data, config: Any = None) -> tuple[Teacher, Data]:
    """Return a text-to-image teacher with the conditions of the data's captions, and the data with their rows as labels.

    A teacher with prompts of its own, and one that takes no text, are returned with the data unchanged. ``config``: with --conditions
    cached, captions that recipes/latents.py did not encode are encoded into a cache beside the run; online encodes each batch, and so
    does --dry-run, which writes nothing. Without ``config`` they are encoded in memory.

    Raises ValueError for data without captions, and for conditions of another text encoder.
    """
    if teacher.embeddings is None and data.imageless:
        raise ValueError(f"{data.name} holds prompts alone, and the teacher takes {teacher.conditions}: accepted are images")
    if teacher.embeddings is None or teacher.classes:
        return teacher, data
    if data.captions is None:
        raise ValueError(
            f"the teacher is conditioned on text, and {data.name} has no captions: accepted are sets with captions"
        )
    if data.table is None or getattr(config, "conditions", "") == "online":
        table = encoded(teacher, distinct(data.captions), config)
    else:
        table, own = data.table, teacher.embeddings
        if not own.encoder and not own.null and not teacher.hollow:
            teacher = replace(teacher, embeddings=replace(own, encoder=Encoder.of(teacher).sha256))
    return teacher.with_conditions(table), data.captioned(list(table.prompts))


def captions_for(model: Teacher, path: str | None, config: Any = None) -> Conditions | None:
    """Return the conditions of the lines of --captions, on which a text-to-image model is measured; None for other models, or no file.

    Equal lines count once. Raises ValueError for a file that cannot be read.
    """
    if path is None or model.embeddings is None:
        return None
    return encoded(model, distinct(read_prompts(path)), config)


def encoded(teacher: Teacher, prompts: list[str], config: Any = None) -> Conditions:
    """Return the conditions of distinct prompts by the teacher's own text encoders, see `conditioned`."""
    state = PartialState(cpu=not torch.cuda.is_available())
    if config is None:
        encoder = Encoder.of(teacher, device=state.device)
        encoder.warn_of_long(prompts)
        return encoder.table(prompts)
    if getattr(config, "conditions", "cached") == "online" or getattr(config, "dry_run", False):
        precision = torch.bfloat16 if state.device.type == "cuda" else torch.float32
        where: dict[str, Any] = {"device": META} if teacher.hollow else {"device": state.device, "dtype": precision}
        encoder = Encoder.of(teacher, **where)
        encoder.warn_of_long(prompts[:WARNED])
        return online(encoder, prompts)
    encoding = Encoding(Encoder.of(teacher, device=state.device))
    return cached(Path(config.output_dir).absolute().parent, prompts, encoding, state)


def check_finite_weights(model: Teacher) -> None:
    """Raise ValueError that names the first weight or prompt embedding with NaN or infinity."""
    if not isinstance(model.denoiser, Denoiser) or model.hollow:
        return
    for name, value in model.tensors().items():
        if value.is_floating_point() and not value.isfinite().all():
            count = int((~value.isfinite()).sum())
            raise ValueError(
                f"{count} of {value.numel()} numbers of the model's {name} are not finite: give a model without NaN"
            )


def check_finite_data(data: Data) -> Data:
    """Return the data. Raises ValueError that names the first image or latent with NaN or infinity, of the first `CHECKED`."""
    if data.images.is_floating_point() and not data.imageless:
        for part in data.images.parts if isinstance(data.images, Buckets) else [data.images]:
            for start in range(0, min(len(part), CHECKED), 4096):
                finite = part[start : start + 4096].isfinite().flatten(1).all(1)
                if not finite.all():
                    first = start + int((~finite).nonzero()[0])
                    raise ValueError(f"{data.name}: sample {first} is not finite: accepted are data without NaN and infinity")
    return data


def _check_latents(teacher: Teacher, data: Data) -> None:
    index, codec = data.latents or {}, teacher.codec
    if codec is None or not fits(teacher, data):
        works = "images" if codec is None else "latents"
        raise ValueError(
            f"{data.name} holds latents of {index['model']} and shape {shapes_text(data)}, the teacher works on {works} of"
            f" {'x'.join(map(str, teacher.shape))}: they must agree"
        )
    if is_hollow(codec.network):
        return
    here = {"scale": codec.scale, "shift": codec.shift, "codec_sha256": codec_sha256(codec)}
    if wrong := [key for key, value in here.items() if index[key] != value]:
        key = wrong[0]
        raise ValueError(
            f"{data.name}: latents with {key} {index[key]!r:.14}, the teacher has {here[key]!r:.14}: make latents with the teacher"
        )


def decoded_by(model: Teacher, how: str) -> Teacher:
    """Return the model with the decoding of --decode. Raises ValueError where its autoencoder cannot, or it has none."""
    if model.codec is None:
        if how != "plain":
            raise ValueError(f"--decode {how}: this model works on pixels; accepted is plain")
        return model
    return replace(model, codec=model.codec.decoding(how))


def codec_of(data: Data) -> Codec | None:
    """Load the autoencoder of latents, or the codec of bits; None for images. Raises ValueError where it is gone or has changed."""
    if data.bits is not None:
        return Codec.of_bits(data.bits)
    if data.latents is None:
        return None
    described = data.latents.get("codec", {})
    codec: Codec | None
    if "folder" in described:
        codec = Codec.from_description(described, Path())
    else:  # of a model that is not a pipeline
        codec = teachers.load(data.latents["model"], trusted=False).codec
    if codec is None or codec_sha256(codec) != data.latents["codec_sha256"]:
        raise ValueError(f"{data.name}: the autoencoder of {data.latents['model']} has changed since it made these latents")
    return codec


def stages_of(spec: str) -> list[str]:
    """Return the students of a run's directory, from many steps to few; the spec itself where it is anything else."""
    stages = [p.parent for p in Path(spec).glob("stages/*/student.safetensors") if p.parent.name.isdigit()]
    return [str(p / "student.safetensors") for p in sorted(stages, key=lambda p: -int(p.name))] or [spec]


def stage_of(spec: str, steps: int | None) -> str:
    """Return the student of a run's directory that was made for ``steps``; the spec itself where there is none."""
    return next((path for path in stages_of(spec) if steps is not None and Path(path).parent.name == str(steps)), spec)


def check_unsharded(flag: str) -> None:
    """Raise ValueError where the launcher shards the training, which ``flag`` does not support."""
    if sharding := [name for variable, name in SHARDED.items() if os.environ.get(variable, "false").lower() == "true"]:
        raise ValueError(
            f"{flag} with {sharding[0]}, which shards: accepted with it are configs/one-gpu.yaml and configs/ddp.yaml"
        )


def check_optimizer(name: str) -> None:
    """Raise ValueError for an optimizer that is not installed, or that cannot be sharded where the launcher shards."""
    check_installed(name)
    if name != "adamw":
        check_unsharded(f"--optimizer {name}")


def check_steps(teacher: Teacher, steps: tuple[int, ...]) -> None:
    """Raise ValueError where a step count exceeds the entries of the model's discrete table."""
    schedule = teacher.denoiser.schedule
    most = schedule.steps if isinstance(schedule, Table) else 100_000
    if wrong := [n for n in steps if not 1 <= n <= most]:
        raise ValueError(f"{wrong[0]} steps on a grid of {most:,}: accepted are 1 to {most}")


def check_sampler(teacher: Teacher, sampling: Sampling) -> None:
    """Raise ValueError for a sampler that needs a two-time network, or noise, where the model does not have it."""
    net = getattr(teacher.denoiser, "net", None)
    if sampling.two_times and not getattr(net, "two_times", True):
        raise ValueError(f"sampler {sampling.label!r} needs a two-time network (--method meanflow makes them)")
    if teacher.source is not None and sampling.noisy:
        raise ValueError(
            f"sampler {sampling.label!r} draws Gaussian noise, and paths start from {teacher.source}: accepted are samplers without noise"
        )


def with_sampler(model: Teacher, name: str) -> Teacher:
    """Return a student with another sampler at its own step counts and times. Raises ValueError where the model does not support it."""
    made = model.sampling
    sampling = Sampling.parse(name, grid=made.grid, steps=made.steps, times=made.times)
    check_sampler(model, sampling)
    return replace(model, sampling=sampling)


def check_source(teacher: Teacher, student: Teacher) -> None:
    """Raise ValueError for a student whose paths start elsewhere than the teacher's, or are no flow."""
    if teacher.source is not None and (student.source is not teacher.source or not isinstance(student.denoiser.schedule, Flow)):
        raise ValueError(
            f"paths start from {teacher.source}: accepted are students that are copied from the teacher, without --student"
        )


def check_levels(teacher: Teacher, student: Teacher) -> None:
    """Raise ValueError where the student would be trained far below the noise levels that the teacher supports."""
    schedules = (teacher.denoiser.schedule, student.denoiser.schedule)
    lowest, mine = (float(schedule.level(schedule.ends()[1])) for schedule in schedules)
    if mine < lowest / 2:
        raise ValueError(
            f"the student's schedule begins at sigma/alpha {mine:.3g} (t_min), the teacher's at {lowest:.3g}: accepted are schedules"
            " that begin at half of the teacher's or above"
        )


def probed(teacher: Teacher, data: Data, seed: int, **how: Any) -> Probe:
    """Probe the teacher on some of the data. Raises ValueError for data without images."""
    if data.imageless:
        raise ValueError(f"a probe needs images, and {data.name} holds prompts alone")
    data = data.of_one_shape(teacher.shape)
    teacher = at_size(teacher, data)
    index = torch.randperm(len(data.images), generator=torch.Generator().manual_seed(seed))[:IMAGES]
    labels = None if data.labels is None else data.labels[index]
    return probe(teacher, data.x0(index), labels, seed=seed, encoded=data.latents is not None or data.bits is not None, **how)


def check_denoiser(teacher: Teacher, data: Data, seed: int, force: bool) -> str | None:
    """Probe the teacher before it is distilled. Return a warning, or None if it is a good denoiser as declared.

    A distilled model gets a warning: its output is a sample, not the mean, and a ladder may still go on from it. Any other model that
    fails raises ValueError, or gets a warning with ``force``.
    """
    if teacher.hollow:
        return "the weights are not loaded, so that nothing tests whether the teacher is a denoiser as declared"
    if data.imageless:
        return f"{data.name} holds no images, so that nothing tests whether the teacher is a denoiser as declared"
    if teacher.source is not None:
        return f"paths start from {teacher.source}, so that nothing tests whether the teacher is a denoiser as declared"
    found = probed(teacher, data, seed, **QUICK)
    if found.ok:
        return f"the teacher is {found.verdict}" if found.warning else None
    if teacher.distilled:
        return f"the teacher is a student of {teacher.sampling.name} steps and not E[x0 | x_t]: {found.verdict}"
    if force:
        return f"--force: {found.verdict}"
    raise ValueError(
        f"the teacher is not what it says it is: {found.verdict}; declare it rightly, train it longer, or use --force"
    )
