"""The page of a report: headline, charts, samples, table, training curves and protocol in one file."""

from __future__ import annotations

import json
import math
from base64 import b64encode
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path
from statistics import median

from distill import files
from eval.cells import picture_path
from eval.columns import COLUMNS, NOTES, SHOWN, facts, floor_note, plural, text, used_columns
from eval.html_page import definitions, document, figure, inline, picture
from eval.image_grid import strip
from eval.series import curves, series
from eval.svg import MARKERS, Axis, Curve, Point, chart, look
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
    body = warned + _plots(rows, report["floor"], floor_note(report), folder) + _samples(rows, strips) + _table(report, strips)
    body += _classes(folder) + _protocol(report, folder)
    return document(report["title"], verdict.removeprefix(headline).strip(), body, headline)


# charts


def _plots(rows: list[dict], floor: float | None, note: str, folder: Path) -> str:
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


def _short(name: str) -> str:
    return name if len(name) < 20 else f"{name[:18]}…"


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
