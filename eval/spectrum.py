"""Radially averaged power spectra: what a model restores, and what a student loses, at each spatial frequency."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.denoiser import DenoiserLike
from distill.schedule import add_noise
from eval.columns import plural
from eval.plots import drawing


def rings(height: int, width: int) -> Tensor:
    """Return the radial frequency of each coefficient of a 2-D FFT, [H, W] int64: cycles per shorter side, rounded."""
    vertical, horizontal = torch.fft.fftfreq(height), torch.fft.fftfreq(width)
    return (torch.hypot(vertical[:, None], horizontal) * min(height, width)).round().long()


def power(x: Tensor) -> Tensor:
    """Return the mean of |FFT|^2 over samples, channels and each ring of x [B, C, H, W]: float64 [rings].

    The FFT is orthonormal: white noise of variance v has power v in every ring. The mean over rings, weighted with their sizes, is
    the mean square of x (Parseval).
    """
    of = rings(*x.shape[2:]).flatten()
    energy = torch.fft.fft2(x.double(), norm="ortho").abs().square().mean((0, 1)).flatten().cpu()
    total = torch.zeros(int(of.max()) + 1, dtype=torch.float64).index_add_(0, of, energy)
    return total / of.bincount()


@torch.no_grad()
def error(denoiser: DenoiserLike, x0: Tensor, logsnr: Tensor, rng: torch.Generator, **cond: Any) -> Tensor:
    """Return the power of x0 - D(x_t) of x0 [B, C, H, W] at log-SNRs [L], with new noise at each: float64 [L, rings].

    It is S N / (S + N) for a stationary Gaussian process of power S, with N = exp(-log-SNR): the error of the Wiener filter.
    """
    schedule, found = denoiser.schedule, []
    for level in logsnr:
        t = schedule.time(level).clamp(schedule.t_min, schedule.t_max)
        x_t = add_noise(schedule, x0, torch.randn(x0.shape, generator=rng).to(x0), t)
        found.append(power(x0 - denoiser(x_t, t, **cond)))
    return torch.stack(found)


def draw(out: dict, path: Path) -> None:
    """Plot spectrum.json, which recipes/spectrum.py writes: spectra, the part of each frequency that is unknown, and the student's loss."""
    frequencies, logsnr = range(len(out["data"])), out["logsnr"]
    students = out["students"]
    with drawing(path, (15 if students else 11, 4), columns=3 if students else 2) as (figure, (spectra, unknown, *loss)):
        spectra.plot(frequencies, out["data"], "k.-", label="data")
        for level, noisy in list(zip(logsnr, out["noisy"], strict=True))[:: max(1, len(logsnr) // 4)]:
            spectra.plot(frequencies, noisy, ".:", linewidth=0.9, label=f"x_t / alpha at log-SNR {level:.1f}")
        spectra.set(yscale="log", ylim=(min(out["data"]) / 3, max(out["data"]) * 30), ylabel="power")
        heat = unknown.imshow(
            out["unknown"], origin="lower", aspect="auto", vmin=0, vmax=1, cmap="magma",
            extent=(-0.5, len(frequencies) - 0.5, logsnr[0], logsnr[-1]),
        )  # fmt: skip
        unknown.set(ylabel="log-SNR")
        unknown.set_title("error / power of the data: 1 is unknown", fontsize=9)
        figure.colorbar(heat)
        for student in students:
            loss[0].plot(frequencies, student["ratio"], ".-", label=plural(student["steps"], "step"))
        for axis in (spectra, unknown, *loss):
            axis.set_xlabel("cycles per shorter side")
        for axis in (spectra, *loss):
            axis.grid(alpha=0.25)
            axis.legend(fontsize=7)
        for axis in loss:
            axis.axhline(1, color="k", linewidth=0.8)
            axis.set_title("power of student / teacher, equal seeds", fontsize=9)
