"""Plots of a report: FID against cost, and the classes of the generated images."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from distill.files import replacing
from eval.verdict import pareto

STUDENT = "#d62728"
GREYS = ["#222222", "#555555", "#777777", "#999999", "#b0b0b0", "#c8c8c8"]
FRONT = "#e0a000"


@contextmanager
def drawing(path: Path, size: tuple[float, float], columns: int = 1) -> Iterator[tuple[Any, Any]]:
    """Yield a matplotlib figure of ``size`` inches and its axes, then write it to ``path`` as PNG. Needs no display."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=130)
    yield figure, figure.subplots(1, columns)
    figure.tight_layout()
    with replacing(path) as aside:
        figure.savefig(aside, format="png")


def fid_against(rows: list[dict], x: str, label: str, path: Path, floor: float | None = None) -> None:
    """Plot FID with its interval against ``rows[..][x]``, log-log.

    The student is red, the teacher's samplers are grey, the Pareto front is ringed, and the floor is a dashed line.
    """
    curves: dict[str, list[dict]] = {}
    for row in sorted(rows, key=lambda row: row["role"]):
        curves.setdefault("student" if row["role"] == "student" else f"teacher, {row['sampler']}", []).append(row)
    with drawing(path, (7.5, 4.8)) as (_, axes):
        for i, (name, points) in enumerate(curves.items()):
            style: dict = {"color": GREYS[i % len(GREYS)], "marker": ".", "linewidth": 1.1, "zorder": 2}
            if name == "student":
                style = {"color": STUDENT, "marker": "o", "linewidth": 2.2, "zorder": 3}
            points.sort(key=lambda row: row[x])
            fid = [row["fid"] for row in points]
            low = [max(0, row["fid"] - row["fid_interval"][0]) for row in points]
            high = [row["fid_interval"][1] - row["fid"] for row in points]
            axes.errorbar([row[x] for row in points], fid, [low, high], label=name, capsize=2, **style)
        front = pareto(rows, x)
        ring = {"s": 110, "facecolors": "none", "edgecolors": FRONT, "zorder": 4, "label": "Pareto front"}
        axes.scatter([row[x] for row in front], [row["fid"] for row in front], **ring)
        if floor is not None:
            axes.axhline(floor, color="#888888", linestyle="--", linewidth=0.9, label="floor: fresh real images")
        axes.set(xscale="log", yscale="log", xlabel=label, ylabel=f"FID ({rows[0]['images']:,} images)")
        if x == "nfe":
            ticks = sorted({round(row[x]) for row in rows})
            axes.set_xticks(ticks, [str(tick) for tick in ticks], fontsize=7)
            axes.minorticks_off()
        axes.grid(True, which="both", alpha=0.25)
        axes.legend(fontsize=7)


def label_shares(rows: list[dict], path: Path) -> None:
    """Plot a heat map: images that the extractor assigns to each class, divided by the images requested of it, per cell."""
    shares = [[seen / max(1, asked) for seen, asked in zip(r["labels_seen"], r["labels_asked"], strict=True)] for r in rows]
    with drawing(path, (7.5, 1 + 0.24 * len(rows))) as (figure, axes):
        heat = axes.imshow(shares, vmin=0.5, vmax=1.5, cmap="RdBu", aspect="auto")
        axes.set_yticks(range(len(rows)), [row["name"] for row in rows], fontsize=7)
        axes.set_xlabel("class")
        figure.colorbar(heat, label="recognised / requested")
