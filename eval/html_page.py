"""HTML pages in one file that open offline, on wide screens and on phones: the template, and the page of a report."""

from __future__ import annotations

import base64
import hashlib
from html import escape
from pathlib import Path

from eval.columns import COLUMNS, NOTES, facts, floor_note, plural, text, used_columns
from eval.verdict import pareto

STYLE = """
:root { color-scheme: light dark; --line: #8884; --accent: #d62728; --front: #e0a000; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1080px; margin: 2rem auto; padding: 0 1rem; overflow-wrap: break-word; }
h1 { font-size: 1.5rem; margin-bottom: .3rem; }
.verdict { font-size: 1.1rem; border-left: 4px solid var(--accent); padding: .2rem .8rem; margin: 1rem 0 1.5rem; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); gap: 1rem; }
img { max-width: 100%; height: auto; background: #fff; border-radius: 6px; }
.samples img { image-rendering: pixelated; }
.scroll { overflow-x: auto; } .wide img { min-width: 680px; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; white-space: nowrap; }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid var(--line); }
.cells :is(th, td):nth-child(-n+2) { text-align: left; }
tr.student td { font-weight: 600; } tr.front td:first-child::after { content: " \\2605"; color: var(--front); }
.warning { border-left: 4px solid var(--front); padding: .1rem .8rem; margin: .4rem 0; }
tr.error td { color: var(--accent); }
dl { display: grid; grid-template-columns: minmax(8rem, max-content) 1fr; gap: .1rem 1rem; font-size: .85rem; }
dt { opacity: .7; } dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 600px) { dl { grid-template-columns: 1fr; } dd { margin-bottom: .4rem; } }
"""
# a page may show its own pictures and use its own style, and nothing else: no script, no request, no form, no frame
POLICY = (
    f"default-src 'none'; img-src data:; style-src 'sha256-{base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()}'; "
    "base-uri 'none'; form-action 'none'"
)


def document(title: str, verdict: str, body: str) -> str:
    """Return a whole HTML page. ``title`` and ``verdict`` are plain text, ``body`` is HTML."""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{escape(title)}</title><style>{STYLE}</style></head><body>
<h1>{escape(title)}</h1>
<p class="verdict">{escape(verdict)}</p>
{body}
</body></html>
"""


def picture(path: Path, alt: str) -> str:
    """Return an <img> that contains the PNG file, or nothing if there is no such file."""
    if not path.is_file():
        return ""
    return f'<img alt="{escape(alt)}" src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}">'


def page(report: dict, folder: Path) -> str:
    """Return the page of a report. ``folder`` holds its pictures, which become part of the page."""
    used = used_columns(report)
    front = {row["name"] for row in pareto(report["rows"], "nfe")}
    rows = ""
    for row in report["rows"]:
        kinds = [row["role"], "error" if "error" in row else "", "front" if row["name"] in front else ""]
        cells = "".join(f"<td>{escape(text(row, c))}</td>" for c in used)
        rows += f'<tr class="{" ".join(filter(None, kinds))}">{cells}</tr>\n'
    head = "".join(f"<th>{escape(COLUMNS[c])}</th>" for c in used)
    classes = picture(folder / "labels.png", "images per class")
    if classes:
        classes = (
            "<h2>Classes</h2><p>Images that the feature extractor assigns to each class, divided by the images requested of it.</p>"
            f'<div class="wide scroll">{classes}</div>\n'
        )
    warned = "".join(f'<p class="warning">{escape(warning)}</p>\n' for warning in report["warnings"])
    floor = f"<p>{escape(note)}</p>\n" if (note := floor_note(report)) else ""
    same = sum("same_as" in row for row in report["rows"])
    shared = f" Measurements shared with a cell of equal arithmetic: {plural(same, 'row')}." if same else ""
    body = f"""{warned}<div class="plots">{picture(folder / "fid_vs_nfe.png", "FID against NFE")}
{picture(folder / "fid_vs_seconds.png", "FID against seconds per image")}</div>
{floor}<h2>Samples</h2><p>One row per model and step count. All images of a column have the same initial noise and label.</p>
<div class="samples scroll">{picture(folder / "samples.png", "samples by step count")}</div>
<h2>All measurements</h2><p>One row per model, sampler and step count. Students are bold.{escape(shared)} A star marks the
Pareto front of NFE and FID: no other row has both fewer evaluations and a lower FID.</p>
<div class="scroll"><table class="cells"><thead><tr>{head}</tr></thead><tbody>
{rows}</tbody></table></div>
{_definitions([(COLUMNS[c], NOTES[c]) for c in used if c in NOTES])}
{classes}<h2>Protocol</h2><p>Everything that the numbers depend on. Compare only numbers of the same protocol.</p>
{_definitions(facts(report))}"""
    return document(report["title"], report["verdict"], body)


def _definitions(pairs: list[tuple[str, str]]) -> str:
    return "<dl>" + "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in pairs) + "</dl>"
