"""A model in Python: made from an nn.Module or loaded, probed, sampled, saved and exported."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import teachers
from distill.sampling import Sampling
from distill.schedule import Schedule
from eval.generate import chunks, images
from eval.image_grid import contact_sheet, write_folder
from eval.machine import default_device
from recipes.common.checks import check_sampler, probed
from recipes.common.guidance import outside
from recipes.data.sets import Data
from teachers.custom import wrap
from teachers.probe import Probe

CHUNK = 256  # images generated at once


@dataclass(frozen=True)
class Samples:
    """Hold generated images: ``pixels`` uint8 [n, C, H, W] and their ``labels`` [n] or None."""

    pixels: Tensor
    labels: Tensor | None

    def grid(self, path: Path | str, columns: int = 10) -> Path:
        """Write the images as one PNG and return its path."""
        contact_sheet(self.pixels, Path(path), columns)
        return Path(path)

    def folder(self, path: Path | str) -> Path:
        """Write the images as 000000.png, 000001.png, ... into a folder and return its path."""
        write_folder(self.pixels, Path(path))
        return Path(path)


class Model:
    """A denoiser with all that belongs to it: shape, conditions, sampling, provenance. A teacher or a student.

    ``net``: an nn.Module called as (x [B, ...], c_noise [B]), or (x, c_noise, labels=labels [B]) if it has classes. It is frozen and put
    into eval mode. ``schedule``: a `Schedule`, or a name such as "cosine", "flow", "edm", "linear_vp". ``prediction``: "eps", "x0", "v",
    "score", "flow" or "edm". ``shape``: of one sample, without the batch. ``time``: the time input of the network, a key of
    `distill.denoiser.TIMES`, or "reversed" for 1 - t. ``classes``: labels are 0..classes-1. ``null``: the label of the unconditional
    case, for guidance. ``labels``: the keyword by which the network takes labels. ``order``: "t,x" for a network called as
    (c_noise, x).

    Raises ValueError in one line where these do not fit.
    """

    def __init__(
        self,
        net: nn.Module,
        *,
        schedule: Schedule | str,
        prediction: str,
        shape: Sequence[int],
        time: str = "time",
        classes: int | None = None,
        null: int | None = None,
        labels: str = "labels",
        order: str = "x,t",
        sigma_data: float = 0.5,
    ):
        self.inner = wrap(
            net, shape=tuple(shape), schedule=schedule, prediction=prediction, time=time, classes=classes, null=null, labels=labels,
            order=order, sigma_data=sigma_data,
        )  # fmt: skip

    @classmethod
    def of(cls, inner: teachers.Teacher) -> Model:
        """Return the Python face of a `teachers.Teacher`."""
        model = cls.__new__(cls)
        model.inner = inner
        return model

    @property
    def steps(self) -> tuple[int, ...]:
        """The step counts that a student was made for; empty for a model that takes any."""
        return self.inner.sampling.steps

    def __call__(self, x_t: Tensor, t: Tensor, **cond: Any) -> Tensor:
        """Return E[x0 | x_t], [B, ...], at x_t [B, ...] and t [] or [B]."""
        return self.inner.denoiser(x_t, t, **cond)

    def __repr__(self) -> str:
        made = f"{', '.join(map(str, self.steps))} steps" if self.steps else "any number of steps"
        return f"Model of {'x'.join(map(str, self.inner.shape))}, {self.inner.conditions}, for {made}"

    def probe(self, images: Tensor, labels: Tensor | None = None, seed: int = 0) -> Probe:
        """Measure whether this is a denoiser as declared, on real images (as `Data.of` takes them).

        Raises ValueError that names the reading that fits better, if prediction, time or data range is wrong.
        """
        found = probed(self.inner, Data.of(images, labels), seed)
        if not found.ok:
            raise ValueError(found.verdict)
        return found

    def sample(
        self,
        n: int,
        *,
        steps: int | None = None,
        labels: Iterable[int] | None = None,
        seed: int = 0,
        sampler: str | None = None,
        guidance: float | None = None,
        device: torch.device | str | None = None,
    ) -> Samples:
        """Draw ``n`` images. Image i of a seed is the same whatever n is.

        ``steps``: default a student's fewest, else 64. ``labels``: classes, repeated in turn; default drawn. ``sampler``: default the
        student's, else "ddim". ``guidance``: the scale, 1 is none; default 1, or that of a student that takes the scale, which warns of
        scales that it was not trained for. Raises ValueError for step counts that a student was not made for, and for labels without a class.
        """
        sampling, classes = self.inner.sampling, self.inner.classes
        chosen = None if labels is None else list(labels)
        steps = steps or min(self.steps, default=64)
        if self.steps and steps not in self.steps:
            raise ValueError(f"this student was made for {', '.join(map(str, self.steps))} steps, not {steps}")
        if chosen is not None and (classes is None or not chosen or not all(0 <= label < classes for label in chosen)):
            raise ValueError(f"labels {chosen}: this model has {f'classes 0 to {classes - 1}' if classes else 'no classes'}")
        if sampler is not None:
            sampling = replace(Sampling.parse(sampler), grid=sampling.grid, times=sampling.times)
        check_sampler(self.inner, sampling)
        if warning := outside(self.inner, guidance):
            warnings.warn(warning, stacklevel=2)
        device = default_device() if device is None else torch.device(device)
        model = self.inner.to(device)
        label_of = None if chosen is None else lambda i: chosen[i % len(chosen)]
        parts = chunks(n, min(CHUNK, n))
        drawn = list(images(model, sampling, steps, parts, seed, device, denoiser=model.guided(guidance), label_of=label_of))
        pixels = torch.cat([batch.pixels.cpu() for batch in drawn])[:n]
        known = [batch.labels for batch in drawn if batch.labels is not None]
        return Samples(pixels, torch.cat(known).cpu()[:n] if known else None)

    def save(self, path: Path | str) -> Path:
        """Write the model as one safetensors file, which `load` reads. A network of your own is loaded with ``net=``."""
        teachers.save(path, self.inner)
        return Path(path)

    def export(self, folder: Path | str, **settings: Any) -> Path:
        """Write safetensors, diffusers pipelines with the same pixels and a model card into a new folder.

        ``settings``: flags of recipes/export.py, such as ``onnx=True``. Raises ValueError in one line where no stock class can carry the
        model, such as a network of your own.
        """
        from recipes import export

        export.export(self.inner, export.Config(output_dir=str(folder), **settings))
        return Path(folder)


Teacher = Model  # a teacher and a student are one kind of thing


def load(spec: Path | str, net: nn.Module | None = None) -> Model:
    """Load a model: a file or a run of this project, a diffusers pipeline, or anything that --teacher accepts.

    ``net``: the module that the weights belong to, for files of networks of your own. Raises ValueError in one line.
    """
    return Model.of(teachers.load(str(spec)) if net is None else teachers.load_file(spec, net=net))
