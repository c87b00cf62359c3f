"""HTML pages in one file that open offline, on wide screens, on phones and on paper: the template of all pages of this project.

A page holds its own style (page.css), its own script (page.js) and its pictures. Its policy allows these by their sha256 and nothing else.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from eval.series import STUDENTS

HERE = Path(__file__).parent
STYLE = (HERE / "page.css").read_text(encoding="utf-8") + "".join(f".c{i} {{ --c: {c}; }}\n" for i, c in enumerate(STUDENTS))
SCRIPT = (HERE / "page.js").read_text(encoding="utf-8")


def _allowed(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


POLICY = (
    f"default-src 'none'; img-src data:; style-src {_allowed(STYLE)}; script-src {_allowed(SCRIPT)}; "
    "base-uri 'none'; form-action 'none'"
)


def document(title: str, verdict: str, body: str, headline: str = "") -> str:
    """Return a whole HTML page. ``title``, ``verdict`` and ``headline`` are plain text, ``body`` is HTML."""
    large = f'<p class="headline">{escape(headline)}</p>\n' if headline else ""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{escape(title)}</title><style>{STYLE}</style></head><body>
<h1>{escape(title)}</h1>
{large}<p class="verdict">{escape(verdict)}</p>
{body}
<script>{SCRIPT}</script></body></html>
"""


def inline(png: bytes) -> str:
    """Return a PNG as a data URI."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def picture(path: Path, alt: str) -> str:
    """Return an <img> that contains the PNG file, or nothing if there is no such file."""
    return f'<img class="paper" alt="{escape(alt)}" src="{inline(path.read_bytes())}">' if path.is_file() else ""


def figure(chart: str, caption: str, heading: str = "") -> str:
    """Return a <figure> of a chart with its plain-text caption, or nothing without a chart."""
    bold = f"<b>{escape(heading)}</b>" if heading else ""
    return f"<figure>{bold}{chart}<figcaption>{escape(caption)}</figcaption></figure>\n" if chart else ""


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], kinds: Sequence[str] = ()) -> str:
    """Return a table of plain text that can be sorted, in a box that scrolls. ``kinds``: the class of each row."""
    out = ""
    for i, row in enumerate(rows):
        first, *rest = (f'data-v="{escape(cell.replace(",", ""))}">{escape(cell)}' for cell in row)
        out += f'<tr class="{escape(kinds[i] if kinds else "")}"><th scope="row" {first}</th>'
        out += "".join(f"<td {cell}</td>" for cell in rest) + "</tr>\n"
    head = "".join(f'<th scope="col">{escape(h)}</th>' for h in heads)
    return f'<div class="cells scroll" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>\n{out}</tbody></table></div>\n'


def definitions(pairs: Iterable[tuple[str, str]]) -> str:
    """Return a list of names and values of plain text."""
    return "<dl>" + "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in pairs) + "</dl>"
