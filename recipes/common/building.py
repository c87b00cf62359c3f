"""Build the method that the flags of `recipes.common.method_flags` describe, with its target."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from distill.consistency import GAP_WEIGHTS
from distill.distance import DISTANCES, Distance
from distill.regularize import Regularized
from distill.target import DataSample, Mix, PosteriorMean, Target
from distill.teacher_bias import TeacherBias
from distill.train import Method
from eval.perceptual import Lpips
from eval.progress import progress
from recipes.common.method_flags import MethodFlags
from recipes.common.methods import METHODS, teacher_weight, terms_of
from recipes.common.several_sizes import at_size
from recipes.data.sets import Data
from teachers import Teacher
from teachers.networks.lora import Adapted
from teachers.students import with_heads, with_slow_time, with_two_times

LEVELS = torch.linspace(-9, 13, 23)  # log-SNRs at which --target-mix auto estimates the teacher's bias


def estimated_bias(teacher: Teacher, data: Data, most: int, seed: int, device: torch.device) -> TeacherBias:
    """Return the estimator of the teacher's bias on at most ``most`` random samples of the data, of one shape."""
    data = data.of_one_shape(teacher.shape)
    teacher = at_size(teacher, data)
    some = torch.randperm(len(data.images), generator=torch.Generator().manual_seed(seed))[:most]
    labels = None if data.labels is None or teacher.classes is None else data.labels[some].to(device)
    return TeacherBias(teacher.denoiser, data.x0(some, device), labels, teacher.condition)


def target_of(
    flags: MethodFlags, teacher: Teacher | None, student: Teacher, data: Data, seed: int, device: torch.device | None
) -> Target:
    """Return the target that --target and --target-mix name.

    ``device``: where the teacher's bias is estimated for "auto"; with None, which is for a trial, auto is 1/2. Raises ValueError for a
    posterior mean where the condition is a text.
    """
    weight = teacher_weight(flags)
    if flags.target == "posterior-mean":
        if student.embeddings is not None:
            raise ValueError("--target posterior-mean needs labels, and this model is conditioned on text: choose --target mix")
        return PosteriorMean()
    if teacher is None or weight == 0:
        return DataSample()
    if weight != "auto" or device is None:
        return Mix(teacher.denoiser, 0.5 if weight == "auto" else float(weight))
    rng = torch.Generator().manual_seed(seed)
    levels = progress(LEVELS, desc="estimating the teacher's bias", leave=False)
    errors = estimated_bias(teacher, data, 4096, seed, device).errors(teacher.denoiser.schedule, levels, rng)
    return Mix(teacher.denoiser, errors["best"], LEVELS)


def method_of(
    flags: MethodFlags, teacher: Teacher | None, student: Teacher, data: Data, seed: int, device: torch.device | None = None
) -> Method:
    """Return the method that the flags describe, with its regularizers. ``device``: as in `target_of`."""
    defaults, terms = METHODS[flags.method], terms_of(flags)
    options: dict[str, Any] = {"averaged": flags.averaged_target, "weight": GAP_WEIGHTS[flags.weight or defaults.weight]}
    options["distance"] = distance_of(flags.distance or defaults.distance, data)
    method = sharing_the_base(defaults.build(flags, target_of(flags, teacher, student, data, seed, device), options), student)
    return Regularized(method, terms) if terms else method


def sharing_the_base(method: Any, student: Teacher) -> Any:
    """Return the method; where the student is a LoRA adapter, with an adapter on the same base as its second network, if it has one."""
    net = student.parametric.net
    if not isinstance(net, Adapted) or not hasattr(method, "second"):
        return method
    return replace(method, second=replace(method.second, begin=replace(method.second.begin, net=net)))


def student_of(flags: MethodFlags, model: Teacher) -> Teacher:
    """Return the model with the time embedding, the second time or the heads that the method needs.

    Raises ValueError where the network cannot have them.
    """
    defaults = METHODS[flags.method]
    if (flags.time_embedding or defaults.time_embedding) == "slow":
        model = with_slow_time(model)
    if flags.method == "pdd":
        return with_heads(model, flags.heads)
    return with_two_times(model) if defaults.two_times else model


def distance_of(name: str, data: Data) -> Distance:
    """Return the distance of this name. Raises ValueError where its package is missing or the images do not fit it."""
    return Lpips(data.shape[0]) if name == "lpips" else DISTANCES[name]
