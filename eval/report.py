"""The report of a run: report.json, report.csv, report.md, report.html (one file that opens offline), and its pictures."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from distill.files import write_json, write_text
from eval.columns import COLUMNS, FLOOR_NOTE, NOTES, facts, plural, text, used_columns
from eval.html_page import page
from eval.image_grid import sample_grid
from eval.metrics import Reference
from eval.plots import fid_against, label_shares
from eval.sweep import picture_path, pictures
from eval.verdict import good, reference_row, verdict, warnings, with_comparisons

SCHEMA = "fewstep-report/2"  # described by report.schema.json in this folder


def build(title: str, rows: list[dict], protocol: dict, reference: Reference, run: dict, cells: Path) -> dict:
    """Return the report of a sweep as JSON data.

    ``run``: facts of the run, such as command, training time and versions. ``cells``: folder of the finished cells.
    """
    rows = with_comparisons(rows, {row["name"]: pictures(picture_path(cells, row["name"])) for row in good(rows)})
    return assemble(title, rows, protocol, reference.floor(protocol["images"]), reference.dimension, run)


def assemble(title: str, rows: list[dict], protocol: dict, floor: float | None, dimension: int, run: dict) -> dict:
    """Return the report of rows that have their comparisons already. ``dimension``: number of features."""
    baseline = reference_row(rows)
    return {
        "schema": SCHEMA,
        "title": title,
        "verdict": verdict(rows),
        "warnings": warnings(rows, protocol, dimension),
        "protocol": protocol,
        "feature_dimension": dimension,
        "floor": floor,
        "baseline": None if baseline is None else baseline["name"],
        "run": run,
        "rows": rows,
    }


def write(report: dict, folder: Path, cells: Path) -> None:
    """Write every form of the report into ``folder``. ``cells``: folder of the finished cells with their pictures."""
    if rows := good(report["rows"]):
        fid_against(rows, "nfe", "network evaluations per image (NFE)", folder / "fid_vs_nfe.png", report["floor"])
        fid_against(rows, "seconds_per_image", "seconds per image", folder / "fid_vs_seconds.png", report["floor"])
        shown = [(_label(row), pictures(picture_path(cells, row["name"]))) for row in _pictured(rows)]
        sample_grid(shown, folder / "samples.png")
        if labelled := [row for row in rows if "labels_seen" in row]:
            label_shares(labelled, folder / "labels.png")
    write_json(folder / "report.json", report)
    write_text(folder / "report.csv", _csv(report["rows"]))
    write_text(folder / "report.md", _markdown(report))
    write_text(folder / "report.html", page(report, folder))


def _pictured(rows: list[dict]) -> list[dict]:
    """Return the teacher at its largest number of DDIM steps, then the students from many steps to few."""
    top = reference_row(rows)
    students = sorted((row for row in rows if row["role"] == "student"), key=lambda row: -row["steps"])
    return ([top] if top else []) + (students or [row for row in rows if row is not top])


def _label(row: dict) -> str:
    return f"{row['role']} {plural(row['steps'], 'step')}{' searched' if row['times'] else ''}"


def _csv(rows: list[dict]) -> str:
    out = io.StringIO()
    names = [name for name in COLUMNS if name != "fid_interval"]
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*names, "fid_low", "fid_high", "error"])
    for row in rows:
        writer.writerow([row.get(n, "") for n in names] + list(row.get("fid_interval", ["", ""])) + [row.get("error", "")])
    return out.getvalue()


def _markdown(report: dict) -> str:
    used = used_columns(report)
    lines = [f"# {report['title']}", "", report["verdict"], "", *(f"> {warning}" for warning in report["warnings"])]
    lines += ["", "![FID against NFE](fid_vs_nfe.png)", "", *([] if report["floor"] is None else [FLOOR_NOTE, ""])]
    lines += ["| " + " | ".join(COLUMNS[c] for c in used) + " |", "|" + "---|" * len(used)]
    lines += ["| " + " | ".join(text(row, c) for c in used) + " |" for row in report["rows"]]
    lines += ["", *(f"- {COLUMNS[c]}: {NOTES[c]}" for c in used if c in NOTES)]
    lines += ["", "![samples](samples.png)", "", "## Protocol", ""]
    lines += [f"- {name}: {value}" for name, value in facts(report)]
    return "\n".join(lines) + "\n"
