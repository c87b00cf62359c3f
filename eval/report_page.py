"""The page of a report: headline, charts, samples, table, training curves and protocol in one file."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path

from distill import files
from eval.cells import picture_path
from eval.columns import COLUMNS, NOTES, SHOWN, facts, floor_note, plural, text, used_columns
from eval.html_page import definitions, document, inline, picture
from eval.image_grid import strip
from eval.report_charts import plots
from eval.series import series
from eval.verdict import best_rival, good, pareto, reference_row

IMAGES = 12  # of a row
BUDGET = 1_500_000  # bytes of all images of a page
REAL = "real"  # name of the file of real images in the folder of cells
WORDS = ("model", "sampler", "grid", "paired_with", "same_as")


def page(report: dict, folder: Path, cells: Path) -> str:
    """Return the page of a report. ``folder`` holds labels.png, metrics.jsonl and report.csv, ``cells`` the images of the rows."""
    rows = [row | {"id": f"row{i}"} for i, row in enumerate(report["rows"])]
    report = report | {"rows": rows}
    strips = _strips(rows, cells)
    headline, verdict = report.get("headline", ""), report["verdict"]
    warned = "".join(f'<p class="warning">{escape(warning)}</p>\n' for warning in report["warnings"])
    body = (
        warned
        + plots(rows, report["floor"], floor_note(report), folder, cells)
        + _samples(rows, strips)
        + _table(report, strips)
    )
    body += _classes(folder) + _protocol(report, folder)
    return document(report["title"], verdict.removeprefix(headline).strip(), body, headline)


# samples


@dataclass(frozen=True)
class Strip:
    """Hold the images of one row as an <img>, and the id of that element."""

    id: str
    image: str
    heads: tuple[str, ...] = ()


def _strips(rows: list[dict], cells: Path) -> dict[str, Strip]:
    """Return the images of rows by name, those of the bands first, until they fill the page; ``REAL`` are real images."""
    names = [REAL, *(row["name"] for _, band in _bands(good(rows)) for row in band), *(row["name"] for row in good(rows))]
    same = {row["name"]: row["same_as"] for row in good(rows) if "same_as" in row}
    out: dict[str, Strip] = {}
    used = 0
    for name in dict.fromkeys(names):
        path = picture_path(cells, same.get(name, name))
        if name in out or not path.is_file():
            continue
        kept = files.load(path)[0]
        uri, labels = inline(strip(kept["images"], IMAGES)), kept.get("labels")
        used += len(uri)
        if used > BUDGET:
            break
        sharp = " pixels" if kept["images"].shape[-1] < 64 else ""
        image = f'<img class="strip{sharp}" id="strip{len(out)}" alt="{escape(name)}" src="{uri}">'
        heads = () if labels is None else tuple(map(str, labels.tolist()))
        out[name] = Strip(f"strip{len(out)}", image, heads)
    return out


def _bands(rows: list[dict]) -> Iterator[tuple[str, list[dict]]]:
    """Yield the teacher's reference, then for each number of evaluations the best free sampler and the students."""
    students = [row for row in rows if row["role"] == "student"]
    teachers = [row for row in rows if row["role"] == "teacher"]
    if (top := reference_row(rows)) is not None:
        yield "", [top]
    for nfe in sorted({row["nfe"] for row in students}):
        own = [row for row in students if row["nfe"] == nfe]
        rival = best_rival(own[0], teachers)
        yield plural(round(nfe), "network evaluation"), [*([] if rival is None else [rival]), *own]
    if not students:
        yield "", [row for row in rows if row is not top and "same_as" not in row]


def _samples(rows: list[dict], strips: dict[str, Strip]) -> str:
    if not strips:
        return ""
    heads = strips[REAL].heads if REAL in strips else ()
    out = f'<span></span><div class="heads">{"".join(f"<i>{escape(h)}</i>" for h in heads)}</div>' if heads else ""
    left = dict(strips)
    if REAL in left:
        out += f"<span>real images</span>{left.pop(REAL).image}"
    for heading, band in _bands(good(rows)):
        out += f"<h3>{heading}</h3>" if heading else ""
        for row in band:
            shown = left.pop(row["name"]).image if row["name"] in left else ""
            mine = ' class="mine"' if row["role"] == "student" else ""
            name = f"{series(row)} {plural(row['steps'], 'step')}"
            out += f"<span{mine}>{escape(name)}</span>{shown or '<span>as above</span>'}"
    rest = "".join(f"<span>{escape(name)}</span>{one.image}" for name, one in left.items())
    rest = (
        f'<details><summary>The images of every other row</summary><div class="bands">{rest}</div></details>\n' if rest else ""
    )
    real = " Real images share the label alone." if heads else ""
    return (
        f"<h2>Samples</h2><p>All generated images of a column have the same initial noise and label.{real} At each number of evaluations: "
        f'the best training-free sampler, then the student.</p>\n<div class="bands">{out}</div>\n'
        f"{rest}{_viewer(rows, strips)}"
    )


def _viewer(rows: list[dict], strips: dict[str, Strip]) -> str:
    """Return the slider between the images of two rows, which needs the script."""
    names = [name for name in strips if name != REAL]
    students = [row for row in good(rows) if row["role"] == "student" and row["name"] in names]
    if len(names) < 2:
        return ""
    top = reference_row(rows)
    first = top["name"] if top and top["name"] in names else names[0]
    second = min(students, key=lambda row: row["nfe"])["name"] if students else names[-1]

    def choice(side: str, chosen: str) -> str:
        options = "".join(
            f'<option value="{strips[name].id}"{" selected" if name == chosen else ""}>{escape(name)}</option>'
            for name in names
        )
        return f'<select aria-label="images on the {side}">{options}</select>'

    return (
        f'<div id="viewer" class="viewer tools" hidden>{choice("left", first)} against {choice("right", second)}'
        '<div class="wipe"><img alt=""><img alt=""></div>'
        '<input type="range" min="0" max="100" value="50" aria-label="position of the border between both"></div>\n'
    )


# table and texts


def _table(report: dict, strips: dict[str, Strip]) -> str:
    rows, used = report["rows"], used_columns(report)
    front = {row["name"] for row in pareto(rows, "nfe")}

    def classes(column: str) -> str:
        kinds = ("words" if column in WORDS else "", "" if column in SHOWN else "more")
        return " ".join(filter(None, kinds))

    body = ""
    for row in sorted(rows, key=lambda row: row["role"]):  # students first
        kinds = [row["role"], "error" if "error" in row else "", "front" if row["name"] in front else ""]
        link = f' data-strip="{strips[row["name"]].id}"' if row["name"] in strips else ""
        body += f'<tr id="{row["id"]}" class="{" ".join(filter(None, kinds))}"{link}>'
        body += f'<th scope="row" data-v="{escape(row["name"])}">{escape(row["name"])}</th>'
        for c in used:
            body += f'<td class="{classes(c)}" data-v="{escape(_value(row, c))}">{escape(text(row, c))}</td>'
        body += "</tr>\n"
    head = '<th scope="col">row</th>' + "".join(
        f'<th scope="col" class="{classes(c)}" title="{escape(NOTES.get(c, ""))}">{escape(COLUMNS[c])}</th>' for c in used
    )
    same = sum("same_as" in row for row in rows)
    shared = f" Measurements shared with a cell of equal arithmetic: {plural(same, 'row')}." if same else ""
    notes = definitions([(COLUMNS[c], NOTES[c]) for c in used if c in NOTES])
    return f"""<h2 id="measurements">All measurements</h2><p>One row per model, sampler and step count.
Students come first and are bold.{escape(shared)}
A star marks the Pareto front of NFE and FID: no other row has both fewer evaluations and a lower FID.</p>
<div class="tools" hidden><input id="filter" type="search" placeholder="filter rows" aria-label="filter rows">
<button id="more" type="button" aria-pressed="false">all columns</button><span class="note">Click a head to sort, a row to see its images
above.</span></div>
<div class="cells scroll" tabindex="0" role="region" aria-label="all measurements"><table><thead><tr>{head}</tr></thead><tbody>
{body}</tbody></table></div>
<details><summary>What the columns mean</summary>{notes}</details>
"""


def _value(row: dict, column: str) -> str:
    value = row.get(column)
    return "" if value is None else str(value[0] if isinstance(value, list) else value)


def _classes(folder: Path) -> str:
    if not (shown := picture(folder / "labels.png", "images per class")):
        return ""
    said = "Images that the feature extractor assigns to each class, divided by the images requested of it."
    return f'<details><summary>Classes</summary><p>{said}</p><div class="wide scroll">{shown}</div></details>\n'


def _protocol(report: dict, folder: Path) -> str:
    run = report["run"]
    version = next((part for part in str(run.get("versions", "")).split(", ") if part.startswith("fewstep ")), "fewstep")
    commit = f", commit {run['commit']}" if "commit" in run else ""
    cite = f"fewstep developers: {version}{commit}. https://github.com/fewstep/fewstep"
    out = "<h2>Protocol</h2><p>Everything that the numbers depend on. Compare only numbers of the same protocol.</p>\n"
    for id_, name, said in (("command", "Command", run.get("command")), ("cite", "How to cite", cite)):
        if said:
            button = f'<button class="tools" type="button" data-copy="{id_}" hidden>copy</button>'
            out += f'<p><b>{name}</b> {button}</p><pre id="{id_}" tabindex="0">{escape(str(said))}</pre>\n'
    if (table := folder / "report.csv").is_file():
        uri = f"data:text/csv;base64,{b64encode(table.read_bytes()).decode()}"
        out += f'<p class="note"><a download="report.csv" href="{uri}">Download the table as CSV</a></p>\n'
    return out + definitions(facts(report))
