"""The plot of a benchmark: every ratio with its noise floor and its target."""

from __future__ import annotations

from pathlib import Path

from eval.plots import drawing


def plot(rows: list[dict], path: Path) -> None:
    """Draw the ratios of ``rows``, one a line: a dot with the floor as its bar, and the target as a tick. No ratio, no file."""
    ratios = [row for row in rows if "ratio" in row][::-1]
    if not ratios:
        return
    with drawing(path, (8.5, 1.5 + 0.22 * len(ratios))) as (_, axes):
        places = range(len(ratios))
        missed = [row["wanted"] is not None and row["ratio"] > row["wanted"] for row in ratios]
        values, floors = [row["ratio"] for row in ratios], [row["floor"] for row in ratios]
        colours = ["#c0392b" if miss else "#2c6fbb" for miss in missed]
        axes.errorbar(values, places, xerr=floors, fmt="none", ecolor="#bbbbbb", zorder=1)
        axes.scatter(values, places, c=colours, s=22, zorder=2)
        targets = [(row["wanted"], place) for row, place in zip(ratios, places, strict=True) if row["wanted"] is not None]
        if targets:
            axes.scatter(*zip(*targets, strict=True), marker="|", c="black", s=70, label="target")
            axes.legend(loc="lower right", fontsize=7)
        axes.axvline(1, color="#888888", linewidth=0.8)
        axes.set_yticks(list(places), [row["name"] for row in ratios], fontsize=7)
        axes.set_xlabel("seconds, by bare passes or by the peer (grey: the same work by itself)")
