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


def fid_against(rows: list[dict], x: str, label: str, path: Path, floor: float | None = None, distance: str = "FID") -> None:
    """Plot FID against ``rows[..][x]``, log-log, at the size of a talk. Students and the best training-free samplers have their intervals.

    Each student has a colour and a marker, the teacher's samplers are thin and grey, their Pareto front is bold, the floor is dashed.
    ``distance``: what the axis calls the FID.
    """
    from matplotlib import rc_context

    drawn = curves(rows)
    look = styles(drawn)
    front = pareto([row for row in rows if row["role"] == "teacher"], x)
    with rc_context({"font.size": 14}), drawing(path, (10.5, 6.2)) as (_, axes):
        for name, points in drawn.items():
            points.sort(key=lambda row: row[x])
            bars = _bars(points) if points[0]["role"] == "student" else None
            at, fid = [row[x] for row in points], [row["fid"] for row in points]
            axes.errorbar(at, fid, bars, label=plain(name), capsize=3, elinewidth=1, **look[name])
        if front:
            at, fid = [row[x] for row in front], [row["fid"] for row in front]
            axes.plot(at, fid, color="#111111", linewidth=3.5, zorder=2.5, label="best training-free")
        if floor is not None:
            axes.axhline(floor, color="#888888", linestyle="--", linewidth=1, label="floor: fresh real images")
        axes.set(xscale="log", yscale="log", xlabel=label, ylabel=f"{distance} ({rows[0]['images']:,} images)")
        if x == "nfe":
            largest = max(row[x] for row in rows)
            ticks = [2**i for i in range(13) if 2**i <= largest]
            axes.set_xticks(ticks, [str(tick) for tick in ticks])
            axes.minorticks_off()
        axes.yaxis.set_major_formatter("{x:g}")
        axes.grid(True, which="both", alpha=0.25)
        handles, names = axes.get_legend_handles_labels()
        lines = [handle[0] if isinstance(handle, tuple) else handle for handle in handles]  # without their error bars
        axes.legend(lines, names, fontsize=12, loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, handlelength=2.5)


def _bars(points: list[dict]) -> list[list[float]]:
    low = [max(0, row["fid"] - row["fid_interval"][0]) for row in points]
    return [low, [row["fid_interval"][1] - row["fid"] for row in points]]


def plain(text: str) -> str:
    """Return text that matplotlib draws as it is: its mathematics is off, and a name that it would hide is shown."""
    return text.replace("$", r"\$").replace("\n", " ") if not text.startswith("_") else plain("\u200b" + text)


def label_shares(rows: list[dict], path: Path) -> None:
    """Plot a heat map: images that the extractor assigns to each class, divided by the images requested of it, per cell."""
    shares = [[seen / max(1, asked) for seen, asked in zip(r["labels_seen"], r["labels_asked"], strict=True)] for r in rows]
    with drawing(path, (7.5, 1 + 0.24 * len(rows))) as (figure, axes):
        reach = min(0.5, max(0.05, *(abs(share - 1) for row in shares for share in row)))
        heat = axes.imshow(shares, vmin=1 - reach, vmax=1 + reach, cmap="RdBu", aspect="auto")
        axes.set_yticks(range(len(rows)), [plain(row["name"]) for row in rows], fontsize=7)
        axes.set_xlabel("class")
        figure.colorbar(heat, label="recognised / requested")
