"""A student's single step as a program, by torch.export or ONNX. Each program is run and compared with our sampler."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distill.denoiser import PREDICTIONS, TIMES
from distill.files import replacing
from distill.schedule import prior_std
from teachers.teacher import Teacher, require_network

TOLERANCE = 1e-4  # largest accepted difference of a value in [-1, 1]
MOST = 63  # images per call: from 64 on, diffusers' upsampling takes another branch, which a traced program does not contain


class OneStep(nn.Module):
    """Map (noise [B, ...] of unit variance, labels [B] or None) to x0 [B, ...]. All coefficients are constants."""

    def __init__(self, model: Teacher):
        super().__init__()
        d, times = model.parametric, model.times(1)
        t = times[:1]
        coefficients = PREDICTIONS[d.prediction](d.schedule.alpha(t), d.schedule.sigma(t), d.sigma_data)
        self.net = d.net
        self.prior_std = prior_std(d.schedule, t)
        self.c_in, self.c_skip, self.c_out = map(float, coefficients)
        self.c_noise = nn.Buffer(TIMES[d.time](d.schedule, t).float())
        self.end = nn.Buffer(TIMES[d.time](d.schedule, times[1:]).float())
        self.two_times = model.sampling.two_times
        self.scale = None if model.guidance is None else nn.Buffer(torch.tensor(model.guidance.scale))

    def forward(self, noise: Tensor, labels: Tensor | None = None) -> Tensor:
        x, batch = self.prior_std * noise, noise.shape[:1]
        c_noise, end = (times.expand(batch) for times in (self.c_noise, self.end))
        cond = {} if labels is None else {"labels": labels}
        if self.two_times:
            cond["to"] = end
        if self.scale is not None:
            cond["guidance"] = self.scale.expand(batch)
        return self.c_skip * x + self.c_out * self.net(self.c_in * x, c_noise, **cond)


def check_portable(model: Teacher, with_onnx: bool) -> None:
    """Raise ValueError if the model was not made for one step, or a package for ONNX is missing."""
    if 1 not in model.sampling.steps:
        made = ", ".join(map(str, model.sampling.steps)) or "any number of"
        raise ValueError(f"a one-step program needs a student of one step; this model was made for {made} steps")
    require_network(model)
    if with_onnx:
        try:
            import onnxruntime  # noqa: F401
            import onnxscript  # noqa: F401
        except ImportError as error:
            raise ValueError(f"--onnx needs {error.name}: pip install -e '.[onnx]'") from None


def inputs(model: Teacher, n: int, seed: int) -> tuple[Tensor, ...]:
    """Return inputs of `OneStep` for ``n`` images."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(n, *model.shape, generator=generator)
    return (noise,) if model.classes is None else (noise, torch.arange(n) % model.classes)


def torch_export(model: Teacher, path: Path) -> float:
    """Write a torch.export program (.pt2) for up to `MOST` images per call. Return the largest difference to our sampler.

    Raises RuntimeError if it is more than `TOLERANCE`.
    """
    with replacing(path) as aside, open(aside, "wb") as file:
        torch.export.save(_program(model), file)
    loaded = torch.export.load(str(path)).module()
    return _compare(model, path, lambda given: loaded(*given))


def onnx(model: Teacher, path: Path) -> float:
    """Write an ONNX file for up to `MOST` images per call, with inputs "noise" and "labels" and output "x0".

    Returns the largest difference between onnxruntime and our sampler. Raises RuntimeError if it is more than `TOLERANCE`.
    """
    import onnxruntime

    names = ["noise", "labels"][: len(inputs(model, 1, 0))]
    with replacing(path) as aside, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            _program(model), (), str(aside), input_names=names, output_names=["x0"], dynamic_shapes=_any_batch(model),
            dynamo=True, external_data=False, verbose=False,
        )  # fmt: skip
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(given: tuple[Tensor, ...]) -> Tensor:
        (x0,) = session.run(None, {name: tensor.numpy() for name, tensor in zip(names, given, strict=True)})
        return torch.from_numpy(x0)

    return _compare(model, path, run)


def _program(model: Teacher) -> torch.export.ExportedProgram:
    return torch.export.export(OneStep(model).eval(), inputs(model, 4, 0), dynamic_shapes=_any_batch(model))


def _any_batch(model: Teacher) -> Any:
    batch = torch.export.Dim("batch", min=1, max=MOST)
    return ({0: batch},) if model.classes is None else ({0: batch}, {0: batch})


@torch.inference_mode()
def _compare(model: Teacher, path: Path, run: Callable[[tuple[Tensor, ...]], Tensor]) -> float:
    given = inputs(model, 7, 1)  # a batch size other than the traced one
    times = model.times(1)
    x = prior_std(model.denoiser.schedule, times[0]) * given[0]
    cond = model.condition(given[1] if len(given) > 1 else None)
    ours = model.sampling.run(model.denoiser, x, times, torch.randn_like, **cond)
    worst = float((run(given) - ours).abs().max())
    if not worst <= TOLERANCE:
        path.unlink()
        raise RuntimeError(f"{path} differs from our sampler by {worst:.2g}, more than {TOLERANCE:g}")
    return worst
