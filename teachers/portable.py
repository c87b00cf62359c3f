"""A student's one step as a program of its own: torch.export and ONNX, each run beside our sampler before it counts."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distill.checkpoint import replacing
from distill.denoiser import PREDICTIONS, TIMES
from teachers.load import Teacher

TOLERANCE = 1e-4  # of values in [-1, 1]
MOST = 63  # images at once: from 64 on diffusers' upsampling takes another branch, which a traced program cannot


class OneStep(nn.Module):
    """(noise [B, ...] of deviation 1, labels [B] or nothing) -> x0 [B, ...], the coefficients of the one time as constants."""

    def __init__(self, model: Teacher):
        super().__init__()
        d, times = model.parametric, model.times(1)
        t = times[:1]
        coefficients = PREDICTIONS[d.prediction](d.schedule.alpha(t), d.schedule.sigma(t), d.sigma_data)
        self.net = d.net
        self.sigma = float(d.schedule.sigma(t))
        self.c_in, self.c_skip, self.c_out = map(float, coefficients)
        self.c_noise = nn.Buffer(TIMES[d.time](d.schedule, t).float())
        self.end = nn.Buffer(TIMES[d.time](d.schedule, times[1:]).float())
        self.jump = model.sampler.get("name") == "jump"

    def forward(self, noise: Tensor, labels: Tensor | None = None) -> Tensor:
        x, batch = self.sigma * noise, noise.shape[:1]
        c_noise, end = (times.expand(batch) for times in (self.c_noise, self.end))
        cond = ({} if labels is None else {"labels": labels}) | ({"to": end} if self.jump else {})
        return self.c_skip * x + self.c_out * self.net(self.c_in * x, c_noise, **cond)


def check_portable(model: Teacher, with_onnx: bool) -> None:
    """ValueError where the model was not made for one step, or the packages for ONNX are missing."""
    if 1 not in model.sampler.get("steps", []):
        made = model.sampler.get("steps", "any number of")
        raise ValueError(f"a program of one step needs a student of one step; this model was made for {made} steps")
    model.parametric  # an oracle has no network  # noqa: B018
    if with_onnx:
        try:
            import onnxruntime  # noqa: F401
            import onnxscript  # noqa: F401
        except ImportError as error:
            raise ValueError(f"--onnx needs {error.name}: pip install 'fewstep[onnx]'") from None


def inputs(model: Teacher, n: int, seed: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(n, *model.shape, generator=generator)
    return (noise,) if model.classes is None else (noise, torch.arange(n) % model.classes)


def torch_export(model: Teacher, path: Path) -> float:
    """Writes a torch.export program (.pt2) of up to `MOST` images at once; the largest difference to our sampler.

    RuntimeError over `TOLERANCE`.
    """
    program = torch.export.export(OneStep(model).eval(), inputs(model, 4, 0), dynamic_shapes=_any_batch(model))
    with replacing(path) as aside, open(aside, "wb") as file:
        torch.export.save(program, file)
    loaded = torch.export.load(str(path)).module()
    return _compare(model, path, lambda given: loaded(*given))


def onnx(model: Teacher, path: Path) -> float:
    """Writes an ONNX file of up to `MOST` images at once, inputs "noise" and "labels", output "x0", and runs it in onnxruntime; the largest
    difference to our sampler. RuntimeError over `TOLERANCE`."""
    import onnxruntime

    names = ["noise", "labels"][: len(inputs(model, 1, 0))]
    with replacing(path) as aside, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            OneStep(model).eval(), inputs(model, 4, 0), str(aside), input_names=names, output_names=["x0"],
            dynamic_shapes=_any_batch(model), dynamo=True, external_data=False, verbose=False,
        )  # fmt: skip
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(given: tuple[Tensor, ...]) -> Tensor:
        (x0,) = session.run(None, {name: tensor.numpy() for name, tensor in zip(names, given, strict=True)})
        return torch.from_numpy(x0)

    return _compare(model, path, run)


def _any_batch(model: Teacher) -> Any:
    batch = torch.export.Dim("batch", min=1, max=MOST)
    return ({0: batch},) if model.classes is None else ({0: batch}, {0: batch})


@torch.inference_mode()
def _compare(model: Teacher, path: Path, run: Callable[[tuple[Tensor, ...]], Tensor]) -> float:
    given = inputs(model, 7, 1)  # another batch than it was traced with
    schedule, times = model.denoiser.schedule, model.times(1)
    told = {"to": times[1]} if model.sampler.get("name") == "jump" else {}
    cond = model.condition(given[1] if len(given) > 1 else None)
    ours = model.denoiser(given[0] * float(schedule.sigma(times[0])), times[0], **told, **cond)
    worst = float((run(given) - ours).abs().max())
    if not worst <= TOLERANCE:
        path.unlink()
        raise RuntimeError(f"{path} differs from our sampler by {worst:.2g}, more than {TOLERANCE:g}")
    return worst
