"""Merge the reports of several finished runs into one page. All runs must share one measurement protocol.

python recipes/compare.py --runs runs/a runs/b --output-dir runs/a-and-b
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from recipes.common.cli import REQUIRED, flag, flags_first, machine_flag, one_line_errors, parse
from recipes.common.flags import MachineFlags

PRESETS: dict[str, dict] = {"default": {}, "smoke": {}}  # nothing here takes long


@dataclass(frozen=True, kw_only=True)
class Config(MachineFlags):
    """Which runs are compared."""

    preset: str = flag("default", "both are the same here", choices=PRESETS)
    runs: tuple[str, ...] = flag(REQUIRED, "directories of finished runs")
    output_dir: str = machine_flag("runs/compare", "a new directory, or one that holds the same comparison", path="folder")


flags_first(__name__, Config, __doc__, PRESETS)

from eval import compare, report
from recipes.common.run import Run


def main(argv: list[str] | None = None) -> None:
    with one_line_errors():
        config = parse(Config, __doc__, PRESETS, argv)
        merged, cells = compare.merged([Path(folder) for folder in config.runs])
        run = Run.open(config)
        if run.main:
            compare.copy_pictures(cells, run.folder / "cells")
            report.write(merged, run.folder, run.folder / "cells")
        run.say(f"{merged['verdict']}\nreport: {run.folder / 'report.html'}")
        run.close()


if __name__ == "__main__":
    main()
