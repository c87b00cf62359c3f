"""The picture of a likelihood: at which log-SNR the bits are paid, and what chains of few steps pay more."""

from __future__ import annotations

from pathlib import Path

from eval.plots import drawing


def draw(out: dict, path: Path) -> None:
    """Plot likelihood.json, which recipes/likelihood.py writes: the integrand as an area, and the chains against their limit."""
    bits = {name: entry["mean"] for name, entry in out["bits"].items()}
    with drawing(path, (11, 4), columns=2) as (_, (area, chains)):
        area.fill_between(out["logsnr"], out["integrand"], color="#1f77b4", alpha=0.4, linewidth=0)
        area.plot(out["logsnr"], out["integrand"], color="#1f77b4")
        area.set(xlabel="log-SNR", ylabel="bits per dimension and unit of log-SNR", ylim=(0, None))
        parts = ", ".join(f"{name} {bits[name]:.3f}" for name in ("prior", "diffusion", "decoder"))
        area.set_title(f"bits per dimension: {parts}", fontsize=9)
        steps = [row["steps"] for row in out["discrete"]]
        chains.plot(steps, [row["diffusion"] for row in out["discrete"]], "o-", color="#d62728", label="chain of T steps")
        chains.axhline(bits["diffusion"], color="#1f77b4", linestyle="--", label="continuous limit")
        chains.set(xscale="log", yscale="log", xlabel="T", ylabel="diffusion term, bits per dimension")
        chains.set_xticks(steps, [str(n) for n in steps])
        chains.minorticks_off()
        chains.legend(fontsize=8)
        for axis in (area, chains):
            axis.grid(alpha=0.25)
