"""The report of a run: report.json, report.csv, report.md and report.html (one file, opens offline), and its pictures."""

from __future__ import annotations

import base64
import csv
import html
import io
from pathlib import Path

from distill.checkpoint import write_json, write_text
from eval.metrics import T_975, paired_difference
from eval.plots import fid_against, pareto, sample_grid
from eval.sweep import pictures

SCHEMA = "fewstep-report/1"

COLUMNS = {
    "model": "model",
    "sampler": "sampler",
    "grid": "grid",
    "steps": "steps",
    "nfe": "NFE",
    "fid": "FID",
    "fid_interval": "95 % interval",
    "fid_infinity": "FID at infinite n",
    "ratio": "FID / teacher",
    "kid": "KID x1000",
    "isc": "IS",
    "precision": "precision",
    "recall": "recall",
    "agreement": "class agreement",
    "seconds_per_image": "ms/image",
}


def build(title: str, rows: list[dict], protocol: dict, floor: float | None, run: dict) -> dict:
    """The report as plain data. ``run``: what the run wants to say of itself (command, training, versions)."""
    baseline = reference_row(rows)
    if baseline is not None:
        rows = [row if "error" in row else row | {"ratio": row["fid"] / baseline["fid"]} for row in rows]
    return {
        "schema": SCHEMA,
        "title": title,
        "verdict": verdict(rows),
        "protocol": protocol,
        "floor": floor,
        "baseline": None if baseline is None else baseline["name"],
        "run": run,
        "rows": rows,
    }


def reference_row(rows: list[dict]) -> dict | None:
    """The teacher at its most DDIM steps, against which students are compared; None where it was not measured."""
    ddim = [row for row in rows if row["role"] == "teacher" and row["sampler"] == "ddim" and "error" not in row]
    return max(ddim, key=lambda row: row["steps"], default=None)


def verdict(rows: list[dict]) -> str:
    """One sentence: up to how many NFE the student is the better choice, and what the teacher needs to match it."""
    good = [row for row in rows if "error" not in row]
    students = sorted((row for row in good if row["role"] == "student"), key=lambda row: row["nfe"])
    teachers = [row for row in good if row["role"] == "teacher"]
    if not students or not teachers:
        return "There is nothing to compare: the sweep holds no student or no teacher."
    wins = [(row, rival) for row in students if (rival := _best_rival(row, teachers)) and _is_better(row, rival)]
    if not wins:
        return "No student beats the teacher's best training-free sampler at the same number of network evaluations."
    last, nearest = wins[-1]
    matching = sorted((t for t in teachers if t["fid"] <= last["fid"]), key=lambda t: t["nfe"])
    difference, error = paired_difference(last, nearest)
    equal = f"{matching[0]['sampler']} needs {matching[0]['nfe']:.0f}" if matching else "no sampler in this sweep reaches it"
    return (
        f"Up to {last['nfe']:.0f} network evaluations use the student: at {last['nfe']:.0f} its FID of {last['fid']:.3f} is below "
        f"the {nearest['fid']:.3f} of the best training-free sampler ({nearest['sampler']}) "
        f"by {-difference:.3f} +- {T_975 * error:.3f}, and {equal}."
    )


def _best_rival(row: dict, teachers: list[dict]) -> dict | None:
    """The teacher's best sampler that costs no more network evaluations."""
    return min((t for t in teachers if t["nfe"] <= row["nfe"]), key=lambda t: t["fid"], default=None)


def _is_better(row: dict, rival: dict) -> bool:
    """By more than the 95 % interval of the difference."""
    difference, error = paired_difference(row, rival)
    return difference < -T_975 * error


def write(report: dict, folder: Path, cells: Path) -> None:
    """Writes every form of the report into ``folder``; ``cells`` holds the finished cells with their pictures."""
    good = [row for row in report["rows"] if "error" not in row]
    if good:
        fid_against(good, "nfe", "network evaluations per image (NFE)", folder / "fid_vs_nfe.png", report["floor"])
        fid_against(good, "seconds_per_image", "seconds per image", folder / "fid_vs_seconds.png", report["floor"])
        sample_grid([(_label(row), pictures(cells, row)) for row in _pictured(good)], folder / "samples.png")
    write_json(folder / "report.json", report)
    write_text(folder / "report.csv", _csv(report["rows"]))
    write_text(folder / "report.md", _markdown(report))
    write_text(folder / "report.html", _html(report, folder))


def _pictured(rows: list[dict]) -> list[dict]:
    """The teacher at its most DDIM steps on top, then the students from many steps to few."""
    top = reference_row(rows)
    students = sorted((row for row in rows if row["role"] == "student"), key=lambda row: -row["steps"])
    return ([top] if top else []) + (students or [row for row in rows if row is not top])


def _label(row: dict) -> str:
    return f"{row['role']} {row['steps']} steps"


def _text(row: dict, column: str) -> str:
    value = row.get(column)
    if "error" in row and column == "fid":
        return row["error"]
    if value is None:
        return ""
    match column:
        case "fid_interval":
            return f"{value[0]:.3f} - {value[1]:.3f}"
        case "kid":
            return f"{1000 * value:.2f}"
        case "seconds_per_image":
            return f"{1000 * value:.2f}"
        case "nfe":
            return f"{value:g}"
        case "fid" | "fid_infinity" | "ratio" | "precision" | "recall" | "agreement" | "isc":
            return f"{value:.3f}"
    return str(value)


def _csv(rows: list[dict]) -> str:
    out = io.StringIO()
    names = [name for name in COLUMNS if name != "fid_interval"]
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*names, "fid_low", "fid_high", "error"])
    for row in rows:
        writer.writerow([row.get(n, "") for n in names] + list(row.get("fid_interval", ["", ""])) + [row.get("error", "")])
    return out.getvalue()


def _facts(report: dict) -> list[tuple[str, str]]:
    floor = "" if report["floor"] is None else f"{report['floor']:.4f}"
    facts = [("FID of fresh real images at this n (floor)", floor), ("ratios are against", report["baseline"] or "")]
    return facts + [(k, str(v)) for k, v in {**report["protocol"], **report["run"]}.items()]


def _markdown(report: dict) -> str:
    used = _used(report)
    lines = [f"# {report['title']}", "", report["verdict"], "", "![FID against NFE](fid_vs_nfe.png)", ""]
    lines += ["| " + " | ".join(COLUMNS[c] for c in used) + " |", "|" + "---|" * len(used)]
    lines += ["| " + " | ".join(_text(row, c) for c in used) + " |" for row in report["rows"]]
    lines += ["", "![samples](samples.png)", "", "## Protocol", ""]
    lines += [f"- {name}: {value}" for name, value in _facts(report)]
    return "\n".join(lines) + "\n"


def _used(report: dict) -> list[str]:
    return [c for c in COLUMNS if any(row.get(c) is not None for row in report["rows"])]


STYLE = """
:root { color-scheme: light dark; --line: #8884; --accent: #d62728; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1080px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: .3rem; }
.verdict { font-size: 1.1rem; border-left: 4px solid var(--accent); padding: .2rem .8rem; margin: 1rem 0 1.5rem; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); gap: 1rem; }
img { max-width: 100%; height: auto; background: #fff; border-radius: 6px; }
.samples img { image-rendering: pixelated; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; white-space: nowrap; }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid var(--line); }
th:nth-child(-n+2), td:nth-child(-n+2) { text-align: left; }
tr.student td { font-weight: 600; } tr.front td:first-child::after { content: " \\2605"; color: #e0a000; }
tr.error td { color: var(--accent); }
dl { display: grid; grid-template-columns: minmax(8rem, max-content) 1fr; gap: .1rem 1rem; font-size: .85rem; }
dt { opacity: .7; } dd { margin: 0; overflow-wrap: anywhere; }
"""


def _html(report: dict, folder: Path) -> str:
    def image(name: str, alt: str) -> str:
        path = folder / name
        if not path.is_file():
            return ""
        return f'<img alt="{alt}" src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}">'

    used = _used(report)
    front = {row["name"] for row in pareto([r for r in report["rows"] if "error" not in r], "nfe")}
    head = "".join(f"<th>{html.escape(COLUMNS[c])}</th>" for c in used)
    body = ""
    for row in report["rows"]:
        kinds = [row["role"], "error" if "error" in row else "", "front" if row["name"] in front else ""]
        cells = "".join(f"<td>{html.escape(_text(row, c))}</td>" for c in used)
        body += f'<tr class="{" ".join(filter(None, kinds))}">{cells}</tr>\n'
    facts = "".join(f"<dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd>" for k, v in _facts(report))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(report["title"])}</title><style>{STYLE}</style></head><body>
<h1>{html.escape(report["title"])}</h1>
<p class="verdict">{html.escape(report["verdict"])}</p>
<div class="plots">{image("fid_vs_nfe.png", "FID against NFE")}{image("fid_vs_seconds.png", "FID against seconds per image")}</div>
<h2>Samples</h2><p>Rows: step counts. Columns: the same starting noise and label.</p>
<div class="samples scroll">{image("samples.png", "samples by step count")}</div>
<h2>All cells</h2><p>A star marks the Pareto front of NFE and FID.</p>
<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>
{body}</tbody></table></div>
<h2>Protocol</h2><dl>{facts}</dl>
</body></html>
"""
