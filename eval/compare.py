"""Merge finished runs of one protocol into one report, with their rows side by side."""

from __future__ import annotations

import shutil
from pathlib import Path

from distill import reading
from eval import report as reports
from eval.cells import picture_path, pictures
from eval.report_page import REAL
from eval.verdict import good, with_comparisons


def merged(folders: list[Path]) -> tuple[dict, dict[str, Path]]:
    """Return the report of all rows, and the picture file of each row by its name.

    A row that is in several runs is kept once. Every student has the name of its run in ``run``. If different models have the same
    name, the name of the run is put before it.
    Raises ValueError if the protocols differ or a run is unfinished.
    """
    folders = list(dict.fromkeys(folders))
    runs = {folder: _read(folder) for folder in folders}
    with reading.malformed(", ".join(map(str, folders))):
        return _merged(runs)


def _merged(runs: dict[Path, dict]) -> tuple[dict, dict[str, Path]]:
    first, first_run = next(iter(runs.items()))
    protocol = first_run["protocol"]
    rows: list[dict] = []
    sources: dict[str, Path] = {}
    taken: dict[str, str] = {}
    for (folder, run), title in zip(runs.items(), _titles(list(runs)), strict=True):
        _check_protocols(first, protocol, folder, run["protocol"])
        renamed: dict[str, str] = {}
        for row in good(run["rows"]):
            source = picture_path(folder / "cells", row.get("same_as", row["name"]))
            if row["role"] == "student":
                row = row | {"run": f"{title} {row['run']}" if row.get("run") else title}
            if taken.get(row["name"], row["model_sha256"]) != row["model_sha256"]:
                renamed[row["name"]] = f"{title} {row['name']}"
                row = row | {"name": renamed[row["name"]], "model": f"{title} {row['model']}"}
            if "same_as" in row:
                row = row | {"same_as": renamed.get(row["same_as"], row["same_as"])}
            if row["name"] not in taken:
                rows.append(row)
                sources[row["name"]], taken[row["name"]] = source, row["model_sha256"]
    rows = with_comparisons(rows, {name: pictures(path) for name, path in sources.items()})
    facts = {"runs": ", ".join(map(str, runs)), "versions": first_run["run"].get("versions", "")}
    title = "Comparison of " + ", ".join(_titles(list(runs)))
    return reports.assemble(title, rows, protocol, first_run["floor"], first_run["feature_dimension"], facts), sources


def copy_pictures(sources: dict[str, Path], cells: Path) -> None:
    """Copy the picture files of `merged`, and the real images of one run, into the folder ``cells``."""
    cells.mkdir(parents=True, exist_ok=True)
    for name, source in sources.items():
        shutil.copyfile(source, picture_path(cells, name))
    for real in dict.fromkeys(picture_path(source.parent, REAL) for source in sources.values()):
        if real.is_file():
            shutil.copyfile(real, picture_path(cells, REAL))


def _titles(folders: list[Path]) -> list[str]:
    """Return the shortest ends of the paths that tell the folders apart."""
    parts = [folder.resolve().parts for folder in folders]
    for n in range(1, max(map(len, parts))):
        titles = ["/".join(path[-n:]) for path in parts]
        if len(set(titles)) == len(set(parts)):
            break
    return titles


def _check_protocols(first: Path, mine: dict, folder: Path, theirs: dict) -> None:
    if different := [key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key)]:
        shown = ", ".join(f"{key} is {mine.get(key)!r} and {theirs.get(key)!r}" for key in sorted(different))
        raise ValueError(f"{first} and {folder} cannot be compared: {shown}")


def _read(folder: Path) -> dict:
    try:
        out = reading.read_json(folder / "report.json")
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder}: there is no finished report in this folder ({error})") from None
    if out.get("schema") != reports.SCHEMA:
        raise ValueError(f"{folder}: its report has schema {out.get('schema')!r}, accepted is {reports.SCHEMA!r}")
    return out
