"""report.html: one file that opens offline, on wide screens and on phones."""

from __future__ import annotations

import base64
import html
from pathlib import Path

from eval.verdict import pareto
from eval.table import COLUMNS, NOTES, facts, text, used_columns

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
.warning { border-left: 4px solid #e0a000; padding: .1rem .8rem; margin: .4rem 0; }
tr.error td { color: var(--accent); }
dl { display: grid; grid-template-columns: minmax(8rem, max-content) 1fr; gap: .1rem 1rem; font-size: .85rem; }
dt { opacity: .7; } dd { margin: 0; overflow-wrap: anywhere; }
"""


def page(report: dict, folder: Path) -> str:
    """The whole page; ``folder`` holds its pictures, which go into it."""

    def image(name: str, alt: str) -> str:
        path = folder / name
        if not path.is_file():
            return ""
        return f'<img alt="{alt}" src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}">'

    def section(name: str, title: str, words: str) -> str:
        picture = image(name, title)
        return f"<h2>{title}</h2><p>{words}</p><div class='scroll'>{picture}</div>\n" if picture else ""

    used = used_columns(report)
    front = {row["name"] for row in pareto(report["rows"], "nfe")}
    head = "".join(f"<th>{html.escape(COLUMNS[c])}</th>" for c in used)
    body = ""
    for row in report["rows"]:
        kinds = [row["role"], "error" if "error" in row else "", "front" if row["name"] in front else ""]
        cells = "".join(f"<td>{html.escape(text(row, c))}</td>" for c in used)
        body += f'<tr class="{" ".join(filter(None, kinds))}">{cells}</tr>\n'
    known = "".join(f"<dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd>" for k, v in facts(report))
    notes = "".join(f"<dt>{html.escape(COLUMNS[c])}</dt><dd>{html.escape(NOTES[c])}</dd>" for c in used if c in NOTES)
    warned = "".join(f'<p class="warning">{html.escape(warning)}</p>' for warning in report["warnings"])
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(report["title"])}</title><style>{STYLE}</style></head><body>
<h1>{html.escape(report["title"])}</h1>
<p class="verdict">{html.escape(report["verdict"])}</p>
{warned}
<div class="plots">{image("fid_vs_nfe.png", "FID against NFE")}{image("fid_vs_seconds.png", "FID against seconds per image")}</div>
<h2>Samples</h2><p>Rows: step counts. Columns: the same starting noise and label.</p>
<div class="samples scroll">{image("samples.png", "samples by step count")}</div>
<h2>All cells</h2><p>A star marks the Pareto front of NFE and FID.</p>
<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>
{body}</tbody></table></div>
<dl>{notes}</dl>
{section("labels.png", "Classes", "Images of each class that the extractor sees, over those asked for.")}<h2>Protocol</h2><dl>{known}</dl>
</body></html>
"""
