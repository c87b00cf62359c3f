"""The curves of a report: which rows belong to one model under one sampler, and how each curve is named and drawn."""

from __future__ import annotations

from itertools import cycle

STUDENTS = ("#d62728", "#1f77b4", "#2ca02c", "#9467bd", "#e377c2", "#8c564b", "#17becf", "#bcbd22")
STUDENT_MARKERS = "osD^vP*X"
GREYS = ("#111111", "#777777", "#444444", "#888888", "#222222", "#666666")
TEACHER_LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)), (0, (8, 2)))
TEACHER_MARKERS = ".x+1234"


def series(row: dict) -> str:
    """Return the name of the curve that a row belongs to: the student's run, or the teacher and its sampler."""
    searched = " searched" if row["times"] and row["grid"] == "searched" else ""
    if row["role"] == "student":
        guidance = row.get("guidance", 1)
        scaled = guidance != 1 or str(row["model"]).endswith(" w=1")  # of a student that takes the scale
        ending = f" with {row['sampler']}"
        chosen = ending if str(row["model"]).endswith(ending) else ""  # one of several of --student-samplers
        return f"{row.get('run') or 'student'}{searched}{f' w={guidance:g}' if scaled else ''}{chosen}"
    return f"{row['model']}, {row['sampler']}{searched}"


def curves(rows: list[dict]) -> dict[str, list[dict]]:
    """Return the rows of each curve, by its name: students first, then the teachers' samplers, each in order of appearance."""
    out: dict[str, list[dict]] = {}
    for row in sorted(rows, key=lambda row: row["role"]):
        out.setdefault(series(row), []).append(row)
    return out


def styles(curves: dict[str, list[dict]]) -> dict[str, dict]:
    """Return matplotlib's settings for each curve. Students have colours, the teachers' samplers are grey; markers tell both apart."""
    students = zip(cycle(STUDENTS), cycle(STUDENT_MARKERS), strict=False)
    teachers = zip(cycle(GREYS), cycle(TEACHER_LINES), cycle(TEACHER_MARKERS), strict=False)
    out: dict[str, dict] = {}
    for name, rows in curves.items():
        if rows[0]["role"] == "student":
            colour, marker = next(students)
            out[name] = {"color": colour, "marker": marker, "markersize": 8, "linewidth": 2.8, "zorder": 3}
        else:
            colour, line, marker = next(teachers)
            out[name] = {"color": colour, "marker": marker, "linestyle": line, "linewidth": 0.9, "zorder": 2}
    return out
