"""The report of a run: report.json, report.csv, report.md and report.html (one file, opens offline), and its pictures."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from distill.checkpoint import write_json, write_text
from eval.verdict import good, reference_row, verdict, warnings, with_comparisons
from eval.metrics import Reference
from eval.page import page
from eval.plots import fid_against, label_shares
from eval.sheet import sample_grid
from eval.sweep import picture_path, pictures
from eval.table import COLUMNS, NOTES, facts, text, used_columns

SCHEMA = "fewstep-report/2"  # report.schema.json, beside this file, says what it holds


def build(title: str, rows: list[dict], protocol: dict, reference: Reference, run: dict, cells: Path) -> dict:
    """The report as plain data. ``run``: what the run wants to say of itself (command, training, versions); ``cells`` holds
    the finished cells with their pictures."""
    rows = with_comparisons(rows, {row["name"]: pictures(picture_path(cells, row["name"])) for row in good(rows)})
    return assemble(title, rows, protocol, reference.floor(protocol["images"]), reference.dimension, run)


def assemble(title: str, rows: list[dict], protocol: dict, floor: float | None, dimension: int, run: dict) -> dict:
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
    """Writes every form of the report into ``folder``; ``cells`` holds the finished cells with their pictures."""
    if rows := good(report["rows"]):
        fid_against(rows, "nfe", "network evaluations per image (NFE)", folder / "fid_vs_nfe.png", report["floor"])
        fid_against(rows, "seconds_per_image", "seconds per image", folder / "fid_vs_seconds.png", report["floor"])
        sample_grid(
            [(_label(row), pictures(picture_path(cells, row["name"]))) for row in _pictured(rows)], folder / "samples.png"
        )
        if any("labels_seen" in row for row in rows):
            label_shares([row for row in rows if "labels_seen" in row], folder / "labels.png")
    write_json(folder / "report.json", report)
    write_text(folder / "report.csv", _csv(report["rows"]))
    write_text(folder / "report.md", _markdown(report))
    write_text(folder / "report.html", page(report, folder))


def _pictured(rows: list[dict]) -> list[dict]:
    """The teacher at its most DDIM steps on top, then the students from many steps to few."""
    top = reference_row(rows)
    students = sorted((row for row in rows if row["role"] == "student"), key=lambda row: -row["steps"])
    return ([top] if top else []) + (students or [row for row in rows if row is not top])


def _label(row: dict) -> str:
    return f"{row['role']} {row['steps']} steps{' searched' if row['times'] else ''}"


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
    lines += ["", "![FID against NFE](fid_vs_nfe.png)", ""]
    lines += ["| " + " | ".join(COLUMNS[c] for c in used) + " |", "|" + "---|" * len(used)]
    lines += ["| " + " | ".join(text(row, c) for c in used) + " |" for row in report["rows"]]
    lines += ["", *(f"- {COLUMNS[c]}: {NOTES[c]}" for c in used if c in NOTES)]
    lines += ["", "![samples](samples.png)", "", "## Protocol", ""]
    lines += [f"- {name}: {value}" for name, value in facts(report)]
    return "\n".join(lines) + "\n"
