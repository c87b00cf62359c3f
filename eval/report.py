"""The report of a run: report.json, report.csv, report.md, report.html (one file that opens offline), and its pictures."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from distill.files import write_json, write_text
from eval.cells import picture_path, pictures
from eval.columns import COLUMNS, NOTES, facts, floor_note, plural, text, used_columns
from eval.image_grid import sample_grid
from eval.metrics import Reference
from eval.names import named
from eval.plots import fid_against, label_shares
from eval.report_page import page
from eval.series import curves, series
from eval.verdict import good, headline, reference_row, verdict, warnings, with_comparisons

SCHEMA = "fewstep-report/2"  # described by report.schema.json in this folder


def build(title: str, rows: list[dict], protocol: dict, reference: Reference, run: dict, cells: Path) -> dict:
    """Return the report of a sweep as JSON data.

    ``run``: facts of the run, such as command, training time and versions. ``cells``: folder of the finished cells.
    """
    rows = with_comparisons(rows, {row["name"]: pictures_of(row, cells) for row in good(rows)})
    return assemble(title, rows, protocol, reference.floor(protocol["images"]), reference.dimension, run)


def assemble(title: str, rows: list[dict], protocol: dict, floor: float | None, dimension: int, run: dict) -> dict:
    """Return the report of rows that have their comparisons already. ``dimension``: number of features."""
    baseline, distance = reference_row(rows), protocol.get("distance")
    return {
        "schema": SCHEMA,
        "title": named(title, distance),
        "headline": named(headline(rows), distance),
        "verdict": named(verdict(rows), distance),
        "warnings": [named(warning, distance) for warning in warnings(rows, protocol, dimension)],
        "protocol": protocol,
        "feature_dimension": dimension,
        "floor": floor,
        "baseline": None if baseline is None else baseline["name"],
        "run": run,
        "rows": rows,
    }


def pictures_of(row: dict, cells: Path) -> Tensor:
    """Load the first images of a row, which are those of the cell that it shares its measurement with, if it does."""
    return pictures(picture_path(cells, row.get("same_as", row["name"])))


def write(report: dict, folder: Path, cells: Path, prompts: Sequence[str] = ()) -> None:
    """Write every form of the report into ``folder``. ``cells``: folder of the finished cells with their pictures.

    ``prompts``: those of the first images of every cell, for a picture with a row for each of them and a column for each step count.
    """
    distance = report["protocol"].get("distance")
    if rows := good(report["rows"]):
        name = named("FID", distance)
        fid_against(rows, "nfe", "network evaluations per image (NFE)", folder / "fid_vs_nfe.png", report["floor"], name)
        fid_against(rows, "seconds_per_image", "seconds per image", folder / "fid_vs_seconds.png", report["floor"], name)
        shown = [(_label(row), pictures_of(row, cells)) for row in _pictured(rows)]
        sample_grid(shown, folder / "samples.png")
        if prompts:
            by_prompt = [(text, torch.stack([images[i] for _, images in shown])) for i, text in enumerate(prompts)]
            sample_grid(by_prompt, folder / "prompts.png", len(shown), [label for label, _ in shown])
        if labelled := [row for row in rows if "labels_seen" in row]:
            label_shares(labelled, folder / "labels.png")
    write_json(folder / "report.json", report)
    write_text(folder / "report.csv", _csv(report["rows"]))
    write_text(folder / "report.md", named(_markdown(report), distance))
    write_text(folder / "report.html", named(page(report, folder, cells), distance))


def _pictured(rows: list[dict]) -> list[dict]:
    """Return the teacher at its largest number of DDIM steps, then each student from many steps to few."""
    top = reference_row(rows)
    grouped = curves([row for row in rows if row["role"] == "student"]).values()
    students = [row for group in grouped for row in sorted(group, key=lambda row: -row["steps"])]
    return ([top] if top else []) + (students or [row for row in rows if row is not top and "same_as" not in row])


def _label(row: dict) -> str:
    return f"{series(row)} {plural(row['steps'], 'step')}"


def _csv(rows: list[dict]) -> str:
    out = io.StringIO()
    intervals = {"fid_interval": "fid", "seconds_interval": "seconds", "paired_interval": "paired"}
    names = [name for name in COLUMNS if name not in intervals]
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*names, *(f"{name}_{end}" for name in intervals.values() for end in ("low", "high")), "error"])
    for row in rows:
        ends = [end for name in intervals for end in row.get(name, ["", ""])]
        writer.writerow([*(row.get(name, "") for name in names), *ends, row.get("error", "")])
    return out.getvalue()


def _markdown(report: dict) -> str:
    used = used_columns(report)
    lines = [f"# {_literal(report['title'])}", "", _literal(report["verdict"]), ""]
    lines += [f"> {_literal(warning)}" for warning in report["warnings"]]
    lines += ["", "![FID against NFE](fid_vs_nfe.png)", "", *([note, ""] if (note := floor_note(report)) else [])]
    lines += ["| " + " | ".join(COLUMNS[c] for c in used) + " |", "|" + "---|" * len(used)]
    lines += ["| " + " | ".join(_literal(text(row, c)) for c in used) + " |" for row in report["rows"]]
    lines += ["", *(f"- {COLUMNS[c]}: {NOTES[c]}" for c in used if c in NOTES)]
    lines += ["", "![samples](samples.png)", "", "## Protocol", ""]
    lines += [f"- {_literal(name)}: {_literal(value)}" for name, value in facts(report)]
    return "\n".join(lines) + "\n"


def _literal(text: str) -> str:
    """Return text that Markdown shows as it is, in one line and one cell of a table."""
    return " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")
