"""Plots of a report: FID against cost, and the classes of the generated images."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from distill.files import replacing
from eval.series import curves, styles
from eval.verdict import pareto

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
    """Plot FID with its interval against ``rows[..][x]``, log-log. Times have their interval too.

    Each student has a colour and a marker, the teacher's samplers are grey, the Pareto front is ringed, and the floor is a dashed line.
    """
    drawn = curves(rows)
    look = styles(drawn)
    with drawing(path, (7.5, 5.6)) as (_, axes):
        for name, points in drawn.items():
            points.sort(key=lambda row: row[x])
            fid = [row["fid"] for row in points]
            low = [max(0, row["fid"] - row["fid_interval"][0]) for row in points]
            high = [row["fid_interval"][1] - row["fid"] for row in points]
            timed = x == "seconds_per_image" and all("seconds_interval" in row for row in points)
            sideways = [[abs(row[x] - row["seconds_interval"][i]) for row in points] for i in (0, 1)] if timed else None
            axes.errorbar(
                [row[x] for row in points],
                fid,
                [low, high],
                sideways,
                label=plain(name),
                capsize=2,
                elinewidth=0.8,
                **look[name],
            )
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
        handles, names = axes.get_legend_handles_labels()
        lines = [handle[0] if isinstance(handle, tuple) else handle for handle in handles]  # without their error bars
        axes.legend(lines, names, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncol=4, handlelength=3.5)


def plain(text: str) -> str:
    """Return text that matplotlib draws as it is: its mathematics is off, and a name that it would hide is shown."""
    return text.replace("$", r"\$").replace("\n", " ") if not text.startswith("_") else plain("\u200b" + text)


def label_shares(rows: list[dict], path: Path) -> None:
    """Plot a heat map: images that the extractor assigns to each class, divided by the images requested of it, per cell."""
    shares = [[seen / max(1, asked) for seen, asked in zip(r["labels_seen"], r["labels_asked"], strict=True)] for r in rows]
    with drawing(path, (7.5, 1 + 0.24 * len(rows))) as (figure, axes):
        heat = axes.imshow(shares, vmin=0.5, vmax=1.5, cmap="RdBu", aspect="auto")
        axes.set_yticks(range(len(rows)), [plain(row["name"]) for row in rows], fontsize=7)
        axes.set_xlabel("class")
        figure.colorbar(heat, label="recognised / requested")
