"""The charts of a report's page: FID against cost, paired differences, power spectra and training losses."""

from __future__ import annotations

import json
import math
from html import escape
from itertools import chain
from pathlib import Path
from statistics import median

from torch import Tensor

from distill import files
from eval.cells import picture_path
from eval.columns import plural, text
from eval.html_page import figure
from eval.series import curves, series
from eval.spectrum import power
from eval.svg import MARKERS, Axis, Curve, Point, chart, look
from eval.verdict import at_its_scale, good, pareto, reference_row

SPECTRA = 8  # curves of power spectra that one can tell apart


def plots(rows: list[dict], floor: float | None, note: str, folder: Path, cells: Path) -> str:
    """Return the charts of a page. ``note``: what the floor is. ``folder``: of metrics.jsonl. ``cells``: of the rows' images."""
    measured = good(rows)
    if not measured:
        return ""
    axis = Axis("network evaluations per image (NFE)", ticks=[2**i for i in range(13)])
    free = "Bold: the best training-free samplers. Thin: single samplers. Bars are 95 % intervals; at the lower edge they are cut. "
    free += "Points link to their rows."
    out = figure(
        fid_chart(measured, "nfe", axis, floor),
        free,
        f"FID against network evaluations ({measured[0]['images']:,} images)",
    )
    out += figure(
        paired_chart(measured, axis),
        "Below 0 the student is better. Bars are 95 % intervals of the paired difference, in which the shared noise cancels. The axis is "
        "linear near 0.",
        "Student − best free sampler at equal NFE",
    )
    out += figure(
        fid_chart(measured, "seconds_per_image", Axis("milliseconds per image"), floor),
        "Median over the rounds of timing on the named machine. Ranges are in the table.",
        "FID against time",
    )
    out += figure(
        spectrum_chart(measured, cells),
        "Of each row's kept images (at most 256) about their mean, against those of the reference row of the same guidance from the same "
        "noise. Below 1 this frequency is too weak.",
        "Power spectrum: student over reference",
    )
    out += figure(
        training_chart(folder / "metrics.jsonl"),
        "One curve per phase. The targets of phases differ: compare only within one curve.",
        "Training loss",
    )
    return f'<div class="plots">{out}</div>\n' + (f'<p class="note">{escape(note)}</p>\n' if note else "")


def fid_chart(rows: list[dict], x: str, axis: Axis, floor: float | None) -> str:
    """Return the chart of FID against ``rows[..][x]``: samplers thin, their Pareto front bold, one colour and marker per student."""
    teachers = [row for row in rows if row["role"] == "teacher"]
    single = len({row["model"] for row in teachers}) == 1
    front = [_point(row, x) for row in pareto(teachers, x)]
    samplers, students = list[Curve](), list[Curve]()
    for name, points in curves(rows).items():
        drawn = [_point(row, x) for row in sorted(points, key=lambda row: row[x])]
        if points[0]["role"] == "student":
            students.append(Curve(_short(name), drawn, *look(len(students))))
        else:
            label = name.removeprefix(f"{points[0]['model']}, ") if single else name
            samplers.append(Curve(_short(label), drawn, "thin", len(samplers) % len(MARKERS)))
    best = [Curve("best training-free", front, "envelope")] if front else []
    rules = [] if floor is None else [(floor, "floor: fresh real images")]
    return chart(f"FID against {axis.label}", [*samplers, *best, *students], axis, Axis("FID"), rules)


def paired_chart(rows: list[dict], axis: Axis) -> str:
    """Return the chart of each student's paired difference from the best free sampler of as many evaluations."""
    halves = [(row["paired_interval"][1] - row["paired_interval"][0]) / 2 for row in rows if "paired_interval" in row]
    if not halves:
        return ""
    students = {name: own for name, own in curves(rows).items() if own[0]["role"] == "student"}
    drawn = []
    for i, (name, own) in enumerate(students.items()):
        points = [
            Point(row["nfe"], row["paired_difference"], row["paired_interval"], _tip(row), row["id"])
            for row in sorted(own, key=lambda row: row["nfe"])
            if "paired_difference" in row
        ]
        drawn.append(Curve(_short(name), points, *look(i)))
    unit = 10 ** math.floor(math.log10(max(median(halves), 1e-9)))
    return chart("paired difference", drawn, axis, Axis("difference of FID", "symlog", unit), [(0.0, "equal")])


def spectrum_chart(rows: list[dict], cells: Path) -> str:
    """Return the chart of student rows' power spectra over that of the reference row of their scale, where images of both are kept.

    Of more than `SPECTRA` rows, each student's lowest and highest step count are drawn, or its lowest alone.
    """
    models = [sorted(own, key=lambda row: row["steps"]) for own in curves(rows).values() if own[0]["role"] == "student"]
    several, drawn, count = len(models) > 1, list[Curve](), sum(map(len, models))
    if count > SPECTRA:
        models = [own[:: max(1, len(own) - 1)] if 2 * len(models) <= SPECTRA else own[:1] for own in models]
    for row in chain(*models):
        top = reference_row(at_its_scale(row, rows))
        whole, own = (None if one is None else _spectrum(one, cells) for one in (top, row))
        if whole is None or own is None or own.shape != whole.shape or not (whole > 0).all():
            continue
        steps = plural(row["steps"], "step")
        name = f"{series(row)}, {steps}" if several else steps
        ratios = enumerate((own / whole).tolist())
        points = [Point(k, ratio, tip=f"{name}: {ratio:.3f} at {k} cycles", link=row.get("id", "")) for k, ratio in ratios]
        label = f"{_short(series(row), 18 - len(steps))}, {steps}" if several else steps
        drawn.append(Curve(label, points, *look(len(drawn))))
    axis = Axis("cycles per shorter side", "linear")
    return chart("power spectrum", drawn, axis, Axis("ratio of power", "linear"), [(1.0, "equal")])


def _spectrum(row: dict, cells: Path) -> Tensor | None:
    """Return the power of a row's kept images about their mean image, by frequency."""
    if not (path := picture_path(cells, row.get("same_as", row["name"]))).is_file():
        return None
    x = files.load(path)[0]["images"].double()
    return power(x - x.mean(0))


def training_chart(path: Path) -> str:
    """Return the chart of the losses in metrics.jsonl, one curve per phase, or nothing without the file. Torn lines are left out."""
    phases: dict[str, list[Point]] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            entry = json.loads(line)
            tip = f"{entry['phase']}: loss {entry['loss']:.3g} at {entry['images']:,} images"
            phases.setdefault(str(entry["phase"]), []).append(Point(entry["images"], entry["loss"], tip=tip))
        except (ValueError, KeyError, TypeError):
            continue
    drawn = [Curve(_short(name), points, look(i)[0]) for i, (name, points) in enumerate(phases.items())]
    return chart("training loss", drawn, Axis("training images", "linear"), Axis("loss"))


def _point(row: dict, x: str) -> Point:
    return Point(
        row[x] * (1000 if x == "seconds_per_image" else 1), row["fid"], row["fid_interval"], _tip(row), row.get("id", "")
    )


def _tip(row: dict) -> str:
    low, high = row["fid_interval"]
    out = f"{row['name']}: FID {row['fid']:.3f} (95 %: {low:.3f} – {high:.3f}), NFE {row['nfe']:g}"
    if "paired_difference" in row:
        out += f"; {text(row, 'paired_difference')} against {row['paired_with']}"
    return f"{out}; {text(row, 'seconds_per_image')} ms per image"


def _short(name: str, longest: int = 19) -> str:
    """Return the name with its middle cut out if it is longer: names of one page often differ at their end alone."""
    kept = (longest - 1) // 2
    return name if len(name) <= longest else f"{name[:kept]}…{name[-kept:]}"
