"""Several finished runs on one page: their rows side by side, where one protocol measured them all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from eval import report as reports
from eval.verdict import good, with_comparisons
from eval.sweep import picture_path, pictures


def merged(folders: list[Path]) -> tuple[dict, dict[str, Path]]:
    """The report of all rows, and where the pictures of each name lie. ValueError where protocols differ or a run is unfinished.

    Rows that stand in several runs are kept once; different models under one name get the name of their run before theirs.
    """
    read = {folder: _read(folder) for folder in folders}
    first = next(iter(read))
    for folder, other in read.items():
        mine, theirs = read[first]["protocol"], other["protocol"]
        if different := [key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key)]:
            shown = ", ".join(f"{key} is {mine.get(key)!r} and {theirs.get(key)!r}" for key in sorted(different))
            raise ValueError(f"{first} and {folder} cannot be compared: {shown}")
    rows: list[dict] = []
    sources: dict[str, Path] = {}
    taken: dict[str, str] = {}
    for folder, other in read.items():
        for row in good(other["rows"]):
            source = picture_path(folder / "cells", row["name"])
            if taken.get(row["name"], row["model_sha256"]) != row["model_sha256"]:
                row = row | {"name": f"{folder.name} {row['name']}", "model": f"{folder.name} {row['model']}"}
            if row["name"] not in taken:
                rows.append(row)
                sources[row["name"]], taken[row["name"]] = source, row["model_sha256"]
    rows = with_comparisons(rows, {name: pictures(path) for name, path in sources.items()})
    run = {"runs": ", ".join(map(str, folders)), "versions": read[first]["run"].get("versions", "")}
    title = "Comparison of " + ", ".join(folder.name for folder in folders)
    some = read[first]
    return reports.assemble(title, rows, some["protocol"], some["floor"], some["feature_dimension"], run), sources


def _read(folder: Path) -> dict:
    try:
        out = json.loads((folder / "report.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{folder}: holds no finished report ({type(error).__name__})") from None
    if out.get("schema") != reports.SCHEMA:
        raise ValueError(f"{folder}: its report is of schema {out.get('schema')!r}, this version reads {reports.SCHEMA!r}")
    return out


def copy_pictures(sources: dict[str, Path], cells: Path) -> None:
    cells.mkdir(parents=True, exist_ok=True)
    for name, source in sources.items():
        shutil.copyfile(source, picture_path(cells, name))
