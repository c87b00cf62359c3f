"""The picture of residuals: models by properties of the exact denoiser, over noise levels."""

from __future__ import annotations

from pathlib import Path

from eval.plots import drawing, plain


def draw(out: dict, path: Path) -> None:
    """Plot residuals.json, which recipes/residuals.py writes: one panel for each residual, one line for each model."""
    with drawing(path, (5 * len(out["residuals"]), 4), columns=len(out["residuals"])) as (_, axes):
        for axis, name in zip(axes, out["residuals"], strict=True):
            for row in out["models"]:
                axis.plot(out["logsnr"], row["at"][name], ".-", label=plain(row["model"]))
            axis.set_yscale("symlog", linthresh=1e-5)  # unbiased estimates of 0 may be negative
            axis.set(xlabel="log-SNR", title=name)
            axis.grid(alpha=0.25)
        axes[0].set_ylabel("residual per pixel")
        axes[-1].legend(fontsize=7)
