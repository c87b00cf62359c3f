"""Merge finished runs of one protocol into one report, with their rows side by side."""

from __future__ import annotations

import shutil
from pathlib import Path

from distill import reading
from eval import report as reports
from eval.sweep import picture_path, pictures
from eval.verdict import good, with_comparisons


def merged(folders: list[Path]) -> tuple[dict, dict[str, Path]]:
    """Return the report of all rows, and the picture file of each row by its name.

    A row that is in several runs is kept once. If different models have the same name, the name of the run is put before it.
    Raises ValueError if the protocols differ or a run is unfinished.
    """
    runs = {folder: _read(folder) for folder in folders}
    with reading.malformed(", ".join(map(str, folders))):
        return _merged(runs)


def _merged(runs: dict[Path, dict]) -> tuple[dict, dict[str, Path]]:
    first, first_run = next(iter(runs.items()))
    protocol = first_run["protocol"]
    rows: list[dict] = []
    sources: dict[str, Path] = {}
    taken: dict[str, str] = {}
    for folder, run in runs.items():
        _check_protocols(first, protocol, folder, run["protocol"])
        for row in good(run["rows"]):
            source = picture_path(folder / "cells", row["name"])
            if taken.get(row["name"], row["model_sha256"]) != row["model_sha256"]:
                row = row | {"name": f"{folder.name} {row['name']}", "model": f"{folder.name} {row['model']}"}
            if row["name"] not in taken:
                rows.append(row)
                sources[row["name"]], taken[row["name"]] = source, row["model_sha256"]
    rows = with_comparisons(rows, {name: pictures(path) for name, path in sources.items()})
    facts = {"runs": ", ".join(map(str, runs)), "versions": first_run["run"].get("versions", "")}
    title = "Comparison of " + ", ".join(folder.name for folder in runs)
    return reports.assemble(title, rows, protocol, first_run["floor"], first_run["feature_dimension"], facts), sources


def copy_pictures(sources: dict[str, Path], cells: Path) -> None:
    """Copy the picture files of `merged` into the folder ``cells``."""
    cells.mkdir(parents=True, exist_ok=True)
    for name, source in sources.items():
        shutil.copyfile(source, picture_path(cells, name))


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
