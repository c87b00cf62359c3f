"""Pictures of a report: FID against cost, and which classes were made."""

from __future__ import annotations

from pathlib import Path

from distill.checkpoint import replacing
from eval.verdict import pareto

COLOURS = ["#d62728", "#1f77b4", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf"]
GREYS = ["#222222", "#555555", "#777777", "#999999", "#b0b0b0", "#c8c8c8"]
MARKERS = "osD^vP"


def fid_against(rows: list[dict], x: str, label: str, path: Path, floor: float | None = None) -> None:
    """Log-log FID against ``rows[..][x]`` with intervals: students in colour, the teacher's samplers in grey, the Pareto front
    ringed, the real-against-real floor dashed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7.5, 4.8), dpi=130)
    colours = {"student": iter(COLOURS * 9), "teacher": iter(GREYS * 9)}
    curves: dict[tuple[str, str], list[dict]] = {}
    for row in rows:
        name = "student" if row["role"] == "student" else f"teacher, {row['sampler']}"
        curves.setdefault((row["role"], name), []).append(row)
    for (role, name), points in sorted(curves.items(), key=lambda item: item[0][0]):
        points.sort(key=lambda row: row[x])
        fid = [row["fid"] for row in points]
        error = [
            [max(0, row["fid"] - row["fid_interval"][0]) for row in points],
            [row["fid_interval"][1] - row["fid"] for row in points],
        ]
        front = role == "student"
        axes.errorbar(
            [row[x] for row in points], fid, error, label=name, color=next(colours[role]), marker=MARKERS[len(curves) % 6] if front else ".",
            linewidth=2.2 if front else 1.1, capsize=2, zorder=3 if front else 2,
        )  # fmt: skip
    front_rows = pareto(rows, x)
    axes.scatter(
        [r[x] for r in front_rows],
        [r["fid"] for r in front_rows],
        s=110,
        facecolors="none",
        edgecolors="#e0a000",
        zorder=4,
        label="Pareto front",
    )
    if floor is not None:
        axes.axhline(floor, color="#888888", linestyle="--", linewidth=0.9, label="real against real")
    axes.set(xscale="log", yscale="log", xlabel=label, ylabel=f"FID ({rows[0]['images']:,} images)" if rows else "FID")
    if x == "nfe":
        ticks = sorted({round(row[x]) for row in rows})
        axes.set_xticks(ticks, [str(tick) for tick in ticks], fontsize=7)
        axes.minorticks_off()
    axes.grid(True, which="both", alpha=0.25)
    axes.legend(fontsize=7)
    figure.tight_layout()
    with replacing(path) as aside:
        figure.savefig(aside, format="png")
    plt.close(figure)


def label_shares(rows: list[dict], path: Path) -> None:
    """A heat map: how many images of each class the extractor sees in each cell, over how many were asked for."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shares = [[seen / max(1, asked) for seen, asked in zip(r["labels_seen"], r["labels_asked"], strict=True)] for r in rows]
    figure, axes = plt.subplots(figsize=(7.5, 1 + 0.24 * len(rows)), dpi=130)
    image = axes.imshow(shares, vmin=0.5, vmax=1.5, cmap="RdBu", aspect="auto")
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows], fontsize=7)
    axes.set_xlabel("class")
    figure.colorbar(image, label="seen / asked for")
    figure.tight_layout()
    with replacing(path) as aside:
        figure.savefig(aside, format="png")
    plt.close(figure)
